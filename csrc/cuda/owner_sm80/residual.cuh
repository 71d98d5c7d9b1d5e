// residual.cuh - h = h + A W^T in place, and the scales of the new rows.
//
// A is in scratch, so h may be overwritten pass by pass; the lane that reads an element of h here
// is the one that writes it. Un-normalised sums are stored, and the rms becomes the row's scale.
#pragma once
#include "product.cuh"

namespace owner_sm80 {

// h += acc in the columns of one pass; the sums of squares of these columns go to sums().
template <class P>
RX_DEVICE void add_to_h(Owner<P>& o, const float (&acc)[P::kTiles][P::kOutTiles][4], int pass) {
  const int block0 = (pass * kWarps + o.warp) * P::kOutTiles;
  const float* scale_s = o.scales();
#pragma unroll
  for (int i = 0; i < P::kTiles; i++) {
    if (i >= o.p.at.tiles) continue;
    ResidualTile<P> h(o, i, block0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (!o.is_stored(i, half)) continue;
      const int row = o.row(i, half);
      const float scale = scale_s[row];
      float sum = 0.f;
      if (h.inside) {
#pragma unroll
        for (int j = 0; j < P::kOutTiles; j++) {
          uint32_t& word = h.at(o, half, j);
          const float2 x = rx::unpack_bf16(word);
          const float lo = acc[i][j][half * 2] + x.x * scale;
          const float hi = acc[i][j][half * 2 + 1] + x.y * scale;
          sum += lo * lo + hi * hi;
          word = rx::pack_bf16(lo, hi);
        }
      }
      sum = sum_of_row(sum);
      float* sum_s = o.sums() + o.warp * P::kRows + row;
      if ((o.lane & 3) == 0) *sum_s = pass ? *sum_s + sum : sum;
    }
    h.store(o);
  }
}

// scale[row] = 1 / rms of the new row. All warps have added their columns by then.
template <class P>
RX_DEVICE void update_scales(Owner<P>& o, float eps) {
  __syncthreads();
  const int row = int(threadIdx.x);
  if (row < o.p.at.tiles * 16 && row < o.p.at.row_blocks * 8) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += o.sums()[w * P::kRows + row];
    o.scales()[row] = rsqrtf(sum * (1.f / P::kHidden) + eps);
  }
  __syncthreads();
}

// h = rms(h + s (A W^T + bias)), A of 16 * steps columns in scratch; W is a matrix of the block.
template <class P>
RX_DEVICE void residual_product(Owner<P>& o, const uint4* a_g, int steps, const RxBlock& b,
                                int matrix) {
  for (int pass = 0; pass < P::kOutPasses; pass++) {
    o.forget_addresses();
    float acc[P::kTiles][P::kOutTiles][4];
    clear(acc);
    multiply_scratch(o, acc, a_g, steps);
    add_bias<false>(o, acc, matrix, pass, b.residual_scale);
    add_to_h(o, acc, pass);
  }
  update_scales(o, b.eps);
}

}  // namespace owner_sm80
