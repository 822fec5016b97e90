// Scalar functions of generated kernels. Everything that a loop over f32 calls is branch-free, so that it vectorises.
// Compiled without -ffast-math: NaN, infinities, signed zeros and subnormals behave as in the C library.
#include <math.h>
#include <stdint.h>

namespace dc {

// ---- bits -----------------------------------------------------------------------------------------------------------

template <class To, class From> static inline To bitcast(From x) { return __builtin_bit_cast(To, x); }
static inline uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
static inline float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }

// bfloat16: the upper half of a float. Round to nearest even; a NaN keeps its sign and upper payload and becomes quiet.
static inline uint16_t bf16_bits(float x) {
  const uint32_t u = bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)(x != x ? (u >> 16) | 0x40u : rounded);
}
static inline float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }
static inline float round_bf16(float x) { return from_bf16(bf16_bits(x)); }

// IEEE half. Normal numbers round in the integer domain; subnormal ones by adding 0.5, whose last bit is 2^-24, the
// spacing of subnormal halves. Every path is computed and selected.
static inline uint16_t f16_bits(float x) {
  const uint32_t sign = (bits(x) >> 16) & 0x8000u;
  const uint32_t u = bits(x) & 0x7fffffffu;
  const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  const uint32_t tiny = bits(from_bits(u) + 0.5f) - 0x3f000000u;
  uint32_t h = u < 0x38800000u ? tiny : normal;
  h = u >= 0x47800000u ? 0x7c00u : h;
  h = u > 0x7f800000u ? 0x7e00u | ((u >> 13) & 0x3ffu) : h;
  return (uint16_t)(sign | h);
}
static inline float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t)(h & 0x7fffu);
  const uint32_t shifted = magnitude << 13;
  const float subnormal = (float)(int32_t)magnitude * 0x1p-24f;
  const uint32_t normal = shifted + ((magnitude >= 0x7c00u) ? 0x70000000u : 0x38000000u);
  return from_bits(sign | (magnitude < 0x400u ? bits(subnormal) : normal));
}
static inline float round_f16(float x) { return from_f16(f16_bits(x)); }

// ---- mean and variance ----------------------------------------------------------------------------------------------

// (mean, sum of squared distances, weight) of two parts together. A part without weight changes nothing; equal infinite
// means stay what they are.
static inline void merge_moments(double& mean, double& m2, double& n, double mean_b, double m2_b, double n_b) {
  const double total = n + n_b;
  const double share = total == 0.0 ? 0.0 : n_b / total;
  const double apart = mean_b - mean;
  const double step = mean_b == mean ? 0.0 : apart * share;
  const double squares = m2 + m2_b + apart * apart * (n * share);
  const double next = n == 0.0 ? mean_b : mean + step;
  m2 = n_b == 0.0 ? m2 : n == 0.0 ? m2_b : squares;
  mean = n_b == 0.0 ? mean : next;
  n = total;
}

// A block of count elements, given the sums s1 and s2 of their distances from shift and of the squares of these.
static inline void add_moments(double& mean, double& m2, double& n, double shift, double s1, double s2, double count) {
  const double apart = s1 / count;
  const double squares = s2 - s1 * apart;
  merge_moments(mean, m2, n, shift + apart, squares < 0.0 ? 0.0 : squares, count);
}

// The same of the only block there is; count is a constant there.
static inline void only_moments(double& mean, double& m2, double& n, double shift, double s1, double s2, double count) {
  const double apart = s1 * (1.0 / count);
  const double squares = s2 - s1 * apart;
  mean = shift + apart;
  m2 = squares < 0.0 ? 0.0 : squares;
  n = count;
}

// ---- integers -------------------------------------------------------------------------------------------------------

// Error bits of a kernel: 1 index out of range, 2 integer division by zero.
static inline int64_t error_code(int64_t error) { return error & 1 ? 1 : error; }

static inline int64_t min_index(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_index(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t floor_div_index(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return q - ((a % b != 0) & ((a < 0) != (b < 0)));
}
static inline int64_t floor_mod_index(int64_t a, int64_t b) {
  const int64_t r = a % b;
  return r + ((r != 0) & ((r < 0) != (b < 0)) ? b : 0);
}

// Negative positions count from the end. Out of range sets the error bit and gives 0, which is in range unless n is 0:
// where n may be 0 the printer guards the access itself.
static inline int64_t wrap_index_(int64_t i, int64_t n, int64_t& error) {
  const int64_t wrapped = i < 0 ? i + n : i;
  const bool bad = (uint64_t)wrapped >= (uint64_t)n;
  error |= (int64_t)bad;
  return bad ? 0 : wrapped;
}

// The divisor of an integer division: 0 is reported and replaced by 1; -1 is handled apart because the most negative
// number divided by it overflows, which traps.
#define DC_INTEGER_DIVISION(T)                                                                    \
  static inline T truncdiv_(T a, T b, int64_t& error) {                                           \
    error |= (int64_t)(b == 0) * 2;                                                               \
    const T safe = (b == 0) | (b == (T)-1) ? (T)1 : b;                                            \
    return b == (T)-1 && (T)-1 < (T)0 ? (T)(-a) : (T)(a / safe);                                  \
  }                                                                                               \
  static inline T fmod_(T a, T b, int64_t& error) {                                               \
    error |= (int64_t)(b == 0) * 2;                                                               \
    const bool whole = (b == 0) | ((b == (T)-1) & ((T)-1 < (T)0));                                \
    const T r = (T)(a % (whole ? (T)1 : b));                                                      \
    return whole ? (T)0 : r;                                                                      \
  }                                                                                               \
  static inline T floordiv_(T a, T b, int64_t& error) {                                           \
    const T q = truncdiv_(a, b, error);                                                           \
    const T r = fmod_(a, b, error);                                                               \
    return (T)(q - (T)((r != 0) & ((r < 0) != (b < 0))));                                         \
  }                                                                                               \
  static inline T mod_(T a, T b, int64_t& error) {                                                \
    const T r = fmod_(a, b, error);                                                               \
    return (T)(r + ((r != 0) & ((r < 0) != (b < 0)) ? b : (T)0));                                 \
  }                                                                                               \
  static inline T pow_(T a, T b) {                                                                \
    if (b < 0) return a == 1 ? (T)1 : (a == (T)-1 ? (T)(b % 2 ? -1 : 1) : (T)0);                  \
    T result = 1;                                                                                 \
    for (; b != 0; b = (T)(b / 2), a = (T)(a * a)) result = b % 2 ? (T)(result * a) : result;     \
    return result;                                                                                \
  }                                                                                               \
  static inline T abs_(T a) { return a < 0 ? (T)(-a) : a; }                                       \
  static inline T sign_(T a) { return (T)((a > 0) - (a < 0)); }                                   \
  static inline T maximum_(T a, T b) { return a > b ? a : b; }                                    \
  static inline T minimum_(T a, T b) { return a < b ? a : b; }                                    \
  static inline T fmax_(T a, T b) { return a > b ? a : b; }                                       \
  static inline T fmin_(T a, T b) { return a < b ? a : b; }                                       \
  static inline bool isnan_(T) { return false; }                                                  \
  static inline bool isinf_(T) { return false; }                                                  \
  static inline T floor_(T a) { return a; }                                                       \
  static inline T ceil_(T a) { return a; }                                                        \
  static inline T trunc_(T a) { return a; }                                                       \
  static inline T round_(T a) { return a; }                                                       \
  static inline T shl_(T a, T b) {                                                                \
    const bool out = (b < 0) | (b >= (T)(sizeof(T) * 8));                                         \
    return out ? (T)0 : (T)((uint64_t)a << (out ? 0 : (int)b));                                   \
  }                                                                                               \
  static inline T shr_(T a, T b) {                                                                \
    const int most = (int)sizeof(T) * 8 - ((T)-1 < (T)0);                                         \
    const bool out = (b < 0) | (b >= (T)most);                                                    \
    return (T)((T)-1 < (T)0 || !out ? (a >> (out ? most : (int)b)) : 0);                          \
  }
DC_INTEGER_DIVISION(int64_t)
DC_INTEGER_DIVISION(int32_t)
DC_INTEGER_DIVISION(int16_t)
DC_INTEGER_DIVISION(int8_t)
DC_INTEGER_DIVISION(uint8_t)
#undef DC_INTEGER_DIVISION
static inline bool abs_(bool a) { return a; }
static inline bool sign_(bool a) { return a; }
static inline bool isnan_(bool) { return false; }
static inline bool isinf_(bool) { return false; }

// ---- atomics: plain when the kernel runs on one thread ---------------------------------------------------------------

#define DC_ATOMIC_ADD(SUFFIX, T)                                     \
  static inline void atomic_add_##SUFFIX(T* at, T x, int64_t threads) { \
    if (threads <= 1) {                                              \
      *at += x;                                                      \
      return;                                                        \
    }                                                                \
    _Pragma("omp atomic") *at += x;                                  \
  }
DC_ATOMIC_ADD(f64, double)
DC_ATOMIC_ADD(f32, float)
DC_ATOMIC_ADD(i64, int64_t)
DC_ATOMIC_ADD(i32, int32_t)
DC_ATOMIC_ADD(i16, int16_t)
DC_ATOMIC_ADD(i8, int8_t)
DC_ATOMIC_ADD(u8, uint8_t)
#undef DC_ATOMIC_ADD
static inline void atomic_add_bool(uint8_t* at, bool x, int64_t) { __atomic_fetch_or(at, (uint8_t)x, __ATOMIC_RELAXED); }
#define DC_ATOMIC_ADD_16(NAME)                                                                               \
  static inline void atomic_add_##NAME(uint16_t* at, float x, int64_t) {                                     \
    uint16_t seen = __atomic_load_n(at, __ATOMIC_RELAXED);                                                   \
    while (!__atomic_compare_exchange_n(at, &seen, NAME##_bits(from_##NAME(seen) + x), true, __ATOMIC_RELAXED, \
                                        __ATOMIC_RELAXED)) {                                                 \
    }                                                                                                        \
  }
DC_ATOMIC_ADD_16(bf16)
DC_ATOMIC_ADD_16(f16)
#undef DC_ATOMIC_ADD_16

// ---- floating point -------------------------------------------------------------------------------------------------

#define DC_FLOAT(T, S)                                                                            \
  static inline T abs_(T x) { return __builtin_fabs##S(x); }                                      \
  static inline T sign_(T x) { return (T)((x > 0) - (x < 0)); }                                   \
  static inline T maximum_(T a, T b) { return (a > b) | (a != a) ? a : b; }                       \
  static inline T minimum_(T a, T b) { return (a < b) | (a != a) ? a : b; }                       \
  static inline T fmax_(T a, T b) { return (a >= b) | (b != b) ? a : b; }                         \
  static inline T fmin_(T a, T b) { return (a <= b) | (b != b) ? a : b; }                         \
  static inline T reciprocal_(T x) { return (T)1 / x; }                                           \
  static inline T fma_(T a, T b, T c) { return a * b + c; }                                       \
  static inline T sqrt_(T x) { return __builtin_sqrt##S(x); }                                     \
  static inline T rsqrt_(T x) { return (T)1 / __builtin_sqrt##S(x); }                             \
  static inline T floor_(T x) { return __builtin_floor##S(x); }                                   \
  static inline T ceil_(T x) { return __builtin_ceil##S(x); }                                     \
  static inline T trunc_(T x) { return __builtin_trunc##S(x); }                                   \
  static inline T round_(T x) { return __builtin_rint##S(x); }                                    \
  static inline bool isnan_(T x) { return x != x; }                                               \
  static inline bool isinf_(T x) { return __builtin_fabs##S(x) == (T)__builtin_inf(); }           \
  static inline T truncdiv_(T a, T b) { return trunc_(a / b); }                                   \
  static inline T fmod_(T a, T b) { return __builtin_fmod##S(a, b); }                             \
  static inline T mod_(T a, T b) {                                                                \
    const T r = __builtin_fmod##S(a, b);                                                          \
    return r != 0 && (b < 0) != (r < 0) ? r + b : r;                                              \
  }                                                                                               \
  static inline T floordiv_(T a, T b) {                                                           \
    if (b == 0) return a / b;                                                                     \
    const T r = __builtin_fmod##S(a, b);                                                          \
    T q = (a - r) / b;                                                                            \
    q = r != 0 && (b < 0) != (r < 0) ? q - (T)1 : q;                                              \
    const T down = floor_(q);                                                                     \
    return q == 0 ? __builtin_copysign##S((T)0, a / b) : (q - down > (T)0.5 ? down + (T)1 : down); \
  }                                                                                               \
  static inline T tan_(T x) { return __builtin_tan##S(x); }                                       \
  static inline T asin_(T x) { return __builtin_asin##S(x); }                                     \
  static inline T acos_(T x) { return __builtin_acos##S(x); }                                     \
  static inline T atan_(T x) { return __builtin_atan##S(x); }                                     \
  static inline T atan2_(T y, T x) { return __builtin_atan2##S(y, x); }                           \
  static inline T sinh_(T x) { return __builtin_sinh##S(x); }                                     \
  static inline T cosh_(T x) { return __builtin_cosh##S(x); }                                     \
  static inline T asinh_(T x) { return __builtin_asinh##S(x); }                                   \
  static inline T acosh_(T x) { return __builtin_acosh##S(x); }                                   \
  static inline T atanh_(T x) { return __builtin_atanh##S(x); }                                   \
  static inline T lgamma_(T x) { return __builtin_lgamma##S(x); }
DC_FLOAT(float, f)
DC_FLOAT(double, )
#undef DC_FLOAT

#define DC_LIBM(T, S)                                                                             \
  static inline T exp_(T x) { return __builtin_exp##S(x); }                                       \
  static inline T exp2_(T x) { return __builtin_exp2##S(x); }                                     \
  static inline T expm1_(T x) { return __builtin_expm1##S(x); }                                   \
  static inline T log_(T x) { return __builtin_log##S(x); }                                       \
  static inline T log2_(T x) { return __builtin_log2##S(x); }                                     \
  static inline T log10_(T x) { return __builtin_log10##S(x); }                                   \
  static inline T log1p_(T x) { return __builtin_log1p##S(x); }                                   \
  static inline T sin_(T x) { return __builtin_sin##S(x); }                                       \
  static inline T cos_(T x) { return __builtin_cos##S(x); }                                       \
  static inline T tanh_(T x) { return __builtin_tanh##S(x); }                                     \
  static inline T erf_(T x) { return __builtin_erf##S(x); }                                       \
  static inline T erfc_(T x) { return __builtin_erfc##S(x); }                                     \
  static inline T sigmoid_(T x) { return (T)1 / ((T)1 + __builtin_exp##S(-x)); }                  \
  static inline T pow_(T x, T y) { return __builtin_pow##S(x, y); }
DC_LIBM(double, )
#undef DC_LIBM

}  // namespace dc
