// A block in a window, forward: as block.hpp, but what its backward reads is kept, rounded to the
// states' type, and norms are passes of their own, because their results are among it.
#pragma once

#include "../pool.hpp"
#include "split.hpp"
#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct WindowBlock {
  using State = typename Core::State;
  using Act = typename Core::Act;

  const Recursion& rec;
  const Team& team;
  WindowSpace<Core>& ws;
  const PackedBlock& packed;
  int samples;
  float* sum;  // [rows, D], before a norm
  const BlockShape& shape = packed.shape;
  const int rows = samples * rec.tokens, D = rec.hidden;
  const Range own = share(rows, team.tid, team.size);

  // From k.h to k.out. `again`: k.out and its scale are there already.
  void forward(const Kept<State>& k, bool again = false) {
    if (shape.token_mlp) {
      mix_tokens(k);
    } else {
      attend(k);
    }
    gate(k);
    if (again) return;
    multiply(ws.middle, down, [&](const Linear&, int end) {
      return onto_rows(RowsOf<State>{k.mid, D, D}, sum, D, end);
    });
    norm_rows(sum, D, shape.eps, own, k.out, ws.narrow, k.scale_out);
    done(Phase::down);
  }

 private:
  void attend(const Kept<State>& k) {
    to_operand(k.h, D, own, ws.narrow);
    done(Phase::qkv);
    multiply(ws.narrow, mixer_in,
             [&](const Linear& l, int end) { return file_columns(l, k.qkv, 3 * D, end); });
    const Range items = share(samples * shape.heads, team.tid, team.size);
    for (int item = items.begin; item < items.end; ++item) {
      const int head = item % shape.heads, row = item / shape.heads * rec.tokens;
      const int col = head * shape.head_dim;
      typename HeadOf<Core>::type one{ws.gemm,        ws.head, rec.tokens,
                                      shape.head_dim, rec.cos, rec.sin};
      one.forward(k.qkv + (long)row * 3 * D + col, D, k.mixed + (long)row * D + col, ws.narrow, row,
                  col, k.lse + (long)row * shape.heads + head, shape.heads);
    }
    done(Phase::attention);
    multiply(ws.narrow, mixer_out, [&](const Linear&, int end) {
      return onto_rows(RowsOf<State>{k.h, D, D}, sum, D, end);
    });
    norm_rows(sum, D, shape.eps, own, k.mid, ws.narrow, k.scale_mid);
    done(Phase::o);
  }

  void mix_tokens(const Kept<State>& k) {
    const int T = rec.tokens, padded = round_up(T, kAlign);
    const int inner = round_up(shape.token_inner, kAlign);
    const int most = token_samples(WindowSizes(rec));
    for (int first = 0; first < samples; first += most) {
      const int columns = imin(most, samples - first) * D;
      const Range mine = share(columns, team.tid, team.size, W);
      const long at = (long)first * T * D;
      turn_in(k.h + at, T, D, mine,
              [&](int row, int t, V v) { store(ws.token_rows.at(row, t), v); });
      done(Phase::token_mlp);
      multiply_rows(ws.token_rows, columns, mixer_in, [&](const Linear&, int end) {
        return keep_gated<Core>(k.token_gate_up + (long)first * D * 2 * inner, inner,
                                ws.token_middle, end);
      });
      multiply_rows(ws.token_middle, columns, mixer_out, [&](const Linear&, int end) {
        return onto_rows(RowsOfMat<Act>{ws.token_rows}, ws.token_sum, padded, end);
      });
      float* const scale = k.scale_mid + (long)first * D;
      for (int row = mine.begin; row < mine.end; ++row)
        scale[row] = mean_square_scale(ws.token_sum + (long)row * padded, padded, T, shape.eps);
      turn_out(k.mid + at, T, D, mine, [&](int row, int t) {
        return load(ws.token_sum + (long)row * padded + t) * scale[row];
      });
      done(Phase::token_mlp);
    }
    to_operand(k.mid, D, own, ws.narrow);
    done(Phase::token_mlp);
  }

  // middle <- silu(gate) * up
  void gate(const Kept<State>& k) {
    multiply(ws.narrow, gate_up, [&](const Linear&, int end) {
      return keep_gated<Core>(k.gate_up, round_up(shape.inner, kAlign), ws.middle, end);
    });
    done(Phase::gate_up);
  }

  void done(Phase phase) const {
    team.clock->lap(phase);
    team.sync();
  }
  template <class Epilogue>
  void multiply(Mat<Act> a, BlockWeight which, Epilogue epilogue) const {
    multiply_rows(a, rows, which, epilogue);
  }
  template <class Epilogue>
  void multiply_rows(Mat<Act> a, int count, BlockWeight which, Epilogue epilogue) const {
    split_product<Core>(team, ws.gemm, a, count, linear_of(shape, which), packed.weight[which],
                        epilogue);
  }
};

}  // namespace rx::cpu::RX_ISA
