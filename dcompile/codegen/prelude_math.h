// Transcendental functions of f32 and random numbers of generated kernels; follows prelude.h. The functions have no
// branch and no table, so that loops over them vectorise. Their error bounds are tested (test_cpp_math.py).
namespace dc {

// ---- f32 transcendental functions -----------------------------------------------------------------------------------

static inline float select(bool c, float a, float b) { return c ? a : b; }
static inline float with_sign(float magnitude, float sign) {
  return from_bits((bits(magnitude) & 0x7fffffffu) | (bits(sign) & 0x80000000u));
}
// 2^n for -126 <= n <= 127.
static inline float pow2(int32_t n) { return from_bits((uint32_t)(n + 127) << 23); }
// x * 2^n for -252 <= n <= 254, in two steps so that only the last one can overflow or become subnormal.
static inline float scale(float x, int32_t n) { return x * pow2(n >> 1) * pow2(n - (n >> 1)); }

// Argument reduction x = n ln2 + r, |r| <= ln2/2, with ln2 in two parts (Cody and Waite, 1980); exp(r) = 1 + r + r^2 p(r)
// with the polynomial of Moshier's Cephes library (expf). n is found by adding 1.5 * 2^23, which rounds to an integer.
static const float ROUND_BY_ADDING = 0x1.8p23f;
static inline float exp_tail(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}
static inline float exp_reduced(float n, float x) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; }

// exp for -87 <= x <= 87, where one scaling does.
static inline float exp_normal(float x) {
  const float z = x * 1.44269504f + ROUND_BY_ADDING;
  const float r = exp_reduced(z - ROUND_BY_ADDING, x);
  return (1.0f + (r + r * r * exp_tail(r))) * pow2((int32_t)(bits(z) - bits(ROUND_BY_ADDING)));
}
static inline float exp_(float x) {
  x = x > 89.0f ? 89.0f : x;    // overflows to infinity
  x = x < -104.0f ? -104.0f : x;  // below half the smallest subnormal
  const float z = x * 1.44269504f + ROUND_BY_ADDING;
  const float n = z - ROUND_BY_ADDING;
  const float r = exp_reduced(n, x);
  return scale(1.0f + (r + r * r * exp_tail(r)), (int32_t)(bits(z) - bits(ROUND_BY_ADDING)));
}
static inline float exp2_(float x) {
  x = x > 129.0f ? 129.0f : x;
  x = x < -151.0f ? -151.0f : x;
  const float z = x + ROUND_BY_ADDING;
  const float r = (x - (z - ROUND_BY_ADDING)) * 0.693147181f;
  return scale(1.0f + (r + r * r * exp_tail(r)), (int32_t)(bits(z) - bits(ROUND_BY_ADDING)));
}
// 2^n (exp(r) - 1) + (2^n - 1), with half of 2^n so that n = 128 does not overflow early.
static inline float expm1_(float x) {
  float c = x > 89.0f ? 89.0f : x;
  c = c < -30.0f ? -30.0f : c;
  const float z = c * 1.44269504f + ROUND_BY_ADDING;
  const float n = z - ROUND_BY_ADDING;
  const float r = exp_reduced(n, c);
  const float half = pow2((int32_t)(bits(z) - bits(ROUND_BY_ADDING)) - 1);
  const float y = 2.0f * (half * (r + r * r * exp_tail(r)) + (half - 0.5f));
  return select(x == 0.0f, x, y);
}

// x = 2^k m with sqrt(1/2) <= m < sqrt(2); log(1 + f) = f - f^2/2 + f^3 p(f), Moshier's Cephes library (logf).
struct Split {
  float k, f;
};
static inline Split split_log(float x) {
  const bool small = x < 0x1p-126f;
  const uint32_t u = bits(small ? x * 0x1p23f : x) + (0x3f800000u - 0x3f3504f3u);
  const float k = (float)((int32_t)(u >> 23) - 127);
  return Split{small ? k - 23.0f : k, from_bits((u & 0x007fffffu) + 0x3f3504f3u) - 1.0f};
}
static inline float log_tail(float f) {
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return p * f * f * f;
}
static inline float log_(float x) {
  const Split s = split_log(x);
  float y = log_tail(s.f) - 2.12194440e-4f * s.k;
  y = y - 0.5f * s.f * s.f;
  y = (s.f + y) + 0.693359375f * s.k;
  y = x == 0.0f ? -__builtin_inff() : y;
  y = x < __builtin_inff() ? y : x;
  return x < 0.0f ? __builtin_nanf("") : y;
}
// log_b(x) = k log_b(2) + log_b(e) (f + t): the leading bits of f are multiplied exactly by the leading part of log_b(e).
static inline float log_base(float x, float high, float low, float two_high, float two_low) {
  const Split s = split_log(x);
  const float t = log_tail(s.f) - 0.5f * s.f * s.f;
  const float sum = s.f + t;
  const float head = from_bits(bits(sum) & 0xfffff000u);
  const float rest = (s.f - head) + t;
  float y = rest * (high + low) + head * low + s.k * two_low;
  y = (y + head * high) + s.k * two_high;
  y = x == 0.0f ? -__builtin_inff() : y;
  y = x < __builtin_inff() ? y : x;
  return x < 0.0f ? __builtin_nanf("") : y;
}
static inline float log2_(float x) { return log_base(x, 1.44238281f, 0.000312228389f, 1.0f, 0.0f); }
static inline float log10_(float x) { return log_base(x, 0.434082031f, 0.000212450653f, 0.301025391f, 4.60503898e-06f); }
// log(u) with u = 1 + x rounded, plus what the rounding lost over u (Kahan); next to zero f is x itself.
static inline float log1p_(float x) {
  const float u = 1.0f + x;
  const Split s = split_log(u);
  const float lost = (x < 1.0f ? x - (u - 1.0f) : 1.0f - (u - x)) / u;
  const bool near = s.k == 0.0f;
  const float f = near ? x : s.f;
  float y = log_tail(f) - 2.12194440e-4f * s.k + (near ? 0.0f : lost);
  y = y - 0.5f * f * f;
  y = (f + y) + 0.693359375f * s.k;
  y = x == -1.0f ? -__builtin_inff() : y;
  y = x < __builtin_inff() ? y : x;
  y = x == 0.0f ? x : y;
  return x < -1.0f ? __builtin_nanf("") : y;
}

// tanh|x| = e / (e + 2) with e = expm1(2|x|): exact to a few ulp down to zero. From 9.02 on it rounds to 1.
static inline float tanh_(float x) {
  const float a = abs_(x);
  const float e = expm1_(a > 10.0f ? 20.0f : 2.0f * a);
  return with_sign(e / (e + 2.0f), x) + (x != x ? x : 0.0f) * 0.0f;
}
// Both forms keep full precision: 1 / (1 + e) and e / (1 + e) with e = exp(-|x|) <= 1.
static inline float sigmoid_(float x) {
  const float e = exp_(-abs_(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// erf: |x| < 1: x + x p(x^2); else 1 - exp(q(|x|)). p and q are minimax fits (Lawson's iteration on Chebyshev nodes) to
// erf(x)/x - 1 on [0, 1] and log(erfc(x)) on [1, 4], relative errors of erf below 2^-34.
static inline float erf_(float x) {
  const float s = x * x;
  const float a = abs_(x) > 4.0f ? 4.0f : abs_(x);
  float p = -9.68013716e-06f;
  p = p * s + 0.000112705448f;
  p = p * s - 0.000848471149f;
  p = p * s + 0.00522107488f;
  p = p * s - 0.0268654458f;
  p = p * s + 0.112837827f;
  p = p * s - 0.376126385f;
  p = p * s + 0.128379167f;
  float q = -2.16976389e-05f;
  q = q * a + 0.000441472916f;
  q = q * a - 0.00420528589f;
  q = q * a + 0.0252103423f;
  q = q * a - 0.108422103f;
  q = q * a - 0.633216395f;
  q = q * a - 1.12958031f;
  q = q * a + 0.000188467784f;
  return abs_(x) >= 1.0f ? with_sign(1.0f - exp_normal(q), x) : x + x * p;
}
// 2^e in double precision for |e| <= 300: Taylor series of 2^f, |f| <= 1/2, to 2^-38.
static inline double exp2_wide(double e) {
  const double z = e + 0x1.8p52;
  const double f = (e - (z - 0x1.8p52)) * 0.69314718055994531;
  double t = 1.0 / 3628800.0;
  t = t * f + 1.0 / 362880.0;
  t = t * f + 1.0 / 40320.0;
  t = t * f + 1.0 / 5040.0;
  t = t * f + 1.0 / 720.0;
  t = t * f + 1.0 / 120.0;
  t = t * f + 1.0 / 24.0;
  t = t * f + 1.0 / 6.0;
  t = t * f + 0.5;
  t = t * f + 1.0;
  t = t * f + 1.0;
  const int64_t n = (int64_t)(bitcast<uint64_t>(z) - bitcast<uint64_t>(0x1.8p52));
  return t * bitcast<double>((uint64_t)(n + 1023) << 52);
}
// erfc(t) = exp(-t^2) c(u) / (1 + 2t) with u = (t - 2) / (t + 2) (Shepherd and Laframboise, "Chebyshev approximation of
// (1 + 2x) exp(x^2) erfc(x) in 0 <= x < inf", Math. Comp. 36, 1981); c is a minimax fit up to t = 10.1, relative error
// 2^-30. The exponential is taken in double precision, which keeps all of t^2.
static inline float erfc_(float x) {
  const float t = abs_(x) > 10.1f ? 10.1f : abs_(x);
  const float u = (t - 2.0f) / (t + 2.0f);
  float c = 7.91627034e-05f;
  c = c * u + 0.000168803879f;
  c = c * u - 0.000400862342f;
  c = c * u - 0.00142027004f;
  c = c * u + 0.00125295214f;
  c = c * u + 0.00870894031f;
  c = c * u - 0.00803095644f;
  c = c * u - 0.0542178103f;
  c = c * u + 0.16405105f;
  c = c * u - 0.166030522f;
  c = c * u - 0.0927638209f;
  c = c * u + 1.27697838f;
  const double e = exp2_wide((double)t * (double)t * -1.4426950408889634);
  const float tail = (float)(e * (double)c / (1.0 + 2.0 * (double)t));
  const float square = x * x;
  float small = -9.68013716e-06f;
  small = small * square + 0.000112705448f;
  small = small * square - 0.000848471149f;
  small = small * square + 0.00522107488f;
  small = small * square - 0.0268654458f;
  small = small * square + 0.112837827f;
  small = small * square - 0.376126385f;
  small = small * square + 0.128379167f;
  small = 1.0f - (x + x * small);
  const float y = x < 0.0f ? 2.0f - tail : tail;
  return x != x ? x : (abs_(x) < 0.5f ? small : y);
}

// sin and cos: x = n pi/2 + r in double precision with pi/2 in two doubles, good to |x| < 2^31; beyond, the reduction of
// Payne and Hanek (SIGNUM 1983): mantissa times those bits of 2/pi that matter modulo 4, in integers. Both are computed,
// so that loops have no branch, and 2/pi stands in six constants instead of a table, so that they have no gather. The
// polynomials on [-pi/4, pi/4] are those of Moshier's Cephes library (sinf, cosf).
struct Angle {
  float r;
  uint32_t quadrant;
};
static inline Angle reduce_angle(float x) {
  const uint32_t u = bits(x) & 0x7fffffffu;
  const uint32_t large = (uint32_t)((int32_t)(0x4effffffu - u) >> 31);  // all ones from 2^31 on
  const double near = (double)from_bits(bits(x) & ~large);
  const double z = near * 0x1.45f306dc9c883p-1 + 0x1.8p52;
  const double n = z - 0x1.8p52;
  const double r = __builtin_fma(-n, 0x1.1a62633145c07p-54, __builtin_fma(-n, 0x1.921fb54442d18p+0, near));
  const uint32_t quadrant = (uint32_t)bitcast<uint64_t>(z);

  const uint64_t mantissa = (u & 0x007fffffu) | 0x00800000u;
  const uint64_t offset = ((u >> 23) - 152u) & 127u, word = offset >> 5, shift = offset & 31u;  // bits of 2/pi to skip
  const uint64_t first = word == 0 ? 0xa2f9836e4e441529ull
                        : word == 1 ? 0x4e441529fc2757d1ull
                        : word == 2 ? 0xfc2757d1f534ddc0ull
                        : 0xf534ddc0db629599ull;
  const uint64_t second = word == 0 ? 0xfc2757d1f534ddc0ull
                        : word == 1 ? 0xf534ddc0db629599ull
                        : word == 2 ? 0xdb6295993c439041ull
                        : 0x3c439041fe5163abull;
  const uint64_t high = (first << shift) | ((second >> 1) >> (63u - shift)), low = (second << shift) >> 32;
  const uint64_t turns = mantissa * high + ((mantissa * low) >> 32);
  const uint64_t nearest = (turns + 0x2000000000000000ull) >> 62;
  const uint64_t rest = (turns - (nearest << 62)) << 1;  // signed; its halves are converted, as AVX2 converts 32 bits only
  const double upper = (double)(int32_t)(uint32_t)(rest >> 32) * 0x1p32;
  const double lower = (double)(int32_t)((uint32_t)rest ^ 0x80000000u) + 0x1p31;
  const double far = (upper + lower) * (0x1.921fb54442d18p+0 * 0x1p-63);
  const uint32_t sign = (uint32_t)((int32_t)bits(x) >> 31);
  const uint32_t far_quadrant = (((uint32_t)nearest ^ sign) - sign) & large;
  const uint32_t far_bits = (bits((float)far) ^ (sign & 0x80000000u)) & large;
  // Where one of the two is meant the other is zero. No selection is needed. x - x is a NaN for infinities and NaN, else all bits zero.
  return Angle{from_bits(bits((float)r) | far_bits | bits(x - x)), quadrant + far_quadrant};
}
static inline float sin_kernel(float r, float s) {
  float p = -1.9515295891e-4f;
  p = p * s + 8.3321608736e-3f;
  p = p * s - 1.6666654611e-1f;
  return r * (1.0f + s * p);
}
static inline float cos_kernel(float s) {
  float p = 2.443315711809948e-5f;
  p = p * s - 1.388731625493765e-3f;
  p = p * s + 4.166664568298827e-2f;
  return (1.0f - 0.5f * s) + s * s * p;
}
static inline float quarter(Angle a, uint32_t shift) {
  const uint32_t q = a.quadrant + shift;
  const float s = a.r * a.r;
  const float sine = sin_kernel(a.r, s), cosine = cos_kernel(s);
  const float y = (q & 1u) ? cosine : sine;
  return from_bits(bits(y) ^ ((q & 2u) << 30));
}
static inline float sin_(float x) { return quarter(reduce_angle(x), 0u); }
static inline float cos_(float x) { return quarter(reduce_angle(x), 1u); }

// x^y = 2^(y log2 |x|) in double precision: log by the series of atanh((m-1)/(m+1)) to 2^-44, 2^f by its Taylor series to
// 2^-38, so that the result is the correctly rounded one but for ties within 2^-10 ulp. Special cases as in C99 annex F.
static inline float pow_(float x, float y) {
  const float a = abs_(x);
  const bool small = a < 0x1p-126f;
  const uint32_t u = bits(small ? a * 0x1p23f : a) + (0x3f800000u - 0x3f3504f3u);
  const double k = (double)((int32_t)(u >> 23) - (small ? 150 : 127));
  const double m = (double)from_bits((u & 0x007fffffu) + 0x3f3504f3u);
  const double s = (m - 1.0) / (m + 1.0), w = s * s;
  double p = 1.0 / 17.0;
  p = p * w + 1.0 / 15.0;
  p = p * w + 1.0 / 13.0;
  p = p * w + 1.0 / 11.0;
  p = p * w + 1.0 / 9.0;
  p = p * w + 1.0 / 7.0;
  p = p * w + 1.0 / 5.0;
  p = p * w + 1.0 / 3.0;
  double l = k + (s + s * w * p) * 2.8853900817779268;  // 2 / ln 2
  l = a == 0.0f ? -1e300 : l;
  l = a == __builtin_inff() ? 1e300 : l;
  double e = a == 1.0f ? 0.0 : (double)y * l;
  e = y == 0.0f ? 0.0 : e;
  e = e > 300.0 ? 300.0 : e;
  e = e < -300.0 ? -300.0 : e;
  const float magnitude = (float)exp2_wide(e);
  const float whole = __builtin_truncf(y);
  const bool odd = (whole == y) & (__builtin_truncf(y * 0.5f) * 2.0f != y) & (abs_(y) < 0x1p24f);
  const bool negative = (bits(x) >> 31) != 0;
  float r = negative & odd ? -magnitude : magnitude;
  r = (x < 0.0f) & (a < __builtin_inff()) & (whole != y) ? __builtin_nanf("") : r;
  r = (x != x) | (y != y) ? x + y : r;
  return (y == 0.0f) | (x == 1.0f) ? 1.0f : r;
}

// ---- random numbers -------------------------------------------------------------------------------------------------

// Philox 4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// Counter (number low, number high, 0, 0), key (seed low, seed high).
struct Words {
  uint32_t w[4];
};
static inline Words philox(int64_t seed, int64_t number) {
  uint32_t c0 = (uint32_t)number, c1 = (uint32_t)((uint64_t)number >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}
static inline float uniform(uint32_t word) { return (float)(int32_t)(word >> 8) * 0x1p-24f; }

// Uniform numbers take all four words: 16 counters give 64 neighbours, first the 16 first words, then the second ones.
static inline float rand(int64_t seed, int64_t offset) {
  const Words words = philox(seed, (int64_t)((uint64_t)offset >> 6 << 4) | (offset & 15));
  const uint32_t low = offset & 16 ? words.w[1] : words.w[0], high = offset & 16 ? words.w[3] : words.w[2];
  return uniform(offset & 32 ? high : low);
}

// Four 32-bit numbers in 64-bit lanes whose upper halves hold anything: products read the lower halves only.
typedef uint64_t Wide __attribute__((vector_size(32)));
static inline Wide low_product(Wide x, uint32_t factor) {
#if defined(__AVX2__) && !defined(__clang__)
  typedef int Narrow __attribute__((vector_size(32)));
  const int f = (int)factor;
  return (Wide)__builtin_ia32_pmuludq256((Narrow)x, Narrow{f, f, f, f, f, f, f, f});
#else
  return (x & 0xffffffffull) * (uint64_t)factor;
#endif
}
// The words of 64 neighbours, from offset 64 * block on. Even and odd counters stand in vectors of their own, so that
// words side by side are one shift away.
static inline void draw_block(int64_t seed, uint64_t block, uint32_t* words) {
  for (uint64_t half = 0; half < 2; half++) {
    const uint64_t first = (block << 4) + 8 * half;
    const Wide zero = {0, 0, 0, 0};
    Wide even[4] = {{first, first + 2, first + 4, first + 6}, zero + (first >> 32), zero, zero};
    Wide odd[4] = {even[0] + 1, even[1], zero, zero};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
    for (int round = 0; round < 10; round++) {
      const Wide key0 = zero + (uint64_t)k0, key1 = zero + (uint64_t)k1;
      const Wide even0 = low_product(even[0], 0xD2511F53u), even1 = low_product(even[2], 0xCD9E8D57u);
      const Wide odd0 = low_product(odd[0], 0xD2511F53u), odd1 = low_product(odd[2], 0xCD9E8D57u);
      even[0] = (even1 >> 32) ^ even[1] ^ key0;
      even[1] = even1;
      even[2] = (even0 >> 32) ^ even[3] ^ key1;
      even[3] = even0;
      odd[0] = (odd1 >> 32) ^ odd[1] ^ key0;
      odd[1] = odd1;
      odd[2] = (odd0 >> 32) ^ odd[3] ^ key1;
      odd[3] = odd0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int word = 0; word < 4; word++) {
      const Wide both = (even[word] & 0xffffffffull) | (odd[word] << 32);
      __builtin_memcpy(words + 16 * word + 8 * half, &both, sizeof both);
    }
  }
}
// The words of count neighbours from offset first on, for ``uniform``.
static __attribute__((noinline, unused)) void draw(int64_t seed, int64_t first, int64_t count, uint32_t* words) {
  while (count > 0) {
    const int64_t skipped = first & 63, taken = min_index(count, 64 - skipped);
    if (taken == 64) {
      draw_block(seed, (uint64_t)first >> 6, words);
    } else {
      uint32_t all[64];
      draw_block(seed, (uint64_t)first >> 6, all);
      __builtin_memcpy(words, all + skipped, (size_t)taken * sizeof(uint32_t));
    }
    first += taken;
    count -= taken;
    words += taken;
  }
}
static inline float randn(int64_t seed, int64_t offset) {  // Box and Muller, 1958
  const Words words = philox(seed, offset);
  const float u1 = (float)(int32_t)((words.w[0] >> 8) + 1u) * 0x1p-24f;
  return sqrt_(-2.0f * log_(u1)) * cos_(6.28318530717958647692f * uniform(words.w[1]));
}

}  // namespace dc
