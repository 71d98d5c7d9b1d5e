// A row-major matrix as the weight of a product that sums over its rows: C = A X, X [depth, cols].
//
// This is how the backward multiplies by a weight as PyTorch holds it (dx = dy W), and how it sums
// over rows (dW = dy^T x). Each core has its own panels; those of gemm.hpp hold a row's columns.
#pragma once

#include "../layout.hpp"

namespace rx::cpu::RX_ISA {

// The first `count` of W values, then zeros. NOTE: not inlined, or every tile of every product has
// its copy for each row.
template <class T>
static __attribute__((noinline)) V load_part(const T* p, int count) {
  float lane[W] = {};
  for (int i = 0; i < count; ++i) lane[i] = to_float(p[i]);
  return load(lane);
}

// Rows of a matrix by vectors of columns.
template <class T>
struct RowsOf {
  const T* data;
  long ld;
  int cols;  // those that are real; reads past them give zeros
  V operator()(long row, int col) const {
    const T* p = data + row * ld + col;
    return col + W <= cols ? load(p) : load_part(p, cols - col);
  }
};
template <class T>
struct RowsOfMat {
  Mat<T> m;
  V operator()(long row, int col) const { return load(m.at(row, col)); }
};

// The product of depth `depth` with plain columns.
RX_INLINE Linear over_rows(int depth, int cols) { return {Columns::plain, depth, cols, {}}; }

// ---- panels of VectorCore: [depth][columns], fp32 as they are, bf16 with both sides in a lane
// ----

RX_INLINE void store_pair(float* p, V v0, V v1) {
  store(p, v0);
  store(p + W, v1);
}
RX_INLINE void store_pair(bf16* p, V v0, V v1) {
  const VU both = bf16_bits(v0) | bf16_bits(v1) << 16;
  memcpy(p, &both, sizeof both);
}

template <class Weight>
struct FlatPanels {
  static Weight* row(const Linear& l, void* weight, int panel, int k) {
    return (Weight*)weight + ((long)panel * l.in + k) * kPanel;
  }
  // Writes rows [0, count) of `x` at depth `first` of a panel.
  template <class Source>
  static void run(const Linear& l, void* weight, int panel, int first, int count, Source x) {
    const int col = panel * kPanel;
    for (int r = 0; r < count; ++r)
      store_pair(row(l, weight, panel, first + r), x(r, col), x(r, col + W));
  }
  // Once all rows are there: what the core reads beyond them.
  static void finish(const Linear&, void*, int) {}
};

// ---- panels of cores of bf16 instructions: [32 k][side][pair of k][column][k of the pair]
// --------

struct PairedPanels {
  static constexpr int kStep = 32;
  static bf16* pairs(const Linear& l, void* weight, int panel, int side, int k) {
    const long step = (long)panel * ceil_div(l.in, kStep) + k / kStep;
    return (bf16*)weight + ((step * 2 + side) * (kStep / 2) + k % kStep / 2) * 2 * W;
  }
  template <class Source>
  static void run(const Linear& l, void* weight, int panel, int first, int count, Source x) {
    for (int side = 0; side < 2; ++side) {
      const int col = panel * kPanel + side * W;
      for (int r = 0; r < count;) {
        const int k = first + r;
        bf16* const p = pairs(l, weight, panel, side, k);
        VU both;
        if (k % 2 == 0 && r + 1 < count) {
          both = bf16_bits(x(r, col)) | bf16_bits(x(r + 1, col)) << 16;
          r += 2;
        } else {  // the other half of the pair came or comes with another stretch of rows
          memcpy(&both, p, sizeof both);
          const VU bits = bf16_bits(x(r, col));
          both = k % 2 ? (both & 0xffffu) | bits << 16 : (both & 0xffff0000u) | bits;
          r += 1;
        }
        memcpy(p, &both, sizeof both);
      }
    }
  }
  static void finish(const Linear& l, void* weight, int panel) {
    run(l, weight, panel, l.in, round_up(l.in, kStep) - l.in, [](long, int) { return V{}; });
  }
};

template <class>
struct Exists {
  using type = void;
};
template <class Core, class = void>
struct RowPacker : PairedPanels {};
template <class Core>
struct RowPacker<Core, typename Exists<typename Core::Weight>::type>
    : FlatPanels<typename Core::Weight> {};

// A weight [out, in] as the forward multiplies by it, x W^T: its columns as rows, by W x W blocks.
template <class Core, class T>
RX_INLINE void pack_columns(const Linear& l, const T* data, int panel, void* out) {
  const RowsOf<T> rows{data, l.in, l.in};
  for (int k = 0; k < l.in; k += W) {
    V block[2][W];
    for (int side = 0; side < 2; ++side) {
      for (int lane = 0; lane < W; ++lane) {
        const int row = l.source(panel, side, lane);
        block[side][lane] = row < 0 ? V{} : rows(row, k);
      }
      transpose(block[side]);
    }
    RowPacker<Core>::run(l, out, panel, k, imin(W, l.in - k),
                         [&](long r, int col) { return block[col / W % 2][r]; });
  }
  RowPacker<Core>::finish(l, out, panel);
}

template <class Core>
void pack_linear(const Linear& l, const RawWeight& raw, void* out) {
  for (int panel = 0; panel < l.panels(); ++panel) {
    if (raw.dtype == Dtype::f32) {
      pack_columns<Core>(l, (const float*)raw.data, panel, out);
    } else {
      pack_columns<Core>(l, (const bf16*)raw.data, panel, out);
    }
  }
}

}  // namespace rx::cpu::RX_ISA
