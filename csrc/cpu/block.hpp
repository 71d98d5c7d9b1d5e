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
// barriers stand where the next stage reads columns that another thread wrote.
#pragma once

#include "epilogues.hpp"
#include "pool.hpp"
#include "qkv.hpp"
#include "token_mlp.hpp"
#include "workspace.hpp"

namespace rx::cpu::RX_ISA {

template <class Core>
struct Block {
  using Act = typename Core::Act;

  struct Hidden {
    Mat<Act> y;    // [rows, D], un-normalised
    float* scale;  // [rows]: h = y * scale
  };

  const Recursion& rec;
  const Team& team;
  Workspace<Core>& ws;
  const PackedBlock& packed;
  const PackedBlock& next;  // the block after this one, whose weights are prefetched
  const BlockShape& shape = packed.shape;

  // One block: from h `in` (rows left as they are), over `between`, to `out`. The scale of `out`
  // may take the place of that of `in`.
  void run(Hidden in, Hidden between, Hidden out) {
    if (shape.token_mlp) {
      mix_tokens(in, between);
    } else {
      project_qkv(in);
      attend();
      add_residual(mixer_out, ws.mixed, in, between, Phase::o);
    }
    gate(between);
    add_residual(down, ws.middle, between, out, Phase::down);
  }

  // ---- the first half: mix tokens -----------------------------------------------------------

  // q, k, v <- rope(h W_q) / sqrt(head_dim), rope(h W_k), h W_v; scores come out in base 2.
  void project_qkv(Hidden in) {
    const Heads heads{shape.heads, shape.head_dim};
    const float to_base2 = kLog2e / sqrtf((float)shape.head_dim);
    for (int row = 0; row < ws.rows; ++row) ws.scale_q[row] = in.scale[row] * to_base2;
    const HeadRows<Act> to{ws.q,           ws.k,       ws.v,     (long)ws.rows_pad * ws.head_stride,
                           ws.head_stride, ws.scale_q, in.scale, rec.cos,
                           rec.sin,        ws.position};
    multiply(mixer_in, in.y, file_heads(to, heads));
    team.clock->lap(Phase::qkv);
    if (!heads_stay()) team.sync();
  }

  // mixed <- softmax(q k^T) v, by items of (head, sample, part of the query rows).
  void attend() {
    const Heads heads{shape.heads, shape.head_dim};
    const int T = rec.tokens, samples = ws.rows / T;
    int parts = 1;
    const Range units = own_units();
    Range items{units.begin * heads.per_unit() * samples,
                imin(heads.count, units.end * heads.per_unit()) * samples};
    if (!heads_stay()) {
      parts = imin(T, ceil_div(team.size, heads.count * samples));
      items = share(heads.count * samples * parts, team.tid, team.size);
    }
    for (int item = items.begin; item < items.end; ++item) {
      const int head = item / (samples * parts), sample = item / parts % samples;
      const long first = ((long)head * ws.rows_pad + (long)sample * T) * ws.head_stride;
      Core::attend(ws.gemm, ws.attention, ws.q + first, ws.k + first, ws.v + first, ws.head_stride,
                   T, shape.head_dim, share(T, item % parts, parts), ws.mixed, sample * T,
                   head * shape.head_dim);
    }
    team.clock->lap(Phase::attention);
    team.sync();
  }

  void mix_tokens(Hidden in, Hidden out) {
    TokenMlp<Core> mixer{ws, packed, rec.tokens, rec.hidden};
    const int columns = ws.rows / rec.tokens * rec.hidden;
    mixer.run(in.y, in.scale, share(columns, team.tid, team.size, kAlign), out.y);
    for (int row = 0; row < ws.rows_pad; ++row) out.scale[row] = 1.f;
    team.clock->lap(Phase::token_mlp);
    team.sync();
  }

  // ---- the second half: SwiGLU over D, and the sums with h -------------------------------------

  // middle <- silu(gate h) * (up h)
  void gate(Hidden h) {
    multiply(gate_up, h.y, gated<Core>(ws.middle, h.scale));
    team.clock->lap(Phase::gate_up);
    team.sync();
  }

  // out <- a W + h, and its scale
  void add_residual(BlockWeight which, Mat<Act> a, Hidden h, Hidden out, Phase phase) {
    multiply(which, a, residual<Core>(h.y, h.scale, out.y, ws.sums, ws.rows_pad));
    team.clock->lap(phase);
    team.sync();
    sum_to_scale(ws.sums, ws.rows_pad, ws.rows, rec.hidden, shape.eps, out.scale);
  }

  // ---- products -------------------------------------------------------------------------------

  template <class Epilogue>
  void multiply(BlockWeight which, Mat<Act> a, Epilogue epilogue) {
    const Linear l = linear_of(shape, which);
    const PackedBlock& after = which == down ? next : packed;
    const BlockWeight then = which == down ? mixer_in : BlockWeight(which + 1);
    const Linear following = linear_of(after.shape, then);
    const void* prefetch =
        Core::panel_at(following, after.weight[then], own_panels(after.shape, then).begin);
    Core::gemm(ws.gemm, a, {0, ws.rows}, l, packed.weight[which], own_panels(shape, which),
               prefetch, epilogue);
  }

  // The share of this thread: whole heads if they divide evenly, whole partial sums of squares.
  Range own_panels(const BlockShape& s, BlockWeight which) const {
    const Linear l = linear_of(s, which);
    if (l.columns == Columns::qkv && heads_stay(s))
      return share(l.panels(), team.tid, team.size, l.heads.unit_panels());
    const int unit = l.columns == Columns::plain ? kSumColumns / kPanel : 1;
    return share(l.panels(), team.tid, team.size, unit);
  }

  // Whether a thread can attend with the heads that it projected itself, without a barrier.
  bool heads_stay(const BlockShape& s) const {
    return Heads{s.heads, s.head_dim}.units() % team.size == 0;
  }
  bool heads_stay() const { return heads_stay(shape); }
  Range own_units() const {
    return share(Heads{shape.heads, shape.head_dim}.units(), team.tid, team.size);
  }
};

}  // namespace rx::cpu::RX_ISA
