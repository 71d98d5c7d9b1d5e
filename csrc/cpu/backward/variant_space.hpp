// Sizes of a window, and the scratch that variants need beside that of TRM's and HRM's blocks.
#pragma once

#include "../variant_rows.hpp"
#include "kept.hpp"

namespace rx::cpu::RX_ISA {

// The largest over the nets of a window.
struct WindowSizes {
  int samples, rows, hidden, inner = 0, token_inner = 0, heads = 0, head_dim = 0, blocks = 0,
                             all_blocks = 0;
  int mixed;  // D, or the widest heads together
  int taps = 0;
  bool token_mlp = false, variants = false, convolves_pairs = false, has_lines = false,
       has_own_heads = false, drops = false, padding = false;

  explicit WindowSizes(const Recursion& rec)
      : samples(Slices(rec).largest()),
        rows(samples * rec.tokens),
        hidden(rec.hidden),
        mixed(hidden) {
    for (int n = 0; n < rec.num_nets; ++n) {
      blocks = imax(blocks, rec.nets[n].num_blocks);
      all_blocks += rec.nets[n].num_blocks;
      for (int i = 0; i < rec.nets[n].num_blocks; ++i) {
        const BlockShape& s = rec.nets[n].blocks[i].shape;
        const Variant& v = s.variant;
        inner = imax(inner, round_up(s.inner, kAlign));
        variants |= v.on;
        taps = imax(taps, v.conv);
        convolves_pairs |= v.conv && v.conv_of_gate_up;
        has_lines |= v.axial[0] > 0;
        drops |= v.dropout > 0.f || v.drop_path > 0.f;
        padding |= v.key_padding;
        if (s.token_mlp) {
          token_mlp = true;
          token_inner = imax(token_inner, round_up(s.token_inner, kAlign));
        } else {
          heads = imax(heads, s.heads);
          head_dim = imax(head_dim, s.head_dim);
          mixed = imax(mixed, s.heads * s.head_dim);
          has_own_heads |= own_heads(s);
        }
      }
    }
  }
};

// Samples whose columns go through a token MLP at once.
RX_INLINE int token_samples(const WindowSizes& sizes) {
  return imax(1, imin(sizes.samples, 1024 / sizes.hidden));
}

// One of the two MLPs of a block: rows of h, or of h turned over.
template <class Core>
struct InnerMlp {
  BlockWeight in, out;
  int rows, inner;
  int norm;  // the vector, -1 without an inner norm
  bool convolved;
  typename Core::State* pairs;  // gate and up, or up alone, with their biases
  Mat<typename Core::Act> middle, wide;

  int padded() const { return round_up(inner, kAlign); }
};

// R rows of a slice, C columns of h that go through a token MLP at once, M the larger area of the
// middles over D [R, F] and over T [C, G].
template <class Core>
struct VariantSpace {
  using Act = typename Core::Act;

  // of the team
  Mat<Act> normed;            // [R, D]: what a sublayer reads
  Mat<Act> mixed;             // [R, H dim]: what `o` reads; the gradient of the gate
  float* stage;               // M: what the convolution of a middle reads
  float* pairs;               // [R, 2F]: gate and up convolved
  float *token_x, *token_y;   // [C, T]: h turned over; a result of the MLP
  float* stats;               // mean and scale of each normed row
  float* d_n;                 // [R, D] or [C, T], of what a sublayer reads; all from here are
  float* token_d;             // of the backward
  float *d_middle, *d_pairs;  // M and [R, 2F]
  float* d_lines;             // [R, H dim], rows in the order of the lines of a grid
  Mat<Act> d_heads;           // [R, (H + 2 KV) dim]
  float* products;            // [D]: of a scalar's gradient
  float* dropped;             // [R, D] or [C, T]: factors of a sublayer's result
  // of a thread
  float *row, *other;      // the widest row
  float *strip, *d_strip;  // of a convolution
  float* sums;             // of its weights
  int* place;              // [R]: where a row lies among the lines
  int32_t* keys;           // of a line, and kSpareKeys: whether they are seen

  void carve_shared(const Recursion& rec, const WindowSizes& z, Carver& c, bool back) {
    const auto matrix = [&](int cols) {
      const int rows = z.rows + Core::kSpareRows;
      return make_mat(c.take<Act>(mat_size(rows, cols)), rows, cols);
    };
    const size_t columns = z.token_mlp ? (size_t)token_samples(z) * z.hidden : 0;
    const size_t over = columns * round_up(rec.tokens, kAlign), middle = middle_size(z, columns);
    const int wide = round_up(z.mixed, kAlign);
    normed = matrix(z.hidden);
    mixed = matrix(wide);
    stage = c.take<float>(middle);
    pairs = c.take<float>(z.convolves_pairs ? 2 * (size_t)z.rows * z.inner : 0);
    token_x = c.take<float>(over);
    token_y = c.take<float>(over);
    if (!back) return;
    const size_t head_rows = (size_t)z.rows * (z.heads + 1) * 2;
    stats = c.take<float>(2 * (head_rows > columns ? head_rows : columns));
    d_n = c.take<float>((size_t)z.rows * z.hidden);
    token_d = c.take<float>(over);
    d_middle = c.take<float>(middle);
    d_pairs = c.take<float>(z.convolves_pairs ? 2 * (size_t)z.rows * z.inner : 0);
    d_lines = c.take<float>(z.has_lines ? (size_t)z.rows * z.mixed : 0);
    if (z.has_own_heads) d_heads = matrix(3 * wide);
    products = c.take<float>(imax(z.hidden, round_up(rec.tokens, kAlign)));
    const size_t results = (size_t)z.rows * z.hidden;
    dropped = c.take<float>(z.drops ? results > over ? results : over : 0);
  }

  void carve_own(const Recursion& rec, const WindowSizes& z, Carver& c) {
    const int tokens = round_up(rec.tokens, kAlign);
    const int widest = imax(imax(round_up(z.mixed, kAlign), z.inner), imax(z.token_inner, tokens));
    row = c.take<float>(widest);
    other = c.take<float>(widest);
    const size_t strips = z.taps ? (size_t)(rec.tokens + z.taps) * kStrip : 0;
    strip = c.take<float>(strips);
    d_strip = c.take<float>(strips);
    sums = c.take<float>((size_t)2 * (z.taps + 1) * kStrip);
    place = c.take<int>(z.rows);
    keys = c.take<int32_t>(z.padding ? rec.tokens + kSpareKeys : 0);
  }

 private:
  static size_t middle_size(const WindowSizes& z, size_t columns) {
    const size_t over_d = (size_t)z.rows * z.inner, over_t = columns * z.token_inner;
    return over_d > over_t ? over_d : over_t;
  }
};

}  // namespace rx::cpu::RX_ISA
