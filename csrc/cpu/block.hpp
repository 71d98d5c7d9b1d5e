// The maths of a block, the same on every instruction set. Start reading here.
//
//   attention block   h = rms(h + O(attn(rope(Q h), rope(K h), V h)));  h = rms(h + swiglu_D(h))
//   token-MLP block   h' = h^T;  h' = rms(h' + swiglu_T(h'));  h = rms(h'^T + swiglu_D(h'^T))
//
// There is no norm pass. rms has no weight, so a stage stores the un-normalised row and its sum of
// squares, and whoever reads the row next multiplies by the scale: a product does so in its
// epilogue, where the row is in registers anyway. A `Hidden` is such a row with its scale.
//
// A stage is one product and its epilogue, split over the threads of the team by columns; the
// barriers stand where a stage reads columns that another thread wrote.
#pragma once

#include "pool.hpp"
#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct Block {
  using Act = typename Core::Act;
  static constexpr bool kCoarse = Core::kCoarse;

  struct Hidden {
    Mat<Act> y;          // [rows, D], un-normalised
    const float* scale;  // [rows]: h = y * scale
  };

  const Recursion& rec;
  const Team& team;
  Workspace<Core>& ws;
  const PackedBlock& packed;
  const BlockShape& shape = packed.shape;

  Range all_rows() const { return {0, ws.rows}; }

  Range own_panels(const Linear& l) const { return share(l.panels(), team.tid, team.size); }

  // One block: h in `in` (left untouched) to `out`, whose scale goes to `scale`.
  void run(Hidden in, Mat<Act> between, float* between_scale, Mat<Act> out, float* scale) {
    if (shape.token_mlp) {
      mix_tokens(in, between, between_scale);
    } else {
      project_qkv(in);
      attend();
      add_residual(mixer_out, ws.mixed, in, between, Phase::o);
      finish_scale(between_scale);
    }
    Hidden h{between, between_scale};
    gate(h);
    add_residual(down, ws.middle, h, out, Phase::down);
    finish_scale(scale);
  }

  // ---- attention --------------------------------------------------------------------------

  // q, k, v <- rope(h W_q) / sqrt(head_dim), rope(h W_k), h W_v; scores come out in base 2.
  void project_qkv(Hidden in) {
    const Linear l = linear_of(shape, mixer_in);
    const float to_base2 = kLog2e / sqrtf((float)shape.head_dim);
    for (int row = 0; row < ws.rows; ++row) ws.scale_q[row] = in.scale[row] * to_base2;
    const Range units = own_units();
    const int per_unit = l.heads.unit_panels();
    const Range panels = heads_stay() ? Range{units.begin * per_unit, units.end * per_unit}
                                      : own_panels(l);
    Core::gemm(ws.gemm, in.y, all_rows(), l, packed.weight[mixer_in], panels, [&](int panel) {
      const Heads& heads = l.heads;
      const int index = panel % per_unit, part = index / heads.pairs();
      const int first = panel / per_unit * heads.per_unit();
      const int vector = index % heads.pairs();
      Act* const base = part == 0 ? ws.q : part == 1 ? ws.k : ws.v;
      const float* scale = part == 0 ? ws.scale_q : in.scale;
      const long head_size = (long)ws.rows_pad * ws.head_stride;
      const int stride = ws.head_stride, half = heads.half(), dim = heads.dim;
      const float *cos = rec.cos, *sin = rec.sin;
      const int* position = ws.position;
      // column of each vector within the unit, and where the vectors of row 0 go
      const int c0 = part == 2 ? vector * kPanel : vector * W;
      const int head0 = first + (part == 2 ? c0 / dim : c0 / half);
      const int head1 = part == 2 ? first + (c0 + W) / dim : head0;
      const int col0 = part == 2 ? c0 % dim : c0 % half;
      const int col1 = part == 2 ? (c0 + W) % dim : col0 + half;
      Act* const out0 = base + head0 * head_size + col0;
      Act* const out1 = base + head1 * head_size + col1;
      const bool rotate = part < 2 && cos != nullptr;
      const bool whole = part == 2 || half % W == 0;
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        v0 *= scale[row];
        v1 *= scale[row];
        if (!whole) {
          Act* head = base + first * head_size + (long)row * stride;
          const long angle = (long)position[row] * dim;
          store_lanes(head, head_size, half, c0, v0, v1, cos ? cos + angle : nullptr, sin + angle);
          return;
        }
        if (rotate) {
          const float* c = cos + (long)position[row] * dim + col0;
          const float* s = sin + (long)position[row] * dim + col0;
          const V turned0 = v0 * load(c) - v1 * load(s);
          v1 = v1 * load(c + half) + v0 * load(s + half);
          v0 = turned0;
        }
        store(out0 + (long)row * stride, v0);
        store(out1 + (long)row * stride, v1);
      };
    });
    team.clock->lap(Phase::qkv);
    if (!heads_stay()) team.sync();
  }

  // The same for head widths whose halves do not fill whole vectors (16, 48, 80, 112 at W = 16).
  static __attribute__((noinline)) void store_lanes(Act* out, long head_size, int half, int first,
                                                    V v0, V v1, const float* cos,
                                                    const float* sin) {
    for (int lane = 0; lane < W; ++lane) {
      const int head = (first + lane) / half, col = (first + lane) % half;
      float a = v0[lane], b = v1[lane];
      if (cos) {
        const float turned = a * cos[col] - b * sin[col];
        b = b * cos[col + half] + a * sin[col + half];
        a = turned;
      }
      store_one(out + head * head_size + col, a);
      store_one(out + head * head_size + col + half, b);
    }
  }

  // Whether a thread can attend with the heads that it projected itself, without a barrier.
  bool heads_stay() const { return Heads{shape.heads, shape.head_dim}.units() % team.size == 0; }
  Range own_units() const {
    return share(Heads{shape.heads, shape.head_dim}.units(), team.tid, team.size);
  }

  // mixed <- softmax2(q k^T) v, by items of (head, sample, part of the query rows).
  void attend() {
    const Heads heads{shape.heads, shape.head_dim};
    const int T = rec.tokens, samples = ws.rows / T;
    int parts = 1;
    Range items{own_units().begin * heads.per_unit() * samples,
                imin(heads.count, own_units().end * heads.per_unit()) * samples};
    if (!heads_stay()) {
      parts = imin(T, ceil_div(team.size, heads.count * samples));
      items = share(heads.count * samples * parts, team.tid, team.size);
    }
    for (int item = items.begin; item < items.end; ++item) {
      const int head = item / (samples * parts), sample = item / parts % samples;
      const long first = ((long)head * ws.rows_pad + (long)sample * T) * ws.head_stride;
      Core::attend(ws.attention, ws.q + first, ws.k + first, ws.v + first, ws.head_stride, T,
                   shape.head_dim, share(T, item % parts, parts), ws.mixed, sample * T,
                   head * shape.head_dim);
    }
    team.clock->lap(Phase::attention);
    team.sync();
  }

  // ---- the token MLP ------------------------------------------------------------------------

  // out <- rms(h^T + swiglu_T(h^T))^T, normalised (scale 1): here a row of the product is a column
  // of h, so each thread takes its own columns through the whole stage.
  void mix_tokens(Hidden in, Mat<Act> out, float* scale) {
    const int T = rec.tokens, D = rec.hidden;
    const Linear up = linear_of(shape, mixer_in), back = linear_of(shape, mixer_out);
    const Range columns = share(ws.rows / T * D, team.tid, team.size, kAlign);
    for (int first = columns.begin; first < columns.end;) {
      const int sample = first / D, d = first % D;
      const int count = imin(imin(kTokenRows, D - d), columns.end - first);
      const Range slab{0, count};
      for (int i = 0; i < count; ++i)
        for (int t = T; t < round_up(T, kAlign); ++t) store_one(ws.token_in.at(i, t), 0.f);
      for (int t = 0; t < T; ++t) {
        const long row = (long)sample * T + t;
        for (int i = 0; i < count; ++i)
          store_one(ws.token_in.at(i, t), to_float(*in.y.at(row, d + i)) * in.scale[row]);
      }
      Core::gemm(ws.gemm, ws.token_in, slab, up, packed.weight[mixer_in], {0, up.panels()},
                 gated(ws.token_middle, nullptr));
      Core::gemm(ws.gemm, ws.token_middle, slab, back, packed.weight[mixer_out],
                 {0, back.panels()},
                 residual({ws.token_in, nullptr}, ws.token_out, ws.token_sums, slab_rows()));
      sum_to_scale(ws.token_sums, slab_rows(), count, T, ws.token_scale);
      for (int t = 0; t < T; ++t) {
        const long row = (long)sample * T + t;
        for (int i = 0; i < count; ++i)
          store_one(out.at(row, d + i), to_float(*ws.token_out.at(i, t)) * ws.token_scale[i]);
      }
      first += count;
    }
    for (int row = 0; row < ws.rows_pad; ++row) scale[row] = 1.f;
    team.clock->lap(Phase::token_mlp);
    team.sync();
  }

  int slab_rows() const { return kTokenRows + Core::kSpareRows; }

  // ---- SwiGLU over D ------------------------------------------------------------------------

  // middle <- silu(gate h) * (up h)
  void gate(Hidden h) {
    const Linear l = linear_of(shape, gate_up);
    Core::gemm(ws.gemm, h.y, all_rows(), l, packed.weight[gate_up], own_panels(l),
               gated(ws.middle, h.scale));
    team.clock->lap(Phase::gate_up);
    team.sync();
  }

  // out <- a W + h, with its partial sums of squares
  void add_residual(int which, Mat<Act> a, Hidden h, Mat<Act> out, Phase phase) {
    const Linear l = linear_of(shape, which);
    const Range panels = share(l.panels(), team.tid, team.size, kSumColumns / kPanel);
    Core::gemm(ws.gemm, a, all_rows(), l, packed.weight[which], panels,
               residual(h, out, ws.sums, ws.rows_pad));
    team.clock->lap(phase);
    team.sync();
  }

  void finish_scale(float* scale) { sum_to_scale(ws.sums, ws.rows_pad, ws.rows, rec.hidden, scale); }

  // ---- epilogues: epilogue(panel) gives finish(row, v0, v1) -----------------------------------

  // scale = null: the input is normalised
  static auto gated(Mat<Act> out, const float* scale) {
    return [=](int panel) {
      Act* const p = out.at(0, panel * W);
      return [=](int row, V gate, V up) __attribute__((always_inline)) {
        store(p + (long)row * out.ld, swiglu<kCoarse>(gate, up, scale ? scale[row] : 1.f));
      };
    };
  }

  // Each kSumColumns columns have their own partial sum, so that the result does not depend on how
  // columns are split over threads.
  static auto residual(Hidden h, Mat<Act> out, float* sums, int rows_pad) {
    return [=](int panel) {
      const int col = panel * kPanel;
      const Act* const x = h.y.at(0, col);
      Act* const p = out.at(0, col);
      float* const sum = sums + (long)(col / kSumColumns) * rows_pad * W;
      const bool first = col % kSumColumns == 0;
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        const V scale = splat(h.scale ? h.scale[row] : 1.f);
        v0 = fma(load(x + (long)row * h.y.ld), scale, v0);
        v1 = fma(load(x + (long)row * h.y.ld + W), scale, v1);
        const V squares = fma(v0, v0, v1 * v1);
        store(sum + (long)row * W, first ? squares : squares + load(sum + (long)row * W));
        store(p + (long)row * out.ld, v0);
        store(p + (long)row * out.ld + W, v1);
      };
    };
  }

  // scale = rsqrt(mean(y^2) + eps)
  void sum_to_scale(const float* sums, int rows_pad, int rows, int width, float* scale) const {
    const int parts = ceil_div(round_up(width, kAlign), kSumColumns);
    for (int row = 0; row < rows; ++row) {
      V total = load(sums + (long)row * W);
      for (int part = 1; part < parts; ++part)
        total += load(sums + ((long)part * rows_pad + row) * W);
      scale[row] = 1.f / sqrtf(reduce_add(total) / width + shape.eps);
    }
  }
};

}  // namespace rx::cpu::RX_ISA
