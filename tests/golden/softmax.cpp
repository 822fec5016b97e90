// aten.softmax.int
// model.py:7
extern "C" int64_t k0_softmax(float* b0, float* b1, int64_t threads) {
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if(threads > 1)
  for (int64_t i0 = 0; i0 < 128; i0++) {
    float v0 = -__builtin_inff();
    int v0_nan = 0;
#pragma omp simd reduction(max:v0) reduction(|:v0_nan)
    for (int64_t i1 = 0; i1 < 1000; i1++) {
      const float t0 = b0[i0 * 1000 + i1];
      v0 = t0 > v0 ? t0 : v0;
      v0_nan |= t0 != t0;
    }
    const float t1 = v0_nan ? __builtin_nanf("") : v0;
    float v1 = 0.0f;
#pragma omp simd reduction(+:v1)
    for (int64_t i2 = 0; i2 < 1000; i2++) {
      const float t2 = b0[i0 * 1000 + i2];
      const float t3 = t2 - t1;
      const float t4 = dc::exp_(t3);
      v1 = v1 + t4;
    }
#pragma omp simd
    for (int64_t i3 = 0; i3 < 1000; i3++) {
      const float t5 = b0[i0 * 1000 + i3];
      const float t6 = t5 - t1;
      const float t7 = dc::exp_(t6);
      const float t8 = t7 / v1;
      b1[i0 * 1000 + i3] = t8;
    }
  }
  return 0;
}
