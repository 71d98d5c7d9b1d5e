// Scratch of one team: what its samples share, and what each thread keeps for itself.
#pragma once

#include "drops.hpp"
#include "layout.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kTokenRows = 128;  // columns of h that a thread takes through the token MLP at once

// Hands out aligned pieces of one allocation; with base = null it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(size_t count) {
    T* p = (T*)(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

template <class Core>
struct Workspace {
  using Act = typename Core::Act;

  int rows;          // S * T of the group
  int rows_pad;      // and the rows that a last tile may run over
  Mat<Act> x, y, z;  // un-normalised rows of h, in turn
  Act *q, *k, *v;    // [heads][rows_pad][head_stride]
  int head_stride;
  Mat<Act> mixed, middle;        // attention's output; silu(gate) * up
  Mat<Act> up;                   // of a variant, whose `middle` is the gate then
  float* sums;                   // [D / kSumColumns][rows_pad][W]: partial sums of squares
  typename Core::State* inject;  // [rows, D]: the injected sum that is kept

  // of this thread
  float *scale_a, *scale_b, *scale_q;  // [rows_pad]
  int* position;                       // [rows_pad]: token of each row
  typename Core::Scratch gemm;
  char* attention;                             // Core's own layout
  Mat<Act> token_in, token_middle, token_out;  // [kTokenRows, T | token_inner | T]
  float *token_sums, *token_scale;
  Mat<Act> token_up;      // as `up`
  Mat<Act> token_normed;  // of a variant, as all that follows
  float* row;             // the widest row, padded
  float* strip;           // of a convolution
  int* place;             // [rows_pad]: where a row of h lies among the lines of attention
  int32_t* keys;          // of a line, and kSpareKeys: whether they are seen; or null
  Act* unread;            // what columns of padding are written to

  static size_t carve(const Recursion& rec, int samples, int team_size, int tid, char* base,
                      Workspace& w) {
    const int T = rec.tokens, D = rec.hidden;
    Carver c{base};
    w.rows = samples * T;
    w.rows_pad = w.rows + Core::kSpareRows;
    int inner = 0, token_inner = 0, heads = 0, up = 0, mixed = D, taps = 0;
    bool variants = false, padding = false;
    w.head_stride = 0;
    for (int n = 0; n < rec.num_nets; ++n) {
      for (int i = 0; i < rec.nets[n].num_blocks; ++i) {
        const BlockShape& s = rec.nets[n].blocks[i].shape;
        const Variant& v = s.variant;
        inner = imax(inner, round_up(s.inner, kAlign));
        variants |= v.on;
        padding |= v.key_padding;
        if (v.on && v.gated && (v.norm_of_product || v.conv_of_gate_up))
          up = imax(up, round_up(s.inner, kAlign));
        if (v.on) taps = imax(taps, v.conv);
        if (s.token_mlp) {
          token_inner = imax(token_inner, round_up(s.token_inner, kAlign));
        } else if (has_matrix(s, mixer_in)) {
          mixed = imax(mixed, round_up(s.heads * s.head_dim, kAlign));
          heads = imax(heads, Heads{s.heads, s.head_dim}.padded());
          w.head_stride = imax(w.head_stride, round_up(s.head_dim, Core::kHeadAlign));
        }
      }
    }
    auto matrix = [&](int rows, int cols) {
      return make_mat(c.take<Act>(mat_size(rows, cols)), rows, cols);
    };
    w.x = matrix(w.rows_pad, D);
    w.y = matrix(w.rows_pad, D);
    w.z = matrix(w.rows_pad, D);
    w.middle = matrix(w.rows_pad, inner);
    w.sums = c.take<float>((size_t)ceil_div(D, kSumColumns) * w.rows_pad * W);
    if (up) w.up = matrix(w.rows_pad, up);
    w.inject = c.take<typename Core::State>((size_t)w.rows * D);
    const bool attends = heads > 0, mixes_tokens = token_inner > 0;
    if (attends) {
      const size_t head_rows = (size_t)heads * w.rows_pad * w.head_stride;
      w.q = c.take<Act>(head_rows);
      w.k = c.take<Act>(head_rows);
      w.v = c.take<Act>(head_rows);
      w.mixed = matrix(w.rows_pad, mixed);
    }
    // Of one product.
    const int most_rows = imax(w.rows_pad, mixes_tokens ? kTokenRows + Core::kSpareRows : 0);
    const int deepest = imax(imax(mixed, inner), mixes_tokens ? imax(T, token_inner) : 0);
    for (int t = 0; t < team_size; ++t) {
      Workspace skipped;
      Workspace& own = t == tid ? w : skipped;
      own.scale_a = c.take<float>(w.rows_pad);
      own.scale_b = c.take<float>(w.rows_pad);
      own.scale_q = c.take<float>(w.rows_pad);
      own.position = c.take<int>(w.rows_pad);
      own.gemm = Core::carve_scratch(c, most_rows, deepest);
      if (attends) own.attention = c.take<char>(Core::attention_bytes(T, w.head_stride));
      if (mixes_tokens) {
        const int slab = kTokenRows + Core::kSpareRows, cols = round_up(T, kAlign);
        own.token_in = matrix(slab, cols);
        own.token_out = matrix(slab, cols);
        own.token_middle = matrix(slab, token_inner);
        own.token_sums = c.take<float>((size_t)ceil_div(cols, kSumColumns) * slab * W);
        own.token_scale = c.take<float>(slab);
        if (variants) own.token_normed = matrix(slab, cols);
        if (variants && up) own.token_up = matrix(slab, token_inner);
      }
      own.row = c.take<float>(
          round_up(imax(imax(mixed, inner), variants ? imax(T, token_inner) : 0), kAlign));
      if (!variants) continue;
      own.strip = c.take<float>(taps ? (size_t)(T + taps) * 4 * W : 0);
      own.place = c.take<int>(w.rows_pad);
      own.unread = c.take<Act>(W);
      own.keys = c.take<int32_t>(padding ? T + kSpareKeys : 0);
    }
    return c.used;
  }
};

}  // namespace rx::cpu::RX_ISA
