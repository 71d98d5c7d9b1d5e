// A variant's block in a window, backward: from the gradient of its out to those of its h and all
// its weights; recurx/reference.py, `variant_block`, in reverse.
#pragma once

#include "sublayer_backward.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct VariantBackward : SublayerBackward<Core> {
  using Base = SublayerBackward<Core>;
  using State = typename Core::State;
  using Act = typename Core::Act;
  template <class X>
  using Sublayer = typename Base::template Sublayer<X>;
  using Base::Base, Base::D, Base::T, Base::v, Base::own, Base::ws, Base::team, Base::rows;
  using Base::gradient, Base::norm_back, Base::leave_back, Base::enter_back, Base::read_by;
  using Base::shape, Base::vector, Base::wide, Base::padded_T;
  using Base::weight_back, Base::multiply_back, Base::add_back, Base::through_norm;
  static constexpr bool kCoarse = Core::kCoarse;

  // ws.sum <- gradient of k.h; untouched by the mixer's input if `enters` is false, where that
  // leads to no weight.
  void run(const Kept<State>& k, bool enters) {
    if (v.kind == Kind::norm) {
      through_norm(k);
      return;
    }
    Sublayer<State> one{2, rows, D, D, k.mid, k.y2, ws.sum, own.d_n, own.normed, ws.narrow};
    leave_back(one);
    mlp_back(this->mlp(k), one);
    enter_back(one);
    if (v.kind == Kind::none) return;
    if (shape.token_mlp && !v.token_norm_hidden) {
      unmix_token_rows(k);
      return;
    }
    one.number = 1, one.x = k.h, one.y = k.y1;
    leave_back(one);
    if (shape.token_mlp) {
      unmix_tokens(k, one);
    } else {
      attend_back(k, one, enters || v.pre_normed());
    }
    enter_back(one);
  }

  // ---- attention ------------------------------------------------------------------------------

  void attend_back(const Kept<State>& k, const Sublayer<State>& one, bool enters) {
    const int dim = shape.head_dim;
    float* const d = ws.d_mixed;
    const auto d_row = [=, w = wide](int row, int col) { return load(d + (long)row * w + col); };
    this->find_lines();
    this->form_mixed(k);
    weight_back(mixer_out, one.narrow, own.mixed);
    multiply_back(one.narrow, rows, mixer_out, d, wide);
    if (v.attn_norm != Norm::none) {
      norm_back(
          norm_of(this->packed, v.attn_norm, wide, attn_norm), rows,
          [&](int row, int col) { return this->gated_mixed(k, row, col); }, d_row,
          [=, w = wide](int row, int col, V g) {
            if (col < w) store(d + (long)row * w + col, g);
          },
          attn_norm, false);
    }
    if (v.attn_gate) {
      gate_back(k);
      weight_back(attn_gate, own.mixed, one.normed);
      if (enters) add_back(own.mixed, attn_gate, one);
    }
    const float* d_heads = d;
    team.sync();
    if (this->in_lines) {
      const Range mine = share(rows, team.tid, team.size);
      for (int row = mine.begin; row < mine.end; ++row)
        memcpy(own.d_lines + this->line_of(row) * wide, d + (long)row * wide, wide * sizeof(float));
      d_heads = own.d_lines;
      team.sync();
    }
    this->each_head([&](auto& head, long row, int number, int col, auto seen) {
      head.backward(k.heads + row * 3 * wide + col, wide, k.mixed + row * wide + col,
                    k.lse + row * shape.heads + number, shape.heads, d_heads + row * wide + col,
                    ws.wide, (int)row, col, seen);
    });
    team.clock->lap(Phase::attention);
    const int out = linear_of(shape, mixer_in).out;
    const Mat<Act> d_qkv = own_heads(shape) ? own.d_heads : ws.wide;
    if (own_heads(shape)) heads_back(k, dim, out);
    clear_padding(d_qkv, out);
    weight_back(mixer_in, d_qkv, one.normed);
    if (enters) add_back(d_qkv, mixer_in, one);
  }

  void clear_padding(Mat<Act> m, int width) const {
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row)
      for (int col = width; col < round_up(width, kAlign); col += W) store(m.at(row, col), V{});
    team.sync();
  }

  // d_mixed <- the gradient of what attention made; mixed <- that of the gate's product.
  void gate_back(const Kept<State>& k) const {
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row)
      for (int col = 0; col < round_up(wide, kAlign); col += W) {
        V d_gate{};
        if (col < wide) {
          float* const p = ws.d_mixed + (long)row * wide + col;
          const V gate = sigmoid<kCoarse>(load(k.gate + (long)row * wide + col)), d = load(p);
          d_gate = d * load(k.mixed + this->line_of(row) * wide + col) * gate * (1.f - gate);
          store(p, d * gate);
        }
        store(own.mixed.at(row, col), d_gate);
      }
    team.sync();
  }

  // d_heads <- the gradients of q, k and v as projected: out of the lines, of heads that share a
  // K/V head summed, through the norms of q and k.
  void heads_back(const Kept<State>& k, int dim, int ld) const {
    const int heads = shape.heads, kv = kv_heads(shape), group = heads / kv;
    const Mat<Act> from = ws.wide, to = own.d_heads;
    const Range mine = share(rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row)
      for (int head = 0; head < heads + 2 * kv; ++head)
        for (int d = 0; d < dim; d += W) {
          const int part = head < heads ? 0 : 1 + (head - heads) / kv;
          const int first = part ? part * heads + (head - heads) % kv * group : head;
          V sum{};
          for (int i = 0; i < (part ? group : 1); ++i)
            sum += load(from.at(this->line_of(row), (first + i) * dim + d));
          store(to.at(row, head * dim + d), sum);
        }
    team.sync();
    for (int part = 0; v.qk_norm != Norm::none && part < 2; ++part) {
      const int count = part ? kv : heads, first = part ? heads * dim : 0;
      const State* const qkv = k.qkv + first;
      norm_back(
          norm_of(this->packed, v.qk_norm, dim, part ? k_norm : q_norm), rows * count,
          [=](int i, int col) {
            return load(qkv + (long)(i / count) * ld + i % count * dim + col);
          },
          [=](int i, int col) { return load(to.at(i / count, first + i % count * dim + col)); },
          [=](int i, int col, V d) {
            if (col < dim) store(to.at(i / count, first + i % count * dim + col), d);
          },
          part ? k_norm : q_norm, false);
      team.sync();
    }
  }

  // ---- MLPs -----------------------------------------------------------------------------------

  template <class X>
  void mlp_back(const InnerMlp<Core>& m, const Sublayer<X>& one) {
    const int padded = m.padded(), both = (v.gated ? 2 : 1) * padded;
    const int count = m.in == mixer_in ? m.rows : 0;
    float* const d = own.d_middle;
    this->form_middle(m);
    weight_back(m.out, one.narrow, m.middle, count);
    multiply_back(one.narrow, m.rows, m.out, d, padded);
    if (m.convolved && !v.conv_of_gate_up) {
      this->convolution(false).template backward<kCoarse>(
          this->own_columns(padded), RowsOf<float>{own.stage, padded, padded}, d, padded,
          gradient(conv), gradient(conv_bias), m.inner);
      team.sync();
    }
    const bool to_pairs = m.convolved && v.conv_of_gate_up;
    const auto put = [&](int half, int row, int col, V g) {
      const int at = half * padded + col;
      to_pairs ? store(own.d_pairs + (long)row * both + at, g) : store(m.wide.at(row, at), g);
    };
    m.norm >= 0 && v.norm_of_product ? product_back(m, d, put) : gate_back(m, d, put);
    team.sync();
    if (to_pairs) {
      this->convolution(true).template backward<kCoarse>(
          this->own_columns(both), RowsOf<State>{m.pairs, both, both}, own.d_pairs, both,
          gradient(conv), gradient(conv_bias), m.inner);
      team.sync();
      const Range mine = share(m.rows, team.tid, team.size);
      for (int row = mine.begin; row < mine.end; ++row)
        for (int col = 0; col < both; col += W)
          store(m.wide.at(row, col), load(own.d_pairs + (long)row * both + col));
      team.sync();
    }
    weight_back(m.in, m.wide, one.normed, count);
    add_back(m.wide, m.in, one);
  }

  // Of act(gate) * up or act(up), and of an inner norm after it.
  template <class Put>
  void gate_back(const InnerMlp<Core>& m, float* d, Put put) const {
    const int padded = m.padded();
    if (m.norm >= 0)
      norm_back(
          norm_of(this->packed, v.inner_norm, m.inner, m.norm), m.rows,
          [&](int row, int col) { return this->inside(m, row, col); },
          RowsOf<float>{d, padded, padded},
          [=](int row, int col, V g) { store(d + (long)row * padded + col, g); }, m.norm, false);
    const Range mine = share(m.rows, team.tid, team.size);
    for (int row = mine.begin; row < mine.end; ++row)
      for (int col = 0; col < padded; col += W) {
        const V gate = this->pair(m, 0, row, col), g = load(d + (long)row * padded + col);
        const V slope = slope_of<kCoarse>(v.activation, gate);
        put(0, row, col, v.gated ? g * this->pair(m, 1, row, col) * slope : g * slope);
        if (v.gated) put(1, row, col, g * activated<kCoarse>(v.activation, gate));
      }
  }

  // Of sigmoid(gate) * norm(gate * up).
  template <class Put>
  void product_back(const InnerMlp<Core>& m, float* d, Put put) const {
    const int padded = m.padded();
    const RowNorm norm = norm_of(this->packed, v.inner_norm, m.inner, m.norm);
    const auto open = [&](int row, int col) {
      return sigmoid<kCoarse>(this->pair(m, 0, row, col));
    };
    float* const normed = own.row;
    norm_back(
        norm, m.rows, [&](int row, int col) { return this->inside(m, row, col); },
        [&](int row, int col) { return load(d + (long)row * padded + col) * open(row, col); },
        [&](int row, int col, V g) {
          if (col == 0) {
            for (int c = 0; c < padded; c += W)
              store(normed + c, within(this->inside(m, row, c), c, m.inner));
            norm.apply(normed);
          }
          const V gate = this->pair(m, 0, row, col), up = this->pair(m, 1, row, col);
          const V s = open(row, col), of_open = load(d + (long)row * padded + col);
          put(0, row, col, fma(g, up, of_open * load(normed + col) * s * (1.f - s)));
          put(1, row, col, g * gate);
        },
        m.norm, false);
  }

  void unmix_tokens(const Kept<State>& k, const Sublayer<State>& one) {
    this->each_slab([&](long first, int columns, Range mine, long at) {
      Sublayer<float> slab{1,       columns,     T,           padded_T,   nullptr,
                           nullptr, own.token_d, own.token_d, ws.token_h, ws.token_rows};
      turn_in(RowsOfMat<Act>{one.normed}, at / D, T, D, mine,
              [&](int row, int t, V v) { store(ws.token_h.at(row, t), v); });
      turn_in(RowsOfMat<Act>{one.narrow}, at / D, T, D, mine, [&](int row, int t, V v) {
        store(ws.token_rows.at(row, t), v);
        store(own.token_d + (long)row * padded_T + t, V{});
      });
      team.sync();
      mlp_back(this->token_mlp(k, first, columns), slab);
      float* const to = read_by(one) + at;
      turn_in(to, T, D, mine, [&](int row, int t, V v) {
        float* const p = own.token_d + (long)row * padded_T + t;
        store(p, load(p) + v);
      });
      turn_out(to, T, D, mine,
               [&](int row, int t) { return load(own.token_d + (long)row * padded_T + t); });
    });
  }

  void unmix_token_rows(const Kept<State>& k) {
    this->each_slab([&](long first, int columns, Range mine, long at) {
      Sublayer<float> slab{1,
                           columns,
                           T,
                           padded_T,
                           own.token_x,
                           k.y1 + first * padded_T,
                           ws.token_sum,
                           own.token_d,
                           ws.token_h,
                           ws.token_rows,
                           first};
      turn_in(k.h + at, T, D, mine,
              [&](int row, int t, V v) { store(own.token_x + (long)row * padded_T + t, v); });
      turn_in(ws.sum + at, T, D, mine,
              [&](int row, int t, V v) { store(ws.token_sum + (long)row * padded_T + t, v); });
      team.sync();
      leave_back(slab);
      mlp_back(this->token_mlp(k, first, columns), slab);
      enter_back(slab);
      turn_out(ws.sum + at, T, D, mine,
               [&](int row, int t) { return load(ws.token_sum + (long)row * padded_T + t); });
    });
  }
};

}  // namespace rx::cpu::RX_ISA
