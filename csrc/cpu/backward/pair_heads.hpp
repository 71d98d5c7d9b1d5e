// Attention of one head of one sample in a window, on cores of bf16 instructions.
//
// The forward is the core's own. The backward has keys as rows, so that what an epilogue needs of a
// query (its log-sum-exp, its delta) is a vector, and no [T, T] matrix is turned over:
//
//   P^T  = 2^(K Q^T - lse)            dV   = P^T dO
//   dS^T = P^T * (V dO^T - delta)     dK   = dS^T Q      dQ^T = K^T dS^T
//
// P, dS and the operands are rounded to bf16, as PyTorch rounds them; sums are fp32.
#pragma once

#include "../pairs.hpp"
#include "heads.hpp"
#include "pack_rows.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kPairQueries = 128;               // queries whose P and dS are held at once
constexpr int kPairLd = kPairQueries + kAlign;  // rows of both; whole lines, no power of two

template <class Core>
struct PairHeadScratch {
  bf16 *q, *k, *v, *d_out;          // [T][wide]
  bf16* k_turned;                   // K^T [wide][T]
  char *q_columns, *d_out_columns;  // panels of Q^T and dO^T
  char *q_rows, *d_out_rows;        // panels of Q and dO, the queries of a block
  bf16 *p, *d_s;                    // P^T and dS^T [T][kPairLd] of a block
  char* d_s_rows;                   // panels of dS^T
  float* d_q_turned;                // dQ^T [wide][kPairQueries] of a block
  float *d_q, *d_k, *d_v;           // [T][wide]
  float *lse, *delta;               // [T]
  char* attention;                  // of the core's forward

  static int wide_of(int dim) { return round_up(dim, kTileDepth); }
  static int turned_ld(int tokens) { return round_up(tokens, kTileDepth) + kTileDepth; }

  template <class Carver>
  static PairHeadScratch carve(Carver& c, int tokens, int head_dim) {
    const int wide = wide_of(head_dim), rows = tokens + Core::kSpareRows;
    PairHeadScratch s;
    const auto values = [&](size_t count) { return c.template take<bf16>(count); };
    const auto floats = [&](size_t count) { return c.template take<float>(count); };
    const auto panels = [&](int depth, int cols) {
      return c.template take<char>(Core::linear_bytes(over_rows(depth, cols)));
    };
    s.q = values((size_t)rows * wide);
    s.k = values((size_t)rows * wide);
    s.v = values((size_t)rows * wide);
    s.d_out = values((size_t)rows * wide);
    s.k_turned = values((size_t)(wide + Core::kSpareRows) * turned_ld(tokens));
    s.q_columns = panels(head_dim, tokens);
    s.d_out_columns = panels(head_dim, tokens);
    s.q_rows = panels(kPairQueries, head_dim);
    s.d_out_rows = panels(kPairQueries, head_dim);
    s.p = values((size_t)rows * kPairLd);
    s.d_s = values((size_t)rows * kPairLd);
    s.d_s_rows = panels(tokens, kPairQueries);
    s.d_q_turned = floats((size_t)(wide + Core::kSpareRows) * kPairQueries);
    s.d_q = floats((size_t)(round_up(tokens, W) + Core::kSpareRows) * wide);
    s.d_k = floats((size_t)rows * wide);
    s.d_v = floats((size_t)rows * wide);
    s.lse = floats(round_up(tokens, kAlign));
    s.delta = floats(round_up(tokens, kAlign));
    s.attention = c.template take<char>(Core::attention_bytes(tokens, wide));
    return s;
  }
};

template <class Core>
struct PairHead {
  using Scratch = PairHeadScratch<Core>;

  const typename Core::Scratch& gemm;
  const Scratch& s;
  int tokens, dim;
  const float *cos, *sin;  // [T, dim] or null
  const int wide = Scratch::wide_of(dim);
  const float scale = 1.f / sqrtf((float)dim);
  const Rotary turn{tokens, dim, cos, sin};

  // As VectorHead.
  template <class Seen = SeesAll>
  void forward(const bf16* qkv, int hidden, bf16* mixed, Mat<bf16> also, int row0, int col,
               float* lse, int heads, Seen seen = {}) {
    load_all(qkv, hidden);
    Core::attend(gemm, s.attention, s.q, s.k, s.v, wide, tokens, dim, {0, tokens},
                 Mat<bf16>{mixed, hidden, kDepth}, 0, 0, seen, lse, heads);
    for (int row = 0; row < tokens; ++row)
      for (int d = 0; d < dim; d += W)
        memcpy(also.at(row0 + row, col + d), mixed + (long)row * hidden + d, W * sizeof(bf16));
  }

  template <class Seen = SeesAll>
  void backward(const bf16* qkv, int hidden, const bf16* mixed, const float* lse, int heads,
                const float* d_mixed, Mat<bf16> d_qkv, int row0, int col, Seen seen = {}) {
    load_all(qkv, hidden);
    load_gradient(tokens, dim, d_mixed, mixed, hidden, s.d_out, wide, s.delta);
    for (int row = 0; row < round_up(tokens, kAlign); ++row) {
      // Weights of the queries that pad a panel are next to nothing, and their dO is zero.
      s.lse[row] = row < tokens ? lse[(long)row * heads] : INFINITY;
      if (row >= tokens) s.delta[row] = 0.f;
    }
    PairedPanels::columns(over_rows(dim, tokens), s.q, wide, s.q_columns);
    PairedPanels::columns(over_rows(dim, tokens), s.d_out, wide, s.d_out_columns);
    turn_pairs(s.k, wide, tokens, dim, s.k_turned, Scratch::turned_ld(tokens));
    for (int first = 0; first < tokens; first += kPairQueries)
      some_queries(first, imin(kPairQueries, tokens - first), seen);
    leave_rows(turn, s.d_q, wide, scale, d_qkv, row0, col, true);
    // s.q has the scale already
    leave_rows(turn, s.d_k, wide, 1.f / kLog2e, d_qkv, row0, hidden + col, true);
    leave_rows(turn, s.d_v, wide, 1.f, d_qkv, row0, 2 * hidden + col, false);
  }

 private:
  void load_all(const bf16* qkv, int hidden) {
    load_rows(turn, qkv, 3L * hidden, scale * kLog2e, true, s.q, wide);
    load_rows(turn, qkv + hidden, 3L * hidden, 1.f, true, s.k, wide);
    load_rows(turn, qkv + 2 * hidden, 3L * hidden, 1.f, false, s.v, wide);
  }

  template <class Epilogue>
  void multiply(const bf16* a, int ld, int rows, const Linear& l, const char* panels, int first,
                Epilogue epilogue) const {
    Core::gemm(gemm, Mat<bf16>{(bf16*)a, ld, kDepth}, {0, rows}, l, panels,
               {first, first + l.panels()}, panels, epilogue);
  }
  static void pack(const Linear& l, const bf16* x, long ld, char* to) {
    for (int panel = 0; panel < l.panels(); ++panel) {
      PairedPanels::run(l, to, panel, 0, l.in, RowsOf<bf16>{x, ld, l.out});
      PairedPanels::finish(l, to, panel);
    }
  }

  // The share of queries [first, first + count) in all three gradients.
  template <class Seen>
  void some_queries(int first, int count, Seen seen) const {
    const Linear queries = over_rows(dim, count), over_queries = over_rows(count, dim);
    const int panel0 = first / kPanel;
    const Scratch& s = this->s;
    multiply(s.k, wide, tokens, queries, s.q_columns, panel0, [=](int panel) {
      const int query = panel * kPanel;
      bf16* const p = s.p + query - first;
      const V lse0 = load(s.lse + query), lse1 = load(s.lse + query + W);
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        const VI key = VI{} + row, near = lane_numbers() + query;
        const V weight0 = exp2<Core::kCoarse>(v0 - lse0), weight1 = exp2<Core::kCoarse>(v1 - lse1);
        store(p + (long)row * kPairLd, seen.kept(weight0, near, key));
        store(p + (long)row * kPairLd + W, seen.kept(weight1, near + W, key));
      };
    });
    multiply(s.v, wide, tokens, queries, s.d_out_columns, panel0, [=](int panel) {
      const int query = panel * kPanel;
      const bf16* const p = s.p + query - first;
      bf16* const d_s = s.d_s + query - first;
      const V delta0 = load(s.delta + query), delta1 = load(s.delta + query + W);
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        const long at = (long)row * kPairLd;
        store(d_s + at, load(p + at) * (v0 - delta0));
        store(d_s + at + W, load(p + at + W) * (v1 - delta1));
      };
    });
    pack(over_queries, s.d_out + (long)first * wide, wide, s.d_out_rows);
    multiply(s.p, kPairLd, tokens, over_queries, s.d_out_rows, 0, into(s.d_v, first > 0));
    pack(over_queries, s.q + (long)first * wide, wide, s.q_rows);
    multiply(s.d_s, kPairLd, tokens, over_queries, s.q_rows, 0, into(s.d_k, first > 0));

    const Linear keys = over_rows(tokens, count);
    pack(keys, s.d_s, kPairLd, s.d_s_rows);
    multiply(s.k_turned, Scratch::turned_ld(tokens), dim, keys, s.d_s_rows, 0, [=](int panel) {
      float* const out = s.d_q_turned + panel * kPanel;
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        store(out + (long)row * kPairQueries, v0);
        store(out + (long)row * kPairQueries + W, v1);
      };
    });
    for (int query = 0; query < count; query += W)
      for (int d = 0; d < dim; d += W) {
        V block[W];
        for (int i = 0; i < W; ++i)
          block[i] = load(s.d_q_turned + (long)(d + i) * kPairQueries + query);
        transpose(block);
        for (int i = 0; i < W; ++i) store(s.d_q + (long)(first + query + i) * wide + d, block[i]);
      }
  }

  // sum [T, wide] <- or += the product
  auto into(float* sum, bool add) const {
    const int ld = wide;
    return [=](int panel) {
      float* const out = sum + panel * kPanel;
      return [=](int row, V v0, V v1) __attribute__((always_inline)) {
        float* const p = out + (long)row * ld;
        store(p, add ? load(p) + v0 : v0);
        store(p + W, add ? load(p + W) + v1 : v1);
      };
    };
  }
};

template <class Core, class = void>
struct HeadOf {
  using type = PairHead<Core>;
};
template <class Core>
struct HeadOf<Core, typename Exists<typename Core::Weight>::type> {
  using type = VectorHead<Core>;
};

}  // namespace rx::cpu::RX_ISA
