// The epilogue of the qkv product: scale, rotate, and file each head's rows where attention
// reads them. Q and K panels hold columns (j, j + head_dim/2), so the rotation is local.
#pragma once

#include "layout.hpp"

namespace rx::cpu::RX_ISA {

// Where the heads of a group go, and what turns them. q, k, v: [heads][rows_pad][stride].
template <class Act>
struct HeadRows {
  Act *q, *k, *v;
  long head_size;          // elements between heads
  int stride;              // elements between rows
  const float* scale_q;    // [rows]: the row's rms factor / sqrt(head_dim) * log2 e
  const float* scale;      // [rows]
  const float *cos, *sin;  // [T, head_dim] or null
  const int* position;     // [rows]: token of the row
};

// Heads whose half does not fill whole vectors (16, 48, 80, 112 wide at W = 16): lane by lane.
template <class Act>
static __attribute__((noinline)) void store_lanes(Act* out, const HeadRows<Act>& to, int half,
                                                  int first, const float* low, const float* high,
                                                  const float* cos, const float* sin) {
  for (int lane = 0; lane < W; ++lane) {
    const int head = (first + lane) / half, col = (first + lane) % half;
    float a = low[lane], b = high[lane];
    if (cos) {
      const float turned = a * cos[col] - b * sin[col];
      b = b * cos[col + half] + a * sin[col + half];
      a = turned;
    }
    store_one(out + head * to.head_size + col, a);
    store_one(out + head * to.head_size + col + half, b);
  }
}

template <class Act>
RX_INLINE auto file_heads(HeadRows<Act> to, Heads heads) {
  return [=](int panel) __attribute__((always_inline)) {
    const int index = panel % heads.unit_panels(), part = index / heads.pairs();
    const int unit = panel / heads.unit_panels() * heads.per_unit();  // its first head
    const int half = heads.half(), dim = heads.dim;
    // Q and K: two vectors half a head apart; V: two neighbours, perhaps of two heads.
    const int c0 = index % heads.pairs() * (part == 2 ? kPanel : W), c1 = c0 + W;
    const int head0 = unit + (part == 2 ? c0 / dim : c0 / half);
    const int head1 = part == 2 ? unit + c1 / dim : head0;
    const int col0 = part == 2 ? c0 % dim : c0 % half;
    const int col1 = part == 2 ? c1 % dim : col0 + half;
    Act* const base = part == 0 ? to.q : part == 1 ? to.k : to.v;
    Act* const out0 = base + head0 * to.head_size + col0;
    Act* const out1 = base + head1 * to.head_size + col1;
    const float* const scale = part == 0 ? to.scale_q : to.scale;
    const bool rotate = part < 2 && to.cos, whole = part == 2 || half % W == 0;
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      const long at = (long)row * to.stride;
      v0 *= splat(scale[row]);
      v1 *= splat(scale[row]);
      if (!whole) {
        float low[W], high[W];
        store(low, v0);
        store(high, v1);
        const long angle = (long)to.position[row] * dim;
        store_lanes(base + unit * to.head_size + at, to, half, c0, low, high,
                    rotate ? to.cos + angle : nullptr, rotate ? to.sin + angle : nullptr);
        return;
      }
      if (rotate) {
        const float* const c = to.cos + (long)to.position[row] * dim + col0;
        const float* const s = to.sin + (long)to.position[row] * dim + col0;
        const V turned = v0 * load(c) - v1 * load(s);
        v1 = v1 * load(c + half) + v0 * load(s + half);
        v0 = turned;
      }
      store(out0 + at, v0);
      store(out1 + at, v1);
    };
  };
}

}  // namespace rx::cpu::RX_ISA
