// token_mlp.cuh - the transpositions around a token-MLP, whose products are those of any SwiGLU.
#pragma once
#include "states.cuh"

namespace grid_sm80 {

// Between two blocks, before a token-MLP: h^T <- rms(h)^T.
RX_DEVICE void turn(const RxRecursion& r, const Sizes& z, uint32_t* flags_g, uint32_t epoch,
                    float eps, float* sums_s) {
  unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
  for (int tile = blockIdx.x; tile < z.row_tiles; tile += gridDim.x) {
    Words x = {};
    Needs{flags_g, epoch, 1, kOne}.wait(tile);
    normalised_rows(x, reinterpret_cast<const uint4*>(scratch_g + z.h), tile, z, r.tokens, eps,
                    sums_s);
    store_rows(scratch_g, x, tile, z, true);
    arrive(flags_g + tile * kFlagStride, 1);
  }
}

// After the token product: h <- rms_over_T(h^T)^T. A warp takes 16 of the B * D rows of h^T.
RX_DEVICE void turn_back(const RxRecursion& r, const Sizes& z, const uint32_t* columns_g,
                         uint32_t epoch, uint32_t* samples_g, float eps) {
  unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
  uint4* h_g = reinterpret_cast<uint4*>(scratch_g + z.h);
  for (int row = rx::opaque(warp_id()) * gridDim.x + blockIdx.x; row < z.column_tiles;
       row += kWarps * gridDim.x) {
    const uint4* row_g =
        reinterpret_cast<const uint4*>(scratch_g + z.ht) + int64_t(row) * z.token_tiles * 32;
    Needs{columns_g, epoch, 1, kOne}.wait(row);
    uint4 x[kMaxKeyTiles];
    float squares[2] = {0.f, 0.f}, scale[2];
#pragma unroll
    for (int t = 0; t < kMaxKeyTiles; t++) {
      if (t >= z.token_tiles) break;
      x[t] = row_g[t * 32 + lane_id()];
      squares[0] += square_of(x[t].x) + square_of(x[t].z);
      squares[1] += square_of(x[t].y) + square_of(x[t].w);
    }
    row_scales(scale, squares, r.tokens, eps);
    const int64_t sample = z.by_width.of(row), column = z.by_width.rest(row);
#pragma unroll
    for (int t = 0; t < kMaxKeyTiles; t++) {
      if (t >= z.token_tiles) break;
      uint32_t y[4] = {x[t].x, x[t].y, x[t].z, x[t].w};
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const float2 v = rx::unpack_bf16(y[w]);
        y[w] = transpose_8x8(rx::pack_bf16(v.x * scale[w & 1], v.y * scale[w & 1]));
      }
      h_g[((sample * z.token_tiles + t) * z.width + column) * 32 + lane_id()] =
          make_uint4(y[0], y[2], y[1], y[3]);
    }
    arrive(samples_g + sample * kFlagStride, 1);
  }
}

}  // namespace grid_sm80
