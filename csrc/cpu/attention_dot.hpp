// Attention of one head of one sample with AVX512_BF16 or BFDOT, and the inner loop of all its
// products.
#pragma once

#include "dot.hpp"
#include "micro_kernel.hpp"
#include "pairs.hpp"
#include "softmax.hpp"

namespace rx::cpu::RX_ISA {

// acc[r][v] += A[r, 0..2 pairs) * B, whose column tile v lies `side` bytes after the one before and
// whose next tile of the depth lies `step` bytes on. `beside` is told of every whole tile.
template <int kM, int kN, class Beside>
RX_INLINE void accumulate_pairs(const bf16* a, long lda, const char* b, long side, long step,
                                int pairs, V (&acc)[kM][kN], Beside& beside) {
  const auto pair = [&](int k) __attribute__((always_inline)) {
    V column[kN];
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) column[v] = load((const float*)(b + v * side) + k * W);
#pragma GCC unroll 16
    for (int r = 0; r < kM; ++r) {
      const V x = splat_pair(a + r * lda + 2 * k);
#pragma GCC unroll 2
      for (int v = 0; v < kN; ++v) acc[r][v] = dot(acc[r][v], x, column[v]);
    }
  };
  for (; pairs >= 16; pairs -= 16) {
    beside.step();
#pragma GCC unroll 4
    for (int k = 0; k < 16; ++k) pair(k);
    a += kTileDepth;
    b += step;
  }
  for (int k = 0; k < pairs; ++k) pair(k);
}

// mixed[row0 + r, col..col + dim) <- softmax2(q k^T) v for the query rows r of `rows`.
// q, k, v [T, dim] with `stride` elements between rows; `memory` holds attention_bytes(). lse
// [T, heads] if not null: log2 of the sum of a row's 2^scores.
static __attribute__((noinline)) void attend_pairs(char* memory, const bf16* q, const bf16* k,
                                                   const bf16* v, int stride, int T, int dim,
                                                   Range rows, Mat<bf16> mixed, int row0, int col,
                                                   float* lse, int heads) {
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
      inverse[r] = softmax2<true>(scores + r * wide, weights + 2L * r * wide, T, &top);
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
