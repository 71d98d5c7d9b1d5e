// Epilogues of the window's products: epilogue(panel) gives finish(row, v0, v1), see epilogues.hpp.
// NOTE: a last tile runs over; what is not scratch is written only below `end` rows.
#pragma once

#include "../layout.hpp"

namespace rx::cpu::RX_ISA {

// The two rare stores are not inlined: every tile of every product would have a copy for each row.
template <class T>
static __attribute__((noinline)) void store_lanes_at(const Linear& l, int panel, int side, T* row,
                                                     V v) {
  float lane[W];
  store(lane, v);
  for (int i = 0; i < W; ++i) {
    const int col = l.source(panel, side, i);
    if (col >= 0) store_one(row + col, lane[i]);
  }
}

// out[row, col] <- product, columns in the weight's own order.
template <class T>
RX_INLINE auto file_columns(const Linear l, T* out, long ld, int end) {
  return [=](int panel) __attribute__((always_inline)) {
    const int c0 = l.source(panel, 0, 0), c1 = l.source(panel, 1, 0);
    const bool whole = c0 >= 0 && c1 >= 0 && l.source(panel, 0, W - 1) == c0 + W - 1 &&
                       l.source(panel, 1, W - 1) == c1 + W - 1;
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      if (row >= end) return;
      T* const p = out + row * ld;
      if (whole) {
        store(p + c0, v0);
        store(p + c1, v1);
      } else {
        store_lanes_at(l, panel, 0, p, v0);
        store_lanes_at(l, panel, 1, p, v1);
      }
    };
  };
}

// sum <- h + product
template <class H>
RX_INLINE auto onto_rows(H h, float* sum, long ld, int end) {
  return [=](int panel) __attribute__((always_inline)) {
    const int col = panel * kPanel;
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      if (row >= end) return;
      float* const p = sum + row * ld + col;
      store(p, h(row, col) + v0);
      store(p + W, h(row, col + W) + v1);
    };
  };
}

// product + bias, columns in the order of the panels (gate, then up, each padded), as far as a row
// of `ld` goes.
template <class T>
RX_INLINE auto keep_product(const Linear l, T* out, long ld, const float* bias, int end) {
  const bool pairs = l.columns == Columns::gate_up;
  const int second = pairs ? round_up(l.out / 2, kAlign) : W;
  return [=](int panel) __attribute__((always_inline)) {
    const int col = panel * (pairs ? W : kPanel);
    const V b0 = bias ? load(bias + col) : V{}, b1 = bias ? load(bias + col + second) : V{};
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      if (row >= end || col >= ld) return;
      T* const p = out + row * ld + col;
      store(p, v0 + b0);
      if (col + second < ld) store(p + second, v1 + b1);
    };
  };
}

// gate and up [row, 2 * width], kept as the states' type rounds them; middle <- silu(gate) * up
template <class Core, class T, class Act>
RX_INLINE auto keep_gated(T* gate_up, int width, Mat<Act> middle, int end) {
  return [=](int panel) __attribute__((always_inline)) {
    const int col = panel * W;
    T* const p = gate_up + col;
    return [=](int row, V gate, V up) __attribute__((always_inline)) {
      if (row >= end) return;
      const T* type = nullptr;
      gate = round_as(type, gate);
      up = round_as(type, up);
      store(p + (long)row * 2 * width, gate);
      store(p + (long)row * 2 * width + width, up);
      store(middle.at(row, col), swiglu<Core::kCoarse>(gate, up, 1.f));
    };
  };
}

// From d_middle: the gradients of gate and up, side by side, and the middle once more.
template <class Core, class T, class Act>
RX_INLINE auto through_gate(const T* gate_up, int width, Mat<Act> d_gate_up, Mat<Act> middle,
                            int end) {
  return [=](int panel) __attribute__((always_inline)) {
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      if (row >= end) return;
      for (int side = 0; side < 2; ++side) {
        const int col = panel * kPanel + side * W;
        const V d = side ? v1 : v0;
        const T* const p = gate_up + (long)row * 2 * width + col;
        const V gate = load(p), up = load(p + width);
        const V sigmoid = reciprocal<Core::kCoarse>(exp2<Core::kCoarse>(gate * -kLog2e) + 1.f);
        const V silu = gate * sigmoid;
        // slope of silu: sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
        const V slope = sigmoid + silu * (1.f - sigmoid);
        store(d_gate_up.at(row, col), d * up * slope);
        store(d_gate_up.at(row, width + col), d * silu);
        store(middle.at(row, col), silu * up);
      }
    };
  };
}

// gradient[row, col] (+)= product; rows [first, first + real) of the product are its rows 0...
static __attribute__((noinline)) void add_lanes(float* p, V v, int count, bool fresh) {
  float lane[W];
  store(lane, v);
  for (int i = 0; i < count; ++i) p[i] = fresh ? lane[i] : p[i] + lane[i];
}
RX_INLINE auto into_gradient(float* gradient, int cols, int padded, int real, bool fresh, int end) {
  return [=](int panel) __attribute__((always_inline)) {
    const int col = panel * kPanel;
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      if (row >= end || row % padded >= real) return;
      float* const p = gradient + (long)(row / padded * real + row % padded) * cols + col;
      if (col + kPanel <= cols) {
        store(p, fresh ? v0 : v0 + load(p));
        store(p + W, fresh ? v1 : v1 + load(p + W));
      } else {
        add_lanes(p, v0, imax(0, imin(W, cols - col)), fresh);
        add_lanes(p + W, v1, imax(0, imin(W, cols - col - W)), fresh);
      }
    };
  };
}

}  // namespace rx::cpu::RX_ISA
