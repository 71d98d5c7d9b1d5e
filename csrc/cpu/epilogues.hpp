// What happens to a product while it is still in registers: epilogue(panel) gives
// finish(row, v0, v1), called once for each row. Plain values in the closures, no references.
#pragma once

#include "layout.hpp"

namespace rx::cpu::RX_ISA {

// out <- silu(gate) * up; scale = null: the input rows were normalised.
template <class Core, class Act>
RX_INLINE auto gated(Mat<Act> out, const float* scale) {
  return [=](int panel) __attribute__((always_inline)) {
    Act* const p = out.at(0, panel * W);
    const int ld = out.ld;
    return [=](int row, V gate, V up) __attribute__((always_inline)) {
      store(p + (long)row * ld, swiglu<Core::kCoarse>(gate, up, scale ? scale[row] : 1.f));
    };
  };
}

// out <- h * scale + product, and the row's partial sums of squares: each kSumColumns columns have
// their own, so that the result does not depend on how columns are split over threads.
template <class Core, class Act>
RX_INLINE auto residual(Mat<Act> h, const float* scale, Mat<Act> out, float* sums, int rows_pad) {
  return [=](int panel) __attribute__((always_inline)) {
    const int col = panel * kPanel, h_ld = h.ld, out_ld = out.ld;
    const Act* const x = h.at(0, col);
    Act* const p = out.at(0, col);
    float* const sum = sums + (long)(col / kSumColumns) * rows_pad * W;
    const bool first = col % kSumColumns == 0;
    return [=](int row, V v0, V v1) __attribute__((always_inline)) {
      const V by = splat(scale ? scale[row] : 1.f);
      v0 = fma(load(x + (long)row * h_ld), by, v0);
      v1 = fma(load(x + (long)row * h_ld + W), by, v1);
      const V squares = fma(v0, v0, v1 * v1);
      store(sum + (long)row * W, first ? squares : squares + load(sum + (long)row * W));
      store(p + (long)row * out_ld, v0);
      store(p + (long)row * out_ld + W, v1);
    };
  };
}

// scale = rsqrt(mean(y^2) + eps) from the partial sums of `width` columns.
RX_INLINE void sum_to_scale(const float* sums, int rows_pad, int rows, int width, float eps,
                            float* scale) {
  const int parts = ceil_div(round_up(width, kAlign), kSumColumns);
  for (int row = 0; row < rows; ++row) {
    V total = load(sums + (long)row * W);
    for (int part = 1; part < parts; ++part)
      total += load(sums + ((long)part * rows_pad + row) * W);
    scale[row] = 1.f / sqrtf(reduce_add(total) / width + eps);
  }
}

}  // namespace rx::cpu::RX_ISA
