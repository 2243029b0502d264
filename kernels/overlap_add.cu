// Windowed sum of overlapping tiles, for consecutive tiles of one slab of the plan's grid.
//
//   out[x, y, z] = sum_i wx_i[x] ( sum_j wy_j[y] ( sum_k wz_k[z] tile_ijk[x, y, z] ) )
//
// One thread per voxel of the slab and channel. It visits only the tiles that cover its voxel, in ascending order, and
// adds in this nesting: the order and the roundings of stitch.Stitcher, so the same bits, in any batches and any rerun.
// Nothing is atomic. Sums that this call does not finish wait in `row` (along z) and `slab` (along y).
//
// Defines: TILE (f32, f16, bf16), BLOCK
#include "scalar.cuh"

typedef long long Int;

extern "C" __global__ void __launch_bounds__(BLOCK) overlap_add(
    float* out, Int out_channel,        // (C, px, Y, Z) where the slab lies in the result; channels this far apart
    float* slab,                        // (C, px, Y, Z) sums over finished rows; may be out where px is all of X
    const float* row_in, float* row_out,  // (C, px, py, Z) sums over a row's tiles, by the call before and by this one;
                                          // two buffers, because another thread may still need what this one replaces
    const TILE* tiles, Int sn, Int sc, Int sx, Int sy, Int sz,  // (n, C, px, py, pz) with strides in elements
    const float* wx,                    // (px) weights of this slab
    const float* wy, const float* wz,   // (ny, py), (nz, pz) weights of every tile
    const int* oy, const int* oz,       // (ny), (nz) origins
    const int* span_y, const int* span_z,  // (Y, 2), (Z, 2) first and last tile that covers a voxel
    Int nz, Int channels, Int px, Int py, Int pz, Int size_y, Int size_z,
    Int from, Int to,                   // tiles of this call, numbers within the slab
    Int y_first, Int y_end,             // planes that they touch
    Int seen) {                         // planes x < seen hold sums already
  const unsigned i = blockIdx.x * BLOCK + threadIdx.x;
  if (i >= (y_end - y_first) * size_z) return;
  const int y = (int)(y_first + i / (unsigned)size_z), z = (int)(i % (unsigned)size_z);
  const int first_y = span_y[2 * y], last_y = span_y[2 * y + 1];
  const int first_z = span_z[2 * z], last_z = span_z[2 * z + 1];
  const int j_first = (int)(from / nz), j_last = (int)((to - 1) / nz);

  for (Int c = blockIdx.z; c < channels; c += gridDim.z) {
    for (Int x = blockIdx.y; x < px; x += gridDim.y) {
      const Int here = ((c * px + x) * size_y + y) * size_z + z;
      float sum_y = 0.0f;
      int finished = -1;  // last row whose sum along z is complete
      for (int j = max(first_y, j_first); j <= min(last_y, j_last); ++j) {
        int k = max(first_z, j == j_first ? (int)(from - j * nz) : 0);
        const int k_last = min(last_z, j == j_last ? (int)(to - 1 - j * nz) : (int)nz - 1);
        if (k > k_last) continue;
        const int y_tile = y - oy[j];
        const Int in_row = ((c * px + x) * py + y_tile) * size_z + z;
        const TILE* line = tiles + (j * nz - from) * sn + c * sc + x * sx + y_tile * sy;
        float sum_z = k > first_z ? row_in[in_row] : 0.0f;
        for (; k <= k_last; ++k) {
          const int z_tile = z - oz[k];
          const float v = value(line[k * sn + z_tile * sz]);
          sum_z = fmaf(v, wz[k * pz + z_tile], sum_z);
        }
        if (k_last < last_z) {
          row_out[in_row] = sum_z;
          continue;
        }
        if (j > first_y && finished < 0) sum_y = slab[here];
        sum_y = fmaf(sum_z, wy[j * py + y_tile], sum_y);
        finished = j;
      }
      if (finished < 0) continue;
      if (finished < last_y) {
        slab[here] = sum_y;
        continue;
      }
      float* result = out + c * out_channel + (x * size_y + y) * size_z + z;
      *result = fmaf(sum_y, wx[x], x < seen ? *result : 0.0f);
    }
  }
}
