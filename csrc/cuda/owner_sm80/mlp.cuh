// mlp.cuh - the middle of a SwiGLU: silu(gate h) * (up h), or another activation.
#pragma once
#include "../activation.cuh"
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

// The same with another activation, in two passes, because all of them unrolled would be most of
// the kernel: gate and up go to scratch, rounded, and come back in a loop that stays rolled. A lane
// reads there what it wrote itself.
template <class P>
RX_DEVICE void store_activated(Owner<P>& o, const float (&acc)[P::kTiles][4][4], int kt,
                               int activation) {
  uint4 *gate_g = o.gate_g(), *middle_g = o.middle_g();
  const float* scale_s = o.scales();
#pragma unroll
  for (int i = 0; i < P::kTiles; i++) {
    if (i >= o.p.at.tiles) break;
    const float scale[2] = {scale_s[o.row(i, 0)], scale_s[o.row(i, 1)]};
    auto word = [&](int j, int half) {
      return rx::pack_bf16(acc[i][j][half * 2] * scale[half],
                           acc[i][j][half * 2 + 1] * scale[half]);
    };
    gate_g[o.fragment(o.warp, i)] = make_uint4(word(0, 0), word(0, 1), word(1, 0), word(1, 1));
    middle_g[o.fragment(kt, i)] = make_uint4(word(2, 0), word(2, 1), word(3, 0), word(3, 1));
  }
#pragma unroll 1
  for (int i = 0; i < o.p.at.tiles; i++) {
    uint4 gate = gate_g[o.fragment(o.warp, i)], up = middle_g[o.fragment(kt, i)];
#pragma unroll 1  // the words take turns in the first place
    for (int word = 0; word < 4; word++) {
      up = make_uint4(up.y, up.z, up.w, rx::activate_pair(gate.x, up.x, activation));
      gate = make_uint4(gate.y, gate.z, gate.w, gate.x);
    }
    middle_g[o.fragment(kt, i)] = up;
  }
}

// Returns the k16 columns of the middle, which is in scratch when all warps are done.
template <class P>
RX_DEVICE int gate_up(Owner<P>& o, const RxBlock& b) {
  const int passes = ceil_div(b.inner, kMiddleChunk);
  for (int pass = 0; pass < passes; pass++) {
    o.forget_addresses();
    float acc[P::kTiles][4][4];
    clear(acc);
    multiply_h(o, acc);
    add_bias<true>(o, acc, 2, pass);
    if (b.activation == kRxSilu)
      store_middle(o, acc, pass * kWarps + o.warp);
    else
      store_activated(o, acc, pass * kWarps + o.warp, b.activation);
  }
  return passes * kWarps;
}

}  // namespace owner_sm80
