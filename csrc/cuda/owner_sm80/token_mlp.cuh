// token_mlp.cuh - h' = h^T [D, T];  h' = rms(h' + down(silu(gate h') * up h')) over T;  h = h'^T.
//
// Here the warps split the rows, which are the D columns of h: a warp owns 16 or 32 of them from
// the first product to the norm, so the middle stays in its registers, h is updated in place, and
// the only barriers are those of the shared ring. The price is that every warp reads every weight,
// of which there are few (T is at most 128).
#pragma once
#include "../activation.cuh"
#include "states.cuh"

namespace owner_sm80 {

// h *= scale, and the scales become 1: here the norm's factor varies along k, not along the rows.
template <class P>
RX_DEVICE void apply_scales(Owner<P>& o) {
  for_each_vector(o, [&](int row, uint32_t at, int column) {
    const uint4 x = load_vector(o, row, at, column);
    store_vector(o, row, at, column, rx::scale_rounded(x, o.scales()[row]));
  });
  reset_scales(o);
}

// Fragments of h^T: 16 columns of h from tile `d` by the 16 tokens of row tile i.
template <class P>
RX_DEVICE void load_transposed(Owner<P>& o, const TokenColumns<P>& h, uint32_t (&a)[4], int d,
                               int i) {
  rx::ldmatrix_x4_trans(a, o.row_address(h.panel, i, o.lane >> 4, TokenColumns<P>::kBlocks,
                                         2 * d + (o.lane >> 3 & 1)));
}

RX_DEVICE void load_fragment(uint32_t (&w)[4], const unsigned char* slot, int fragment, int lane) {
  const uint4 v = *reinterpret_cast<const uint4*>(slot + fragment * kFragment + lane * 16);
  w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
}

// act(gate) * up. The words take turns in the first place, in a loop that stays rolled.
template <int kRowTiles>
RX_DEVICE void activate_words(const float (&acc)[kRowTiles][4][4], uint32_t (&middle)[kRowTiles][4],
                              int activation) {
  constexpr int kWords = kRowTiles * 4;
  uint32_t gate[kWords], up[kWords];
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    const int m = i / 4, n = i % 4 / 2, e = i % 2 * 2;
    gate[i] = rx::pack_bf16(acc[m][n][e], acc[m][n][e + 1]);
    up[i] = rx::pack_bf16(acc[m][n + 2][e], acc[m][n + 2][e + 1]);
  }
#pragma unroll 1
  for (int word = 0; word < kWords; word++) {
    const uint32_t first = rx::activate_pair(gate[0], up[0], activation);
#pragma unroll
    for (int i = 0; i + 1 < kWords; i++) gate[i] = gate[i + 1], up[i] = up[i + 1];
    up[kWords - 1] = first;
  }
#pragma unroll
  for (int i = 0; i < kWords; i++) middle[i / 4][i % 4] = up[i];
}

// 16 columns of the middle, the `step`-th, as fragments of the product with down.
template <class P, int kRowTiles>
RX_DEVICE void token_middle(Owner<P>& o, const TokenColumns<P>& h, uint32_t (&middle)[kRowTiles][4],
                            const unsigned char* slot, int step, int activation) {
  float acc[kRowTiles][4][4];  // two column tiles of gate, two of up
  clear(acc);
  for (int k = 0; k < o.p.at.sample_tiles; k++) {
    uint32_t gate[4], up[4];
    load_fragment(gate, slot, 2 * k, o.lane);
    load_fragment(up, slot, 2 * k + 1, o.lane);
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      uint32_t a[4];
      load_transposed(o, h, a, h.d0 + m, h.first + k);
      rx::mma_m16n16k16(acc[m][0], acc[m][1], a, gate);
      rx::mma_m16n16k16(acc[m][2], acc[m][3], a, up);
    }
  }
  add_columns(acc, o.bias_g(0, step * 4), 1.f, 4);
  if (activation != kRxSilu) return activate_words(acc, middle, activation);
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float *gate = &acc[m][e >> 1][e % 2 * 2], *up = &acc[m][2 + (e >> 1)][e % 2 * 2];
      middle[m][e] = rx::pack_bf16(swiglu(gate[0], up[0]), swiglu(gate[1], up[1]));
    }
}

// Adds h^T, divides by the rms over the tokens and writes back: 16 columns of h.
template <class P>
RX_DEVICE void store_normalised(Owner<P>& o, const TokenColumns<P>& h,
                                float (&out)[2 * P::kTiles][4], int d, float eps) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int column = half * 8 + (o.lane >> 2);  // of this column tile pair
    auto at = [&](int n, int e) {                 // element (token, column) of h
      const uint32_t block = uint32_t((2 * h.first + n) * TokenColumns<P>::kBlocks + 2 * d + half);
      const uint32_t token = uint32_t((o.lane & 3) * 2 + e);
      return reinterpret_cast<bf16*>(o.smem + h.panel + block * kMatrix + token * 16 +
                                     uint32_t(column & 7) * 2);
    };
    auto inside = [&](int n, int e) { return n * 8 + (o.lane & 3) * 2 + e < o.p.r.tokens; };
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < 2 * P::kTiles; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (!inside(n, e)) continue;
        float& x = out[n][half * 2 + e];
        x += rx::unpack_bf16(*at(n, e)).x;
        sum += x * x;
      }
    const float scale = rsqrtf(sum_of_row(sum) / float(o.p.r.tokens) + eps);
#pragma unroll
    for (int n = 0; n < 2 * P::kTiles; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (inside(n, e)) *at(n, e) = bf16(rx::pack_bf16(out[n][half * 2 + e] * scale, 0.f));
  }
}

// The whole token MLP of the column tiles of one pass, for one sample.
template <class P>
RX_DEVICE void token_pass(Owner<P>& o, const RxBlock& b, int pass, int first) {
  constexpr int kRowTiles = token_row_tiles(P::kHidden, P::kTiles);
  o.forget_addresses();
  const TokenColumns<P> h(o, pass, first);
  // A warp without columns keeps the ring company.
  const bool active = h.column_tile * 2 < P::kColumnBlocks;
  if (active) h.copy_in(o);  // the ring's barrier follows
  const int chunks = (b.token_inner + kTokenChunk - 1) / kTokenChunk;
  float out[kRowTiles][2 * P::kTiles][4];
  clear(out);
  for (int chunk = 0; chunk < chunks; chunk++) {
    uint32_t middle[2][kRowTiles][4];
#pragma unroll
    for (int sub = 0; sub < 2; sub++) {
      const unsigned char* slot = o.smem + o.ring.acquire_shared();
      if (active)
        token_middle<P, kRowTiles>(o, h, middle[sub], slot, chunk * 2 + sub, b.activation);
    }
    const unsigned char* slot = o.smem + o.ring.acquire_shared();
    if (!active) continue;
#pragma unroll
    for (int n = 0; n < P::kTiles; n++) {
      if (n >= o.p.at.sample_tiles) continue;
#pragma unroll
      for (int sub = 0; sub < 2; sub++) {
        uint32_t down[4];
        load_fragment(down, slot, 2 * n + sub, o.lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; m++)
          rx::mma_m16n16k16(out[m][2 * n], out[m][2 * n + 1], middle[sub][m], down);
      }
    }
  }
  if (!active) return;
  add_columns(out, o.bias_g(1, 0), b.residual_scale, 2 * o.p.at.sample_tiles);
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) store_normalised<P>(o, h, out[m], h.d0 + m, b.eps);
  h.copy_out(o);
}

template <class P>
RX_DEVICE void token_mlp(Owner<P>& o, const RxBlock& b) {
  if constexpr (!P::kInScratch) apply_scales(o);
  for (int sample = 0; sample < o.p.at.samples; sample++)
    for (int pass = 0; pass < token_passes(P::kHidden, P::kTiles); pass++)
      token_pass(o, b, pass, sample * o.p.at.sample_tiles);
  o.ring.release_shared();
  if constexpr (P::kInScratch) reset_scales(o);  // they are applied on the way in
}

}  // namespace owner_sm80
