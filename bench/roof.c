// The memory traffic of a step and next to none of its arithmetic, in place: the limits of bench/optimizers.py, which builds
// this with the C compiler of the machine. Each thread has a contiguous part. And how far two threads are from each other.
#include <math.h>
#include <omp.h>
#include <stdatomic.h>
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

// Seconds that a cache line takes to another thread and back, at best. Some 50 ns: threads of one core, which share what it can
// read and write; 100: cores of one L3; 300 to 500: of two. NAN where there is one thread, or both are on one processor.
double round_trip(void) {
  enum { kTries = 20, kTurns = 50, kLooks = 1 << 16 };
  const double end = omp_get_wtime() + 0.1;
  static _Alignas(64) atomic_int line;
  double best = NAN;
  atomic_store(&line, 0);
#pragma omp parallel num_threads(2)
  {
    const int me = omp_get_thread_num();
    int going = omp_get_num_threads() == 2;
    for (int turn = 0; turn < kTries * kTurns && going;) {
      const double begin = omp_get_wtime();
      for (int last = turn + kTurns; turn < last && going; ++turn) {
        for (int looks = 1; atomic_load(&line) != 2 * turn + me && going; ++looks)
          if (looks % kLooks == 0) going = omp_get_wtime() < end;
        if (going) atomic_store(&line, 2 * turn + me + 1);
      }
      const double seconds = (omp_get_wtime() - begin) / kTurns;
      if (me == 0 && going && !(seconds >= best)) best = seconds;
    }
  }
  return best;
}
