// The memory traffic of a step and next to none of its arithmetic, in place: the limits of bench/optimizers.py, which builds
// this with the C compiler of the machine. Each thread has a contiguous part.
#include <stddef.h>
#include <stdint.h>

// float32 AdamW: weight, gradient and two moments; all but the gradient are written.
void adamw(float* restrict p, const float* restrict g, float* restrict m, float* restrict v, size_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size_t i = 0; i < count; ++i) {
    m[i] = 0.5f * (m[i] + g[i]);
    v[i] = 0.5f * (v[i] + g[i]);
    p[i] = p[i] - 1e-3f * m[i] * v[i];
  }
}

// float32 RMSprop: weight, gradient and one moment.
void rmsprop(float* restrict p, const float* restrict g, float* restrict v, size_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size_t i = 0; i < count; ++i) {
    v[i] = 0.5f * (v[i] + g[i]);
    p[i] = p[i] - 1e-3f * v[i];
  }
}

// The whole mixed step: all 16-bit gradients for their norm; then gradients and three float32 arrays, which are written, and
// 16-bit parameters, which are only written. Returns what keeps the first loop from being left out.
uint64_t whole(float* restrict p, const uint16_t* restrict g, float* restrict m, float* restrict v, uint16_t* restrict out,
               size_t count, int threads) {
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
  for (size_t block = 0; block < count / 4096; ++block) {
    uint32_t part = 0;
    for (size_t i = block * 4096; i < (block + 1) * 4096; ++i) part += g[i];
    sum += part;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size_t i = 0; i < count; ++i) {
    m[i] = 0.5f * (m[i] + g[i]);
    v[i] = 0.5f * (v[i] + g[i]);
    p[i] = p[i] - 1e-3f * m[i] * v[i];
    out[i] = (uint16_t)(int)p[i];
  }
  return sum;
}
