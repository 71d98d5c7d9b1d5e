// A block with all fields of its spec: recurx/reference.py, `variant_block`.
//
//   post      h = norm(a h + s f(h))
//   pre       h = a h + s f(norm(h))
//   sandwich  h = a h + s norm(f(norm(h)))      for f = the mixer, then the MLP over D
//
// Products are those of the core, with one epilogue for all variants; between them rows, or columns
// that a thread wrote itself, are passed over while they are in its cache. Barriers stand where the
// next stage reads what another thread wrote. Unlike a block of TRM's it keeps h normed, in place.
#pragma once

#include "pool.hpp"
#include "softmax.hpp"
#include "token_mlp.hpp"
#include "variant_rows.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct VariantBlock {
  using Act = typename Core::Act;
  static constexpr bool kCoarse = Core::kCoarse;

  const Recursion& rec;
  const Team& team;
  Workspace<Core>& ws;
  const PackedBlock& packed;
  const PackedBlock& next;  // the block after this one, whose weights are prefetched
  Mat<Act> h, f;            // what enters and leaves; the result of a sublayer
  const float* ones;        // [rows_pad]
  const Beside beside;
  const BlockShape& shape = packed.shape;
  const Variant& v = shape.variant;
  const float* const* vector = packed.vector;
  const Mat<Act> n = v.pre_normed() ? ws.y : h;  // what a sublayer reads
  const int samples = ws.rows / rec.tokens;
  const Range own = share(ws.rows, team.tid, team.size);
  const int* place = nullptr;  // of the rows of q, k, v, and what attention makes of them

  void run() {
    if (v.kind == Kind::norm) {
      pass(0, 1, h);
      return;
    }
    if (v.kind == Kind::none) {
      if (v.pre_normed()) pass(0, 2, n);
    } else if (v.kind == Kind::token_mlp && !v.token_norm_hidden) {
      mix_token_rows();
      if (v.pre_normed()) pass(0, 2, n);
    } else {
      if (v.pre_normed()) pass(0, 1, n);
      v.kind == Kind::attention ? attention() : mix_tokens();
      pass(1, v.pre_normed() ? 2 : 0, n);
    }
    place = nullptr;
    mlp();
    pass(2, 0, n);
  }

  // ---- norms and sums -------------------------------------------------------------------------

  // Ends sublayer `done` of the thread's rows and forms what sublayer `entered` reads; 0 for none.
  void pass(int done, int entered, Mat<Act> to) {
    const SublayerEnd end = end_of(packed, done, shape.hidden, drops_of(rec, v, beside, done));
    const RowNorm entry = norm_of(packed, v.norm, shape.hidden, entered == 1 ? norm1 : norm2);
    for (int row = own.begin; row < own.end; ++row) {
      if (done) end.run(h, f, row, place ? place[row] : row, h, ws.row);
      if (entered) norm_row(entry, h, to, row);
    }
    team.clock->lap(done == 1 ? Phase::o : Phase::down);
    team.sync();
  }

  void norm_row(const RowNorm& norm, Mat<Act> from, Mat<Act> to, int row) {
    load_row(from, row, norm.width, ws.row);
    norm.apply(ws.row);
    store_row(ws.row, norm.width, to, row);
  }

  void norm_rows(Norm kind, int width, int weight, Mat<Act> m) {
    const RowNorm norm = norm_of(packed, kind, width, weight);
    for (int row = own.begin; row < own.end; ++row) norm_row(norm, m, m, row);
    team.sync();
  }

  // ---- products -------------------------------------------------------------------------------

  Range own_panels(int which) const {
    return share(linear_of(shape, which).panels(), team.tid, team.size);
  }

  template <class Epilogue>
  void multiply(int which, Mat<Act> a, Range rows, Range panels, int then, Epilogue epilogue) {
    const PackedBlock& after = then < 0 ? next : packed;
    int following = then < 0 ? mixer_in : then;
    while (following < matrices_per_block && !after.weight[following]) ++following;
    const void* prefetch = packed.weight[which];
    if (following < matrices_per_block) prefetch = after.weight[following];
    Core::gemm(ws.gemm, a, rows, linear_of(shape, which), packed.weight[which], panels, prefetch,
               [=](int panel) __attribute__((always_inline)) {
                 const Finish<Act> finish = epilogue(panel);
                 return [=](int row, V v0, V v1) __attribute__((always_inline)) {
                   finish_row<Core>(finish, row, v0, v1);
                 };
               });
  }

  // out <- what `after` makes of a product and its bias. Of pairs of gate and up, `activate` makes
  // act(gate) * up, and `store` leaves them in `out` and `up`.
  void multiply(int which, Mat<Act> a, Range rows, Range panels, int then, After after,
                Mat<Act> out, Mat<Act> up = {}, const int* to = nullptr) {
    const bool pairs = linear_of(shape, which).columns == Columns::gate_up;
    const float* const bias = vector[which];
    const int ups = round_up(linear_of(shape, which).out / 2, kAlign);  // where their biases begin
    const Activation activation = v.activation;
    multiply(which, a, rows, panels, then, [=](int panel) {
      const int col = panel * (pairs ? W : kPanel);
      const float* const b = bias ? bias + col : nullptr;
      Act* const p = out.at(0, col);
      Finish<Act> one{after, activation, p, p + W, out.ld, out.ld, b, nullptr, to};
      if (b) one.bias1 = b + (pairs ? ups : W);
      if (pairs && after == After::activate) one.after = After::gated;
      if (pairs && after == After::store) one.p1 = up.at(0, col), one.ld1 = up.ld;
      return one;
    });
  }

  void multiply(int which, Mat<Act> a, int then, After after, Mat<Act> out, Mat<Act> up = {},
                const int* to = nullptr) {
    multiply(which, a, {0, ws.rows}, own_panels(which), then, after, out, up, to);
  }

  // ---- attention ------------------------------------------------------------------------------

  void attention() {
    const int line = v.line(rec.tokens), wide = shape.heads * shape.head_dim;
    if (v.axial[0] && v.axial[2] == 0) {
      find_places(v.axial[0], v.axial[1], ws.rows, ws.rows_pad, ws.place);
      place = ws.place;
    }
    project();
    team.sync();
    turn_heads(line);
    for (int row = own.begin; wide % kAlign && row < own.end; ++row)
      for (int col = wide; col < round_up(wide, kAlign); col += W)
        store(ws.mixed.at(row, col), V{});
    team.clock->lap(Phase::qkv);
    team.sync();
    attend(line);
    team.sync();
    if (v.attn_gate) {
      multiply(attn_gate, n, mixer_out, After::multiply, ws.mixed, {}, place);
      team.sync();
    }
    if (v.attn_norm != Norm::none) norm_rows(v.attn_norm, wide, attn_norm, ws.mixed);
    team.clock->lap(Phase::attention);
    multiply(mixer_out, ws.mixed, gate_up, After::store, f);
    team.sync();
  }

  Act* head(int number) const {  // of q, then of k, then of v
    const long size = (long)ws.rows_pad * ws.head_stride;
    const int kv = kv_heads(shape);
    if (number < shape.heads) return ws.q + number * size;
    number -= shape.heads;
    return number < kv ? ws.k + number * size : ws.v + (number - kv) * size;
  }

  // q, k, v <- W h + bias, each head's rows where attention reads them.
  void project() {
    const int dim = shape.head_dim, heads = shape.heads + 2 * kv_heads(shape);
    const float* const bias = vector[mixer_in];
    const auto at = [=](int col) {
      return col / dim < heads ? head(col / dim) + col % dim : nullptr;
    };
    multiply(mixer_in, n, {0, ws.rows}, own_panels(mixer_in), v.attn_gate ? attn_gate : mixer_out,
             [=](int panel) {
               const int col = panel * kPanel;
               const float* const b = bias ? bias + col : nullptr;
               Finish<Act> one{After::store,   {}, at(col), at(col + W), ws.head_stride,
                               ws.head_stride, b,  nullptr, place};
               if (b) one.bias1 = b + W;
               if (!one.p0) one.p0 = ws.unread, one.ld0 = 0;
               if (!one.p1) one.p1 = ws.unread, one.ld1 = 0;
               return one;
             });
  }

  // Rows of q and k: their norm, their rotation, and for q the scale of the scores, in base 2.
  void turn_heads(int line) {
    const int dim = shape.head_dim, half = dim / 2;
    const Range items = share((shape.heads + kv_heads(shape)) * ws.rows, team.tid, team.size);
    const RowNorm norms[2] = {norm_of(packed, v.qk_norm, dim, q_norm),
                              norm_of(packed, v.qk_norm, dim, k_norm)};
    const float to_base2 = kLog2e / sqrtf((float)dim);
    float x[128], turned[128];
    for (int item = items.begin; item < items.end; ++item) {
      const int row = item % ws.rows;
      const bool key = item / ws.rows >= shape.heads;
      Act* const at = head(item / ws.rows) + (long)row * ws.head_stride;
      for (int d = 0; d < dim; d += W) store(x + d, load(at + d));
      if (v.qk_norm != Norm::none) norms[key].apply(x);
      if (rec.cos) {
        const float *const cos = rec.cos + row % line * dim, *const sin =
                                                                 rec.sin + row % line * dim;
        for (int d = 0; d < half; ++d) turned[d] = -x[half + d], turned[half + d] = x[d];
        for (int d = 0; d < dim; d += W)
          store(x + d, fma(load(turned + d), load(sin + d), load(x + d) * load(cos + d)));
      }
      for (int d = 0; d < dim; d += W) store(at + d, load(x + d) * (key ? 1.f : to_base2));
    }
  }

  // mixed <- softmax(q k^T) v, by items of (head, line, part of the query rows).
  void attend(int line) {
    const int lines = ws.rows / line, heads = shape.heads, group = heads / kv_heads(shape);
    const int parts = imin(line, ceil_div(team.size, heads * lines));
    const Range items = share(heads * lines * parts, team.tid, team.size);
    const long size = (long)ws.rows_pad * ws.head_stride;
    for (int item = items.begin; item < items.end; ++item) {
      const int number = item / (lines * parts), row0 = item / parts % lines * line;
      const long first = (long)row0 * ws.head_stride, kv = number / group * size + first;
      const Range queries = share(line, item % parts, parts);
      const auto run = [&](auto seen) {
        Core::attend(ws.gemm, ws.attention, ws.q + number * size + first, ws.k + kv, ws.v + kv,
                     ws.head_stride, line, shape.head_dim, queries, ws.mixed, row0,
                     number * shape.head_dim, seen);
      };
      const Sees sees{v.causal, v.prefix, v.window, seen_keys(rec, v, beside, row0, ws.keys)};
      sees.all() ? run(SeesAll{}) : run(sees);
    }
  }

  // ---- MLPs -----------------------------------------------------------------------------------

  // Calls work(mixer, row0, d, count) for the thread's columns of h, some at a time.
  template <class Work>
  void for_token_slabs(Work work) {
    const int D = rec.hidden, slab_rows = kTokenRows + Core::kSpareRows;
    TokenMlp<Core> mixer{ws, packed, rec.tokens, D};
    for (int i = 0; i < slab_rows; ++i) ws.token_scale[i] = 1.f;
    const Range columns = share(samples * D, team.tid, team.size, kAlign);
    for (int first = columns.begin; first < columns.end;) {
      const int d = first % D, count = imin(imin(kTokenRows, D - d), columns.end - first);
      work(mixer, (long)(first / D) * rec.tokens, d, count);
      first += count;
    }
    team.clock->lap(Phase::token_mlp);
    team.sync();
  }

  // token_out <- the MLP over the tokens of `count` rows of `from`
  void mlp_of_tokens(Mat<Act> from, int count) {
    const Range in{0, linear_of(shape, mixer_in).panels()};
    const Range back{0, linear_of(shape, mixer_out).panels()};
    const bool normed = v.inner_norm_tokens, product = normed && v.norm_of_product;
    multiply(mixer_in, from, {0, count}, in, mixer_out, product ? After::store : After::activate,
             ws.token_middle, ws.token_up);
    const RowNorm norm = norm_of(packed, v.inner_norm, shape.token_inner, t_inner_norm);
    if (normed) norm_middles(norm, ws.token_middle, ws.token_up, {0, count});
    multiply(mixer_out, ws.token_middle, {0, count}, back, gate_up, After::store, ws.token_out);
  }

  // f <- the MLP over the tokens of n
  void mix_tokens() {
    for_token_slabs([&](TokenMlp<Core>& mixer, long row0, int d, int count) {
      mixer.transpose_in(n, ones, row0, d, count);
      mlp_of_tokens(ws.token_in, count);
      mixer.transpose_out(ws.token_out, ws.token_scale, f, row0, d, count);
    });
  }

  // The whole sublayer over h^T, normed over the tokens.
  void mix_token_rows() {
    const SublayerEnd end = end_of(packed, 1, rec.tokens, drops_of(rec, v, beside, 1));
    for_token_slabs([&](TokenMlp<Core>& mixer, long row0, int d, int count) {
      mixer.transpose_in(h, ones, row0, d, count);
      for (int row = 0; v.pre_normed() && row < count; ++row)
        norm_row(end.norm, ws.token_in, ws.token_normed, row);
      mlp_of_tokens(v.pre_normed() ? ws.token_normed : ws.token_in, count);
      for (int row = 0; row < count; ++row)
        end.run(ws.token_in, ws.token_out, row, row, ws.token_out, ws.row,
                row0 / rec.tokens * rec.hidden + d + row);
      mixer.transpose_out(ws.token_out, ws.token_scale, h, row0, d, count);
    });
  }

  // f <- the MLP over D of n
  void mlp() {
    const bool plain = !v.conv_of_gate_up && !v.norm_of_product;
    multiply(gate_up, n, down, plain ? After::activate : After::store, ws.middle, ws.up);
    team.clock->lap(Phase::gate_up);
    const Range panels = own_panels(gate_up);
    const int per_panel = v.gated ? W : kPanel;
    const Range columns{panels.begin * per_panel, panels.end * per_panel};
    if (v.conv && v.conv_of_gate_up) {
      convolve_columns(ws.middle, columns, 0, !v.gated);
      if (v.gated) convolve_columns(ws.up, columns, 1, false);
    }
    if (v.gated && v.conv_of_gate_up && !v.norm_of_product) {
      for (int row = 0; row < ws.rows; ++row)
        for (int col = columns.begin; col < columns.end; col += W) {
          const V gate = activated<kCoarse>(v.activation, load(ws.middle.at(row, col)));
          store(ws.middle.at(row, col), gate * load(ws.up.at(row, col)));
        }
    }
    if (v.inner_norm != Norm::none) {
      team.sync();
      norm_middles(norm_of(packed, v.inner_norm, shape.inner, inner_norm), ws.middle, ws.up, own);
      team.sync();
    }
    if (v.conv && !v.conv_of_gate_up) convolve_columns(ws.middle, columns, 0, true);
    team.sync();
    multiply(down, ws.middle, -1, After::store, f);
    team.sync();
  }

  void convolve_columns(Mat<Act> m, Range columns, int half, bool activates) {
    const long wide = round_up(shape.inner, kAlign), halves = v.gated && v.conv_of_gate_up ? 2 : 1;
    const Convolution one{samples,
                          rec.tokens,
                          v.conv,
                          vector[conv] + half * wide,
                          vector[conv_bias] + half * wide,
                          halves * wide,
                          activates,
                          v.activation,
                          ws.strip};
    one.forward<kCoarse>(
        columns, [=](long row, int col) { return load(m.at(row, col)); },
        [=](long row, int col, V value) { store(m.at(row, col), value); });
  }

  // middle <- norm(middle), or sigmoid(gate) * norm(gate * up) where `middle` holds the gate.
  void norm_middles(const RowNorm& norm, Mat<Act> middle, Mat<Act> up, Range rows) {
    const int wide = round_up(norm.width, kAlign);
    float* const x = ws.row;
    for (int row = rows.begin; row < rows.end; ++row) {
      load_row(middle, row, norm.width, x);
      for (int col = 0; v.norm_of_product && col < wide; col += W)
        store(x + col, within(load(x + col) * load(up.at(row, col)), col, norm.width));
      norm.apply(x);
      for (int col = 0; v.norm_of_product && col < wide; col += W)
        store(x + col, sigmoid<kCoarse>(load(middle.at(row, col))) * load(x + col));
      store_row(x, norm.width, middle, row);
    }
  }
};

}  // namespace rx::cpu::RX_ISA
