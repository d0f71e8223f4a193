// The memory traffic of a float32 AdamW step and next to none of its arithmetic: four arrays read, three written, in place.
// Built by bench/optimizers.py with the machine's C compiler; each thread has a contiguous part.
#include <stddef.h>

void four_reads_three_writes(float* restrict p, const float* restrict g, float* restrict m, float* restrict v, size_t count,
                             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size_t i = 0; i < count; ++i) {
    m[i] = 0.5f * (m[i] + g[i]);
    v[i] = 0.5f * (v[i] + g[i]);
    p[i] = p[i] - 1e-3f * m[i] * v[i];
  }
}
