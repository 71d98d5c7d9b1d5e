// A block in a window, backward: from the gradient of its out to those of its h and its weights.
//
// Stage by stage the reverse of block_forward.hpp; ws.sum holds the gradient of h all along. Each
// product with a weight is followed by the sum over rows that is the gradient of that weight.
#pragma once

#include "block_forward.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct BlockBackward {
  using State = typename Core::State;
  using Act = typename Core::Act;

  const Window& job;
  const Team& team;
  WindowSpace<Core>& ws;
  const BlockShape& shape;
  int samples;
  int number;      // of this block among all
  Range gathered;  // where this call's rows lie in the sums: [begin, begin + rows) of [0, end)
  const Recursion& rec = job.rec;
  const int rows = samples * rec.tokens, D = rec.hidden;
  const Range own = share(rows, team.tid, team.size);

  // ws.sum <- gradient of k.h (untouched by the mixer's input if `enters` is false).
  void run(const Kept<State>& k, bool enters) {
    const int inner = round_up(shape.inner, kAlign);
    norm_rows_backward(ws.sum, D, D, shape.eps, own, RowsOf<State>{k.out, D, D}, k.scale_out,
                       ws.narrow);
    team.sync();
    multiply(ws.narrow, rows, down, [&](const Linear&, int end) {
      return through_gate<Core>(k.gate_up, inner, ws.wide, ws.middle, end);
    });
    sum_rows(down, ws.narrow, RowsOfMat<Act>{ws.middle});
    sum_rows(gate_up, ws.wide, RowsOf<State>{k.mid, D, D});
    multiply(ws.wide, rows, gate_up, onto(ws.sum, D));
    if (shape.token_mlp) {
      unmix_tokens(k);
    } else {
      attend(k, enters);
    }
  }

  void attend(const Kept<State>& k, bool enters) {
    norm_rows_backward(ws.sum, D, D, shape.eps, own, RowsOf<State>{k.mid, D, D}, k.scale_mid,
                       ws.narrow);
    team.sync();
    sum_rows(mixer_out, ws.narrow, RowsOf<State>{k.mixed, D, D});
    multiply(ws.narrow, rows, mixer_out,
             [&](const Linear& l, int end) { return file_columns(l, ws.d_mixed, D, end); });
    const Range items = share(samples * shape.heads, team.tid, team.size);
    for (int item = items.begin; item < items.end; ++item) {
      const int head = item % shape.heads, row = item / shape.heads * rec.tokens;
      const int col = head * shape.head_dim;
      typename HeadOf<Core>::type one{ws.gemm,        ws.head, rec.tokens,
                                      shape.head_dim, rec.cos, rec.sin};
      one.backward(k.qkv + (long)row * 3 * D + col, D, k.mixed + (long)row * D + col,
                   k.lse + (long)row * shape.heads + head, shape.heads,
                   ws.d_mixed + (long)row * D + col, ws.wide, row, col);
    }
    team.clock->lap(Phase::attention);
    team.sync();
    sum_rows(mixer_in, ws.wide, RowsOf<State>{k.h, D, D});
    if (enters) multiply(ws.wide, rows, mixer_in, onto(ws.sum, D));
  }

  void unmix_tokens(const Kept<State>& k) {
    const int T = rec.tokens, padded = round_up(T, kAlign);
    const int inner = round_up(shape.token_inner, kAlign);
    const int most = token_samples(WindowSizes(rec));
    for (int first = 0; first < samples; first += most) {
      const int columns = imin(most, samples - first) * D;
      const Range mine = share(columns, team.tid, team.size, W);
      const long at = (long)first * T * D;
      turn_in(ws.sum + at, T, D, mine,
              [&](int row, int t, V v) { store(ws.token_sum + (long)row * padded + t, v); });
      turn_in(k.mid + at, T, D, mine,
              [&](int row, int t, V v) { store(ws.token_rows.at(row, t), v); });
      turn_in(k.h + at, T, D, mine, [&](int row, int t, V v) { store(ws.token_h.at(row, t), v); });
      norm_rows_backward(ws.token_sum, padded, T, shape.eps, mine, RowsOfMat<Act>{ws.token_rows},
                         k.scale_mid + (long)first * D, ws.token_rows);
      team.sync();
      multiply(ws.token_rows, columns, mixer_out, [&](const Linear&, int end) {
        return through_gate<Core>(k.token_gate_up + (long)first * D * 2 * inner, inner,
                                  ws.token_wide, ws.token_middle, end);
      });
      sum_rows(mixer_out, ws.token_rows, RowsOfMat<Act>{ws.token_middle}, columns);
      sum_rows(mixer_in, ws.token_wide, RowsOfMat<Act>{ws.token_h}, columns);
      multiply(ws.token_wide, columns, mixer_in, onto(ws.token_sum, padded));
      turn_out(ws.sum + at, T, D, mine,
               [&](int row, int t) { return load(ws.token_sum + (long)row * padded + t); });
      team.clock->lap(Phase::token_mlp);
      team.sync();
    }
  }

  auto onto(float* sum, long ld) const {
    return [=](const Linear&, int end) {
      return onto_rows([=](int row, int col) { return load(sum + row * ld + col); }, sum, ld, end);
    };
  }

  // dy W, the panels of W packed before or here.
  template <class Epilogue>
  void multiply(Mat<Act> dy, int count, BlockWeight which, Epilogue epilogue_of) const {
    const int at = number * slots_per_block + which;
    const Product p = product_of(shape, which);
    const char* packed = packs_at_use<Core>() ? nullptr : ws.backward[at];
    for (int begin = 0; begin < p.depth(); begin += p.template slice_depth<Core>()) {
      const Linear l = p.template slice<Core>(begin);
      const Mat<Act> columns{dy.at(0, begin), dy.ld, dy.chunk};
      const Shares own = shares_of(team, count, l);
      if (own.empty()) break;
      const auto epilogue = epilogue_of(l, own.rows.end);
      if constexpr (packs_at_use<Core>()) {
        const int most = panels_at_once<Core>(l);
        for (int first = own.panels.begin; first < own.panels.end; first += most) {
          const int some = imin(most, own.panels.end - first);
          for (int i = 0; i < some; ++i)
            pack_panel<Core>(p, begin, job.weights[at], first + i, ws.panels, i);
          Core::gemm(ws.gemm, columns, own.rows, l, ws.panels, {0, some}, ws.panels,
                     [=](int panel)
                         __attribute__((always_inline)) { return epilogue(first + panel); });
        }
      } else {
        Core::gemm(ws.gemm, columns, own.rows, l, packed, own.panels, packed, epilogue);
        packed += Core::linear_bytes(l);
      }
    }
    team.sync();
    team.clock->lap(which == down ? Phase::down : Phase::gate_up);
  }

  // Adds dy^T x to the gradient of a weight; `columns`: rows of the token MLP, not gathered.
  template <class X>
  void sum_rows(BlockWeight which, Mat<Act> dy, X x, int columns = 0) const {
    const int at = number * slots_per_block + which;
    float* const gradient = job.d_weights[at];
    if (!gradient) return;
    const Product p = product_of(shape, which);
    WeightSum<Core> sum = ws.sums[at];
    sum.depth = columns ? columns : gathered.end;
    const int first = columns ? 0 : gathered.begin, count = columns ? columns : rows;
    sum.append(team, first, count, dy, p.padded_out(), x, p.in);
    team.sync();
    if (first + count < sum.depth) return;
    sum.add_to(team, ws.gemm, gradient, p.padded_out(), p.padded_half(), p.half(), p.in,
               ws.fresh[at]);
    ws.fresh[at] = false;
    team.clock->lap(Phase::o);
    team.sync();
  }
};

}  // namespace rx::cpu::RX_ISA
