// Gradients of weights: dW = dy^T x, summed in fp32 over all rows of a window.
//
// The rows of dy and x are laid out as the operands of one long product; a small slice gathers
// those of several calls first, because dW is a large matrix to read and write for a few rows.
// Every entry of dW is summed by one thread in one order: bits do not depend on their number.
#pragma once

#include "finishes.hpp"
#include "row_passes.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct WeightSum {
  using Act = typename Core::Act;

  Act* a;     // dy^T: [out, depth], `ld` elements between rows
  char* x;    // panels of x
  int depth;  // rows of all calls that are gathered

  // What is turned over may write up to 2 W elements past the depth.
  static int ld_of(int depth) { return round_up(depth, kAlign) + 2 * W; }
  static size_t a_size(int out, int depth) {
    return (size_t)(out + Core::kSpareRows) * ld_of(depth);
  }

  // Rows [first, first + count) of the depth: of dy [count, out] and x [count, cols].
  template <class X>
  void append(const Team& team, int first, int count, Mat<Act> dy, int out, X rows_of_x,
              int cols) const {
    const Range own = share(out, team.tid, team.size, kAlign);
    const int ld = ld_of(depth);
    for (int n = own.begin; n < own.end; n += kAlign)  // whole lines of dy
      turn(dy.at(0, n), dy.ld, count, a + (long)n * ld + first, ld);
    const Linear l = over_rows(depth, cols);
    const Range panels = share(l.panels(), team.tid, team.size);
    for (int panel = panels.begin; panel < panels.end; ++panel)
      RowPacker<Core>::run(l, x, panel, first, count, rows_of_x);
    if (first + count < depth) return;
    for (int n = own.begin; n < own.end; ++n)
      for (int i = depth; i < round_up(depth, kAlign); ++i) store_one(a + (long)n * ld + i, 0.f);
    for (int panel = panels.begin; panel < panels.end; ++panel)
      RowPacker<Core>::finish(l, x, panel);
  }

  // kAlign columns of dy as rows.
  static void turn(const float* dy, long dy_ld, int count, float* to, long ld) {
    for (int r = 0; r < count; r += W)
      for (int col = 0; col < kAlign; col += W) {
        V block[W];
        for (int j = 0; j < W; ++j)
          block[j] = r + j < count ? load(dy + (r + j) * dy_ld + col) : V{};
        transpose(block);
        for (int j = 0; j < W; ++j) store(to + (col + j) * ld + r, block[j]);
      }
  }
  static void turn(const bf16* dy, long dy_ld, int count, bf16* to, long ld) {
    turn_pairs(dy, dy_ld, count, kAlign, to, ld);
  }

  // gradient [rows, cols] (+)= dy^T x; of every `padded` rows of dy^T the first `real` count.
  void add_to(const Team& team, const typename Core::Scratch& scratch, float* gradient, int out,
              int padded, int real, int cols, bool fresh) const {
    const Linear l = over_rows(depth, cols);
    const Mat<Act> rows{a, ld_of(depth), kDepth};
    const Range own = share(out, team.tid, team.size);
    if (own.begin < own.end)
      Core::gemm(scratch, rows, own, l, x, {0, l.panels()}, x,
                 into_gradient(gradient, cols, padded, real, fresh, own.end));
  }
};

}  // namespace rx::cpu::RX_ISA
