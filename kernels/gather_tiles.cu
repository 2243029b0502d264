// Tiles of a volume as one batch, converted to the batch's type. One thread per voxel of a tile's (y, z) plane.
//
// Origins count in the padded volume. The volume itself may be unpadded: voxels in front of or behind it are then its
// mirror image at the faces (any distance, as often folded as need be) or zero, as tiles.pad would have stored them.
//
// Defines: SOURCE (f32, f16, bf16, u8), TARGET (f32, f16, bf16), BLOCK
#include "scalar.cuh"

typedef long long Int;

// Index on an axis of n voxels that stands for index i of the padded one; -1 for a zero.
__device__ inline Int source(Int i, Int n, Int mirror) {
  if (i >= 0 && i < n) return i;
  if (!mirror) return -1;
  i %= 2 * n;
  if (i < 0) i += 2 * n;
  return i < n ? i : 2 * n - 1 - i;
}

extern "C" __global__ void __launch_bounds__(BLOCK) gather_tiles(
    TARGET* out,                                       // (n, 1, px, py, pz)
    const SOURCE* volume, Int vx, Int vy, Int vz,      // (X, Y, Z) with strides in elements
    const int* origins,                                // (n, 3)
    Int n, Int px, Int py, Int pz, Int size_x, Int size_y, Int size_z,
    Int pad_x, Int pad_y, Int pad_z,                   // voxels of padding in front that the volume does not hold
    Int mirror) {
  const unsigned i = blockIdx.x * BLOCK + threadIdx.x;
  if (i >= py * pz) return;
  const Int y = i / (unsigned)pz, z = i % (unsigned)pz;
  for (Int tile = blockIdx.z; tile < n; tile += gridDim.z) {
    const int* origin = origins + 3 * tile;
    const Int from_y = source(origin[1] + y - pad_y, size_y, mirror);
    const Int from_z = source(origin[2] + z - pad_z, size_z, mirror);
    for (Int x = blockIdx.y; x < px; x += gridDim.y) {
      const Int from_x = source(origin[0] + x - pad_x, size_x, mirror);
      const bool inside = from_x >= 0 && from_y >= 0 && from_z >= 0;
      const float v = inside ? value(volume[from_x * vx + from_y * vy + from_z * vz]) : 0.0f;
      put(out + ((tile * px + x) * py + y) * pz + z, v);
    }
  }
}
