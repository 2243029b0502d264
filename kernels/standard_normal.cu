// Standard normal draws with the bits of NumPy's Generator(Philox(key)).standard_normal(dtype=float32): the ziggurat of
// Marsaglia and Tsang (J. Stat. Software 2000) on the words of Philox4x64-10 (Salmon et al., SC 2011).
//
// A draw takes one word of the stream, or a few where it is rejected, so where the n-th one begins is known only when
// all before it are done. Hence two passes, one thread per word each. PASS 0 makes the draw that would begin at the
// word, and its length. PASS 1 marks where draws begin: a word that no draw in front of it could reach is certainly such
// a place, and from there to the next such place they are followed one by one, which is one step nearly everywhere.
//
// Defines: PASS, BLOCK
#include "scalar.cuh"

typedef long long Int;
typedef unsigned long long Word;

#if PASS == 0
// Draws beyond the last layer: their word as a number in [0, 1) with the sign of the draw. The host takes the logarithm.
enum { TAIL = 1 << 30 };

// 32 bits of the stream: halves of the four words of a block, the first block has counter 1.
__device__ inline unsigned word(Word at, Word k, Word l) {
  Word a = at / 8 + 1, b = 0, c = 0, d = 0;
  for (int round = 0; round < 10; ++round) {
    const Word low_0 = 0xD2E7470EE14C6C93ull * a, high_0 = __umul64hi(0xD2E7470EE14C6C93ull, a);
    const Word low_1 = 0xCA5A826395121157ull * c, high_1 = __umul64hi(0xCA5A826395121157ull, c);
    a = high_1 ^ b ^ k;
    c = high_0 ^ d ^ l;
    b = low_1;
    d = low_0;
    k += 0x9E3779B97F4A7C15ull;
    l += 0xBB67AE8584CAA73Bull;
  }
  const unsigned half = (unsigned)(at % 8);
  const Word found = half < 2 ? a : half < 4 ? b : half < 6 ? c : d;
  return (unsigned)(half % 2 ? found >> 32 : found);
}

__device__ inline float uniform(Word at, Word k, Word l) { return (float)(word(at, k, l) >> 8) * (1.0f / 16777216.0f); }

extern "C" __global__ void __launch_bounds__(BLOCK) standard_normal(
    float* values, int* lengths,                            // (n) the draw from each word on, and words that it takes
    Int n, Int key_0, Int key_1,
    const int* certain, const float* w, const float* f) {   // (256) of each layer: certain below, width, density
  const Int i = (Int)blockIdx.x * BLOCK + threadIdx.x;
  if (i >= n) return;
  const Word k = (Word)key_0, l = (Word)key_1;
  Word at = (Word)i;
  float x;
  int tail = 0;
  for (;;) {
    const unsigned r = word(at++, k, l), layer = r & 255u, magnitude = r >> 9;
    x = (float)magnitude * w[layer];
    if (r >> 8 & 1u) x = -x;
    if ((int)magnitude < certain[layer]) break;
    if (layer == 0) {
      float u, far, near;
      do {
        u = uniform(at++, k, l);
        far = -0.27366123732975828f * log1pf(-u);
        near = -log1pf(-uniform(at++, k, l));
      } while (!(near + near > far * far));
      x = magnitude >> 8 & 1u ? -u : u;
      tail = TAIL;
      break;
    }
    const float height = (f[layer - 1] - f[layer]) * uniform(at++, k, l) + f[layer];
    if (height < exp(-0.5 * x * x)) break;
  }
  values[i] = x;
  lengths[i] = (int)(at - (Word)i) | tail;
}
#else
extern "C" __global__ void __launch_bounds__(BLOCK) standard_normal(
    u8* begins,                             // (n) zeros; 1 where a draw begins
    const int* lengths, const Int* reach,   // (n) words of each draw; where the draws from here or before end at the latest
    Int n) {
  const Int i = (Int)blockIdx.x * BLOCK + threadIdx.x;
  if (i >= n || (i > 0 && reach[i - 1] > i)) return;
  Int at = i;
  do {
    begins[at] = 1;
    at += lengths[at];
  } while (at < n && reach[at - 1] > at);
}
#endif
