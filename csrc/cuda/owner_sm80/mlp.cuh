// mlp.cuh - the middle of a SwiGLU: silu(gate h) * (up h).
#pragma once
#include "product.cuh"

namespace owner_sm80 {

// One pass makes 128 columns of the middle: a warp holds 16 gate columns and the same 16 up
// columns, so the activation is local to a lane, and its 16 columns are one k16 column of
// fragments for the product with down.
template <class P>
RX_DEVICE void store_middle(Owner<P>& o, const float (&acc)[P::kTiles][4][4], int kt) {
  uint4* middle_g = o.middle_g();
  const float* scale_s = o.scales();
#pragma unroll
  for (int i = 0; i < P::kTiles; i++) {
    if (i >= o.p.at.tiles) break;
    uint32_t word[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float scale = scale_s[o.row(i, half)];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float *gate = &acc[i][j][half * 2], *up = &acc[i][j + 2][half * 2];
        word[j * 2 + half] = rx::pack_bf16(swiglu(gate[0] * scale, up[0] * scale),
                                           swiglu(gate[1] * scale, up[1] * scale));
      }
    }
    middle_g[o.fragment(kt, i)] = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// Returns the k16 columns of the middle, which is in scratch when all warps are done.
template <class P>
RX_DEVICE int gate_up(Owner<P>& o, const RxBlock& b) {
  const int passes = (b.inner + kMiddleChunk - 1) / kMiddleChunk;
  for (int pass = 0; pass < passes; pass++) {
    o.forget_addresses();
    float acc[P::kTiles][4][4];
    clear(acc);
    multiply_h(o, acc);
    store_middle(o, acc, pass * kWarps + o.warp);
  }
  return passes * kWarps;
}

}  // namespace owner_sm80
