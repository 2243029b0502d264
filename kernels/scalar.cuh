// Element types of arrays, and their values as floats: f32, f16, bf16, u8. Conversions are integer code, because
// cuda_fp16.h and cuda_bf16.h come with a toolkit only, and because the host build then runs the very same lines.
// Subnormal halves never become subnormal floats on the way: CuPy compiles with these flushed to zero.
typedef float f32;
typedef unsigned char u8;
struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

__device__ inline float value(f32 v) { return v; }
__device__ inline float value(u8 v) { return (float)v; }
__device__ inline float value(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ inline float value(f16 v) {
  const unsigned magnitude = v.bits & 0x7fffu, sign = (v.bits & 0x8000u) << 16;
  if (magnitude < 0x400u) {  // subnormal: units of 2^-24
    const float units = (float)magnitude * 5.9604644775390625e-8f;
    return __uint_as_float(__float_as_uint(units) | sign);
  }
  const unsigned rebias = magnitude < 0x7c00u ? 0x38000000u : 0x70000000u;  // else infinite or no number
  return __uint_as_float(((magnitude << 13) + rebias) | sign);
}

// To the nearest, ties to even, as torch and the hardware round.
__device__ inline void put(f32* out, float v) { *out = v; }
__device__ inline void put(bf16* out, float v) {
  const unsigned bits = __float_as_uint(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = (unsigned short)(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
__device__ inline void put(f16* out, float v) {
  const unsigned magnitude = __float_as_uint(v) & 0x7fffffffu, sign = __float_as_uint(v) >> 16 & 0x8000u;
  unsigned bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // from 65536 on; below, rounding carries into infinity
    bits = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: a float at 0.5 has units of 2^-24, adding rounds to them
    bits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    bits = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = (unsigned short)(bits | sign);
}
