// aten.sum.dim_IntList
// model.py:9
extern "C" int64_t k0_sum(float* b0, float* b1, int64_t threads) {
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if(threads > 1)
  for (int64_t strip0 = 0; strip0 < 1000; strip0 += 128) {
    const int64_t strip0_lanes = dc::min_index(1000 - strip0, 128);
    alignas(64) double v0_total[128];
#pragma omp simd
    for (int64_t l0 = 0; l0 < strip0_lanes; l0++) {
      v0_total[l0] = 0.0;
    }
    for (int64_t k0 = 0; k0 < 4096; k0 += 128) {
      alignas(64) float v0[128];
#pragma omp simd
      for (int64_t l0 = 0; l0 < strip0_lanes; l0++) {
        v0[l0] = 0.0f;
      }
      const int64_t k0_end = dc::min_index(k0 + 128, 4096);
      for (int64_t i2 = k0; i2 < k0_end; i2++) {
#pragma omp simd
        for (int64_t l0 = 0; l0 < strip0_lanes; l0++) {
          const int64_t i3 = strip0 + l0;
          const float t0 = b0[i2 * 1000 + i3];
          v0[l0] = v0[l0] + t0;
        }
      }
#pragma omp simd
      for (int64_t l0 = 0; l0 < strip0_lanes; l0++) {
        v0_total[l0] += v0[l0];
      }
    }
    alignas(64) float v1[128];
#pragma omp simd
    for (int64_t l0 = 0; l0 < strip0_lanes; l0++) {
      v1[l0] = (float)v0_total[l0];
    }
#pragma omp simd
    for (int64_t l0 = 0; l0 < strip0_lanes; l0++) {
      const int64_t i6 = strip0 + l0;
      b1[i6] = v1[l0];
    }
  }
  return 0;
}
