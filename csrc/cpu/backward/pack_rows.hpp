// A row-major matrix as the weight of a product that sums over its rows: C = A X, X [depth, cols].
//
// This is how the backward multiplies by a weight as PyTorch holds it (dx = dy W), and how it sums
// over rows (dW = dy^T x). Each core has its own panels; those of gemm.hpp hold a row's columns.
#pragma once

#include "../layout.hpp"

namespace rx::cpu::RX_ISA {

// Rows of a matrix by vectors of columns.
template <class T>
struct RowsOf {
  const T* data;
  long ld;
  int cols;  // those that are real; reads past them give zeros
  V operator()(long row, int col) const {
    const T* p = data + row * ld + col;
    if (col + W <= cols) return load(p);
    float lane[W] = {};
    for (int i = 0; i < cols - col; ++i) lane[i] = to_float(p[i]);
    return load(lane);
  }
};
template <class T>
struct RowsOfMat {
  Mat<T> m;
  V operator()(long row, int col) const { return load(m.at(row, col)); }
};

// The product of depth `depth` with plain columns.
RX_INLINE Linear over_rows(int depth, int cols) { return {Columns::plain, depth, cols, {}}; }

// A panel of VectorCore: [depth][columns], fp32 as they are, bf16 with the two sides in one lane.
RX_INLINE void store_pair(float* p, V v0, V v1) {
  store(p, v0);
  store(p + W, v1);
}
RX_INLINE void store_pair(bf16* p, V v0, V v1) {
  const VU both = bf16_bits(v0) | bf16_bits(v1) << 16;
  memcpy(p, &both, sizeof both);
}

// Writes rows [0, count) of `x` at depth `first` of a panel.
template <class Core>
struct RowPacker {
  using Weight = typename Core::Weight;
  template <class Source>
  static void run(const Linear& l, void* weight, int panel, int first, int count, Source x) {
    Weight* p = (Weight*)weight + ((long)panel * l.in + first) * kPanel;
    const int col = panel * kPanel;
    for (int r = 0; r < count; ++r, p += kPanel) store_pair(p, x(r, col), x(r, col + W));
  }
  static void clear(const Linear& l, void* weight, int panel, int first, int count) {
    memset((Weight*)weight + ((long)panel * l.in + first) * kPanel, 0,
           (size_t)count * kPanel * sizeof(Weight));
  }
  // Once all rows are there: what the core reads beyond them.
  static void finish(const Linear&, void*, int) {}
};

}  // namespace rx::cpu::RX_ISA
