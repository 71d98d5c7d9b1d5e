// A variant's block in a window, forward: as variant_block.hpp, but products are kept as they are,
// rounded to the states' type, and all between them is passes of fp32, which the backward repeats.
#pragma once

#include "split.hpp"
#include "variant_passes.hpp"
#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct VariantForward {
  using State = typename Core::State;
  using Act = typename Core::Act;
  static constexpr bool kCoarse = Core::kCoarse;

  const Recursion& rec;
  const Team& team;
  WindowSpace<Core>& ws;
  const PackedBlock& packed;
  int samples;
  Beside beside;
  const BlockShape& shape = packed.shape;
  const Variant& v = shape.variant;
  const float* const* vector = packed.vector;
  VariantSpace<Core>& own = ws.variant;
  const int rows = samples * rec.tokens, D = rec.hidden, T = rec.tokens;
  const int wide = shape.heads * shape.head_dim, padded_T = round_up(T, kAlign);
  const bool in_lines = v.axial[0] && v.axial[2] == 0;

  // From k.h to k.out. `again`: k.out is there already.
  void forward(const Kept<State>& k, bool again = false) {
    if (v.kind == Kind::norm) {
      if (!again) norm_alone(k);
      return;
    }
    if (v.kind != Kind::none) {
      if (shape.token_mlp && !v.token_norm_hidden) {
        mix_token_rows(k);
      } else {
        enter(1, k.h, rows, D, D, own.normed);
        shape.token_mlp ? mix_tokens(k) : attend(k);
        leave(1, k.h, k.y1, k.mid, rows, D, D);
      }
      done(Phase::o);
    }
    enter(2, k.mid, rows, D, D, own.normed);
    run_mlp(mlp(k), own.normed, k.y2, D);
    if (!again) leave(2, k.mid, k.y2, k.out, rows, D, D);
    done(Phase::down);
  }

  // ---- norms and sums -------------------------------------------------------------------------

  void norm_alone(const Kept<State>& k) {
    const RowNorm norm = norm_of(packed, v.norm, D, norm1);
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      for (int col = 0; col < D; col += W) store(own.row + col, load(k.h + (long)row * D + col));
      norm.apply(own.row);
      for (int col = 0; col < D; col += W) store(k.out + (long)row * D + col, load(own.row + col));
    }
    done(Phase::down);
  }

  // to <- what sublayer `number` reads: x [rows, ld], or its norm.
  template <class X>
  void enter(int number, const X* x, int rows, int width, int ld, Mat<Act> to) const {
    const RowNorm norm = end_of(packed, number, width).norm;
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      for (int col = 0; col < ld; col += W)
        store(own.row + col, within(load(x + (long)row * ld + col), col, width));
      if (v.pre_normed()) norm.apply(own.row);
      for (int col = 0; col < ld; col += W) store(to.at(row, col), load(own.row + col));
    }
    team.sync();
  }

  // Sublayer `number`; rows of h, or columns of it.
  SublayerEnd end(int number, int width) const {
    return end_of(packed, number, width, drops_of(rec, v, beside, number));
  }

  // out <- x and y, the result of a sublayer, with its norms and scale; `first` not -1: rows are
  // columns of h from there on.
  template <class X, class Y, class Out>
  void leave(int number, const X* x, const Y* y, Out* out, int rows, int width, int ld,
             long first = -1) const {
    const SublayerEnd end = this->end(number, width);
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      const long at = (long)row * ld;
      for (int col = 0; col < ld; col += W)
        store(own.row + col, within(load(y + at + col), col, width));
      end.finish(
          own.row, [=](int col) { return load(x + at + col); }, row + (first < 0 ? 0 : first),
          first >= 0);
      for (int col = 0; col < ld; col += W) store(out + at + col, load(own.row + col));
    }
    team.sync();
  }

  // ---- attention ------------------------------------------------------------------------------

  void attend(const Kept<State>& k) {
    multiply(own.normed, rows, mixer_in, k.qkv, linear_of(shape, mixer_in).out);
    if (v.attn_gate) multiply(own.normed, rows, attn_gate, k.gate, wide);
    find_lines();
    if (own_heads(shape)) form_heads(k);
    done(Phase::qkv);
    each_head([&](auto& head, long row, int number, int col, auto seen) {
      head.forward(k.heads + row * 3 * wide + col, wide, k.mixed + row * wide + col, own.mixed,
                   (int)row, col, k.lse + row * shape.heads + number, shape.heads, seen);
    });
    form_mixed(k);
    done(Phase::attention);
    multiply(own.mixed, rows, mixer_out, k.y1, D);
  }

  void find_lines() const {
    if (in_lines) find_places(v.axial[0], v.axial[1], rows, rows, own.place);
  }
  long line_of(int row) const { return in_lines ? own.place[row] : row; }

  // heads [R, 3 H dim], in the order of the lines <- q and k with their norms, k and v for each of
  // the heads that share them.
  void form_heads(const Kept<State>& k) const {
    const int dim = shape.head_dim, ld = linear_of(shape, mixer_in).out;
    const int group = shape.heads / kv_heads(shape);
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      State* const to = k.heads + line_of(row) * 3 * wide;
      for (int number = 0; number < 3 * shape.heads; ++number) {
        const int part = number / shape.heads, head = number % shape.heads;
        const int kv = shape.heads + (part - 1) * kv_heads(shape) + head / group;
        const State* const from = k.qkv + (long)row * ld + (part ? kv : head) * dim;
        for (int d = 0; d < dim; d += W) store(own.row + d, load(from + d));
        if (part < 2 && v.qk_norm != Norm::none)
          norm_of(packed, v.qk_norm, dim, part ? k_norm : q_norm).apply(own.row);
        for (int d = 0; d < dim; d += W) store(to + number * dim + d, load(own.row + d));
      }
    }
    team.sync();
  }

  // work(head of a line, its first row, its number and column, what a query sees)
  template <class Work>
  void each_head(Work work) {
    const int line = v.line(T), heads = shape.heads;
    const Range items = share(rows / line * heads, team.tid, team.size);
    for (int item = items.begin; item < items.end; ++item) {
      const int number = item % heads, col = number * shape.head_dim;
      const long row = (long)(item / heads) * line;
      typename HeadOf<Core>::type head{ws.gemm, ws.head, line, shape.head_dim, rec.cos, rec.sin};
      const Sees sees{v.causal, v.prefix, v.window, seen_keys(rec, v, beside, row, own.keys)};
      sees.all() ? work(head, row, number, col, SeesAll{}) : work(head, row, number, col, sees);
    }
    team.sync();
  }

  V gated_mixed(const Kept<State>& k, int row, int col) const {
    const V x = load(k.mixed + line_of(row) * wide + col);
    return v.attn_gate ? x * sigmoid<kCoarse>(load(k.gate + (long)row * wide + col)) : x;
  }

  // mixed <- what `o` reads
  void form_mixed(const Kept<State>& k) const {
    const RowNorm norm = norm_of(packed, v.attn_norm, wide, attn_norm);
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      for (int col = 0; col < wide; col += W) store(own.row + col, gated_mixed(k, row, col));
      for (int col = wide; col < round_up(wide, kAlign); col += W) store(own.row + col, V{});
      if (v.attn_norm != Norm::none) norm.apply(own.row);
      store_row(own.row, wide, own.mixed, row);
    }
    team.sync();
  }

  // ---- MLPs -----------------------------------------------------------------------------------

  InnerMlp<Core> mlp(const Kept<State>& k) const {
    return {
        gate_up,    down,      rows,      shape.inner, v.inner_norm != Norm::none ? inner_norm : -1,
        v.conv > 0, k.gate_up, ws.middle, ws.wide};
  }
  // Over T, of the columns of h from `first` on.
  InnerMlp<Core> token_mlp(const Kept<State>& k, long first, int columns) const {
    const int ld = (v.gated ? 2 : 1) * round_up(shape.token_inner, kAlign);
    return {mixer_in,
            mixer_out,
            columns,
            shape.token_inner,
            v.inner_norm_tokens && v.inner_norm != Norm::none ? t_inner_norm : -1,
            false,
            k.token_gate_up + first * ld,
            ws.token_middle,
            ws.token_wide};
  }

  template <class Y>
  void run_mlp(const InnerMlp<Core>& m, Mat<Act> from, Y* y, int ld) const {
    multiply(from, m.rows, m.in, m.pairs, (v.gated ? 2 : 1) * m.padded());
    form_middle(m);
    multiply(m.middle, m.rows, m.out, y, ld);
  }

  // Gate (of `half` 0) or up, after their convolution if there is one.
  V pair(const InnerMlp<Core>& m, int half, int row, int col) const {
    const long at = (long)row * (v.gated ? 2 : 1) * m.padded() + half * m.padded() + col;
    return m.convolved && v.conv_of_gate_up ? load(own.pairs + at) : load(m.pairs + at);
  }
  // What an inner norm norms: gate * up if it is of the product.
  V inside(const InnerMlp<Core>& m, int row, int col) const {
    const V gate = pair(m, 0, row, col);
    if (m.norm >= 0 && v.norm_of_product) return gate * pair(m, 1, row, col);
    const V act = activated<kCoarse>(v.activation, gate);
    return v.gated ? act * pair(m, 1, row, col) : act;
  }
  ConvolutionBackward convolution(bool of_pairs) const {
    const int halves = of_pairs && v.gated ? 2 : 1;
    const Convolution one{samples,
                          T,
                          v.conv,
                          vector[conv],
                          vector[conv_bias],
                          (long)halves * round_up(shape.inner, kAlign),
                          !of_pairs,
                          v.activation,
                          own.strip};
    return {one, own.d_strip, own.sums};
  }
  Range own_columns(int columns) const { return share(columns, team.tid, team.size, kAlign); }

  // middle <- what `down` reads, from gate and up
  void form_middle(const InnerMlp<Core>& m) const {
    const int padded = m.padded(), both = (v.gated ? 2 : 1) * padded;
    if (m.convolved && v.conv_of_gate_up) {
      convolution(true).template forward<kCoarse>(
          own_columns(both), RowsOf<State>{m.pairs, both, both},
          [&](long row, int col, V v) { store(own.pairs + row * both + col, v); });
      team.sync();
    }
    const bool to_stage = m.convolved && !v.conv_of_gate_up;
    const RowNorm norm = norm_of(packed, v.inner_norm, m.inner, m.norm < 0 ? inner_norm : m.norm);
    const Range mine = share(m.rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row) {
      float* const x = own.row;
      for (int col = 0; col < padded; col += W) store(x + col, inside(m, row, col));
      if (m.norm >= 0) {
        for (int col = m.inner / W * W; col < padded; col += W)
          store(x + col, within(load(x + col), col, m.inner));
        norm.apply(x);
        for (int col = 0; v.norm_of_product && col < padded; col += W)
          store(x + col, load(x + col) * sigmoid<kCoarse>(pair(m, 0, row, col)));
      }
      for (int col = 0; col < padded; col += W) {
        const V y = load(x + col);
        to_stage ? store(own.stage + (long)row * padded + col, y) : store(m.middle.at(row, col), y);
      }
    }
    team.sync();
    if (!to_stage) return;
    convolution(false).template forward<kCoarse>(
        own_columns(padded), RowsOf<float>{own.stage, padded, padded},
        [&](long row, int col, V v) { store(m.middle.at(row, col), v); });
    team.sync();
  }

  // k.y1 <- the MLP over the tokens of what sublayer 1 reads
  void mix_tokens(const Kept<State>& k) {
    each_slab([&](long first, int columns, Range mine, long at) {
      turn_in(RowsOfMat<Act>{own.normed}, at / D, T, D, mine,
              [&](int row, int t, V v) { store(ws.token_h.at(row, t), v); });
      team.sync();
      run_mlp(token_mlp(k, first, columns), ws.token_h, own.token_y, padded_T);
      turn_out(k.y1 + at, T, D, mine,
               [&](int row, int t) { return load(own.token_y + (long)row * padded_T + t); });
    });
  }

  // k.mid <- sublayer 1 over h^T, normed over the tokens
  void mix_token_rows(const Kept<State>& k) {
    each_slab([&](long first, int columns, Range mine, long at) {
      State* const y = k.y1 + first * padded_T;
      turn_in(RowsOf<State>{k.h, D, D}, at / D, T, D, mine,
              [&](int row, int t, V v) { store(own.token_x + (long)row * padded_T + t, v); });
      team.sync();
      enter(1, own.token_x, columns, T, padded_T, ws.token_h);
      run_mlp(token_mlp(k, first, columns), ws.token_h, y, padded_T);
      leave(1, own.token_x, y, own.token_y, columns, T, padded_T, first);
      turn_out(k.mid + at, T, D, mine,
               [&](int row, int t) { return load(own.token_y + (long)row * padded_T + t); });
    });
  }

  // work(the first column of h, how many, this thread's, the first element), some samples at once.
  template <class Work>
  void each_slab(Work work) const {
    const int most = token_samples(WindowSizes(rec));
    for (int first = 0; first < samples; first += most) {
      const int columns = imin(most, samples - first) * D;
      work((long)first * D, columns, share(columns, team.tid, team.size, W), (long)first * T * D);
      team.clock->lap(Phase::token_mlp);
      team.sync();
    }
  }

  // ---- products -------------------------------------------------------------------------------

  void done(Phase phase) const {
    team.clock->lap(phase);
    team.sync();
  }
  // out [count, ld] <- a W^T + bias
  template <class Out>
  void multiply(Mat<Act> a, int count, BlockWeight which, Out* out, long ld) const {
    split_product<Core>(
        team, ws.gemm, a, count, linear_of(shape, which), packed.weight[which],
        [&](const Linear& l, int end) { return keep_product(l, out, ld, vector[which], end); });
    team.clock->lap(which == down ? Phase::down : Phase::gate_up);
  }
};

}  // namespace rx::cpu::RX_ISA
