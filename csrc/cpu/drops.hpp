// What blocks read beside h and their weights: dropout and stochastic depth from a counter
// (recurx/reference.py, `dropped`), and which keys are padding.
#pragma once

#include "factors.hpp"

namespace rx::cpu::RX_ISA {

// Where a block runs: the sample of its first row in the batch, its call, its place in the net.
struct Beside {
  int sample, call, block;
};

// Of one sublayer: what its result is multiplied by, 0 or 1 / (1 - share).
struct Drops {
  float share = 0.f, path = 0.f;
  uint64_t seed = 0;
  uint32_t call = 0, use = 0;
  long sample = 0;  // of the first row, in the stream
  int tokens = 1, hidden = 1;

  bool matter() const { return share > 0.f || path > 0.f; }

  // x[0..hidden) of row `row` of h.
  void of_row(long row, float* x) const {
    apply(sample + row / tokens, row % tokens * hidden, x, hidden);
  }
  // x[0..tokens) of column `column` of all samples' h, which is row `column` of h turned over.
  void of_column(long column, float* x) const {
    apply(sample + column / hidden, column % hidden * tokens, x, tokens);
  }

 private:
  // Elements `first` and on of the sample's result.
  __attribute__((noinline)) void apply(long entry, long first, float* x, int width) const {
    float by[4 * W];
    if (path > 0.f) {
      factors(path, use + 4, entry, VU{}, by);
      for (int col = 0; col < width; ++col) x[col] *= by[0];
    }
    if (share <= 0.f) return;
    for (int col = -(int)(first % 4); col < width; col += 4 * W) {
      factors(share, use, entry, (VU)lane_numbers() + (uint32_t)((first + col) / 4), by);
      const int end = imin(4 * W, width - col);
      for (int i = col < 0 ? -col : 0; i < end; ++i) x[col + i] *= by[i];
    }
  }

  // Of the four numbers of each of these quads, in order.
  void factors(float dropped, uint32_t what, long entry, VU quads, float* by) const {
    const VU zero{};
    const FourWords words =
        philox({{quads, zero + (uint32_t)entry, zero + call, zero + what}}, seed);
    const V grown = splat((float)(1.0 / (1.0 - (double)dropped)));
    V n[4];
    for (int i = 0; i < 4; ++i) {
      const V chance = __builtin_convertvector((VI)(words.w[i] >> 8), V) * 5.9604644775390625e-8f;
      n[i] = chance >= dropped ? grown : V{};
    }
    store_fours(n, by);
  }
};

// Of sublayer 1 or 2 of a block.
RX_INLINE Drops drops_of(const Recursion& rec, const Variant& v, const Beside& beside, int number) {
  return {v.dropout,
          v.drop_path,
          rec.seed,
          (uint32_t)beside.call,
          kDrops + 4 * (4 * (uint32_t)beside.block + 2 * (uint32_t)number),
          rec.first + beside.sample,
          rec.tokens,
          rec.hidden};
}

// Keys of a line beyond its end that attention may ask for: those of a last tile of rows.
constexpr int kSpareKeys = 64;

// Which keys of the line that begins at `row` (rows in the order of lines) are seen: -1, else 0;
// `to` has room for kSpareKeys more. Null where all are.
RX_INLINE const int32_t* seen_keys(const Recursion& rec, const Variant& v, const Beside& beside,
                                   long row, int32_t* to) {
  if (!v.key_padding) return nullptr;
  const int line = v.line(rec.tokens), within = (int)(row % rec.tokens);
  const bool columns = v.axial[0] && v.axial[2] == 0;
  const uint8_t* const unseen = rec.key_mask + (beside.sample + row / rec.tokens) * rec.tokens;
  for (int i = 0; i < line; ++i)
    to[i] = unseen[columns ? within / line + i * v.axial[1] : within + i] ? 0 : -1;
  for (int i = line; i < line + kSpareKeys; ++i) to[i] = 0;
  return to;
}

}  // namespace rx::cpu::RX_ISA
