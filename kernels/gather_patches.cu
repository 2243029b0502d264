// Training patches of resident volumes as one batch: network input, and every target channel at once (intensity, label
// as float, one-hot mask). Voxels outside a volume are zero (class 0 of the mask). One thread per voxel of a patch's
// (y, z) plane.
//
// Defines: IMAGE (f32, f16, bf16: type of the intensities), BLOCK
#include "scalar.cuh"

typedef long long Int;

// One patch of the pool, (10) integers: addresses of interpolated, hr, label, mask (X, Y, Z, contiguous), sizes, origin.
// Volumes of different subjects differ in size and place, hence addresses.
enum { INTERPOLATED, HR, LABEL, MASK, SIZE, ORIGIN = SIZE + 3, FIELDS = ORIGIN + 3 };

extern "C" __global__ void __launch_bounds__(BLOCK) gather_patches(
    float* x,            // (n, 1, p, p, p)
    float* y,            // (n, 2 + classes, p, p, p)
    const Int* patches,  // (count, FIELDS)
    const Int* indices,  // (n) patch + f count: mirrored along the axes in the bits 1, 2, 4 of f for x, y, z
    Int count, Int n, Int p, Int classes) {
  const unsigned i = blockIdx.x * BLOCK + threadIdx.x;
  if (i >= p * p) return;
  const Int at_1 = i / (unsigned)p, at_2 = i % (unsigned)p, voxels = p * p * p;
  for (Int b = blockIdx.z; b < n; b += gridDim.z) {
    const Int* patch = patches + indices[b] % count * FIELDS;
    const Int flips = indices[b] / count;
    const Int from_1 = patch[ORIGIN + 1] + (flips & 2 ? p - 1 - at_1 : at_1);
    const Int from_2 = patch[ORIGIN + 2] + (flips & 4 ? p - 1 - at_2 : at_2);
    for (Int at_0 = blockIdx.y; at_0 < p; at_0 += gridDim.y) {
      const Int from_0 = patch[ORIGIN] + (flips & 1 ? p - 1 - at_0 : at_0);
      const bool inside = from_0 >= 0 && from_0 < patch[SIZE] && from_1 >= 0 && from_1 < patch[SIZE + 1] &&
                          from_2 >= 0 && from_2 < patch[SIZE + 2];
      const Int from = (from_0 * patch[SIZE + 1] + from_1) * patch[SIZE + 2] + from_2;
      const Int to = (at_0 * p + at_1) * p + at_2;
      float* target = y + b * (2 + classes) * voxels + to;
      x[b * voxels + to] = inside ? value(((const IMAGE*)patch[INTERPOLATED])[from]) : 0.0f;
      target[0] = inside ? value(((const IMAGE*)patch[HR])[from]) : 0.0f;
      target[voxels] = inside ? value(((const u8*)patch[LABEL])[from]) : 0.0f;
      if (classes > 0) {
        const Int found = inside ? ((const u8*)patch[MASK])[from] : 0;
        for (Int c = 0; c < classes; ++c) target[(2 + c) * voxels] = found == c ? 1.0f : 0.0f;
      }
    }
  }
}
