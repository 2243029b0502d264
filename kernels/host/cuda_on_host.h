// Lets g++ compile a kernel's text and run it on the CPU, one thread after the other: for kernels without
// barriers, shared memory or atomics. HOST_ENTRY(kernel) exports `run`, which takes its arguments like cuLaunchKernel: one
// pointer to each. Threads run forwards or backwards; a kernel whose threads do not depend on each other does not care.
#pragma once
#include <math.h>
#include <string.h>

#include <utility>

#define __global__
#define __device__ static
#define __launch_bounds__(threads)

struct Index {
  unsigned x, y, z;
};
thread_local static Index threadIdx, blockIdx, blockDim, gridDim;  // of this caller: several may run one kernel at once

static inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

template <class... A, std::size_t... I>
static void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(args[I])...);
}

template <class... A>
static void run_all(void (*kernel)(A...), const unsigned* grid, unsigned block, void** args, bool backwards) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block, 1, 1};
  const unsigned long long total = 1ull * grid[0] * grid[1] * grid[2] * block;
  for (unsigned long long n = 0; n < total; ++n) {
    unsigned long long i = backwards ? total - 1 - n : n;
    threadIdx = {unsigned(i % block), 0, 0};
    i /= block;
    blockIdx = {unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]), unsigned(i / grid[0] / grid[1])};
    call(kernel, args, std::index_sequence_for<A...>());
  }
}

#define HOST_ENTRY(kernel)                                                                   \
  extern "C" void run(const unsigned* grid, unsigned block, void** args, int backwards) {    \
    run_all(kernel, grid, block, args, backwards != 0);                                      \
  }                                                                                          \
  extern "C" unsigned arguments() { return count_arguments(kernel); }

template <class... A>
static unsigned count_arguments(void (*)(A...)) {
  return sizeof...(A);
}
