// Attention of one head of one sample with AVX512_BF16, BFDOT or BFMMLA.
#pragma once

#include "dot_kernel.hpp"
#include "softmax.hpp"

namespace rx::cpu::RX_ISA {

// mixed[row0 + r, col..col + dim) <- softmax2(q k^T) v for the query rows r of `rows`.
// q, k, v [T, dim] with `stride` elements between rows; `memory` holds attention_bytes(). lse
// [T, heads] if not null: log2 of the sum of a row's 2^scores.
template <class Seen>
static __attribute__((noinline)) void attend_pairs(char* memory, const bf16* q, const bf16* k,
                                                   const bf16* v, int stride, int T, int dim,
                                                   Range rows, Mat<bf16> mixed, int row0, int col,
                                                   float* lse, int heads, Seen seen) {
  if (rows.begin >= rows.end) return;
  const HeadTiles head(memory, T, dim, stride);
  head.pack_keys(k);
  head.pack_values(v);
  const int wide = round_up(T, W);
  const long key_tile = (long)head.depth_steps * kTileBytes;
  const long value_step = (long)head.column_tiles * kTileBytes;
  float* const scores = (float*)memory;  // [kRows][wide]
  bf16* const weights = (bf16*)memory;   // each row in place of its scores
  Nothing nothing;

  for_row_tiles(rows.begin, rows.end, [&](int row, auto m) __attribute__((always_inline)) {
    constexpr int kM = decltype(m)::value;
    const bf16* const queries = q + (long)row * stride;
    int tile = 0;
    for (; tile + 1 < head.key_tiles; tile += 2) {
      V acc[kM][2];
      clear(acc);
      accumulate_pairs(queries, stride, head.keys + tile * key_tile, key_tile, kTileBytes, dim / 2,
                       acc, nothing);
      store_tile(scores + tile * W, acc, wide);
    }
    if (tile < head.key_tiles) {
      V acc[kM][1];
      clear(acc);
      accumulate_pairs(queries, stride, head.keys + tile * key_tile, key_tile, kTileBytes, dim / 2,
                       acc, nothing);
      store_tile(scores + tile * W, acc, wide);
    }
    float inverse[kM];
    const int valid = imin(kM, rows.end - row);  // rows past the end belong to another thread
    for (int r = 0; r < kM; ++r) {
      float top;
      inverse[r] =
          seen.template softmax<true>(scores + r * wide, weights + 2L * r * wide, row + r, T, &top);
      if (lse && r < valid) lse[(long)(row + r) * heads] = top - log2f(inverse[r]);
    }

    int d = 0;
    for (; d + W < dim; d += kPanel) {
      V acc[kM][2];
      clear(acc);
      accumulate_pairs(weights, 2 * wide, head.values + d / W * kTileBytes, kTileBytes, value_step,
                       ceil_div(T, 2), acc, nothing);
      for (int r = 0; r < valid; ++r) {
        store(mixed.at(row0 + row + r, col + d), acc[r][0] * inverse[r]);
        store(mixed.at(row0 + row + r, col + d + W), acc[r][1] * inverse[r]);
      }
    }
    if (d < dim) {
      V acc[kM][1];
      clear(acc);
      accumulate_pairs(weights, 2 * wide, head.values + d / W * kTileBytes, kTileBytes, value_step,
                       ceil_div(T, 2), acc, nothing);
      for (int r = 0; r < valid; ++r)
        store(mixed.at(row0 + row + r, col + d), acc[r][0] * inverse[r]);
    }
  });
}

}  // namespace rx::cpu::RX_ISA
