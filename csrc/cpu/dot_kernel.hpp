// The inner loop of all products of cores of bf16 pairs: rows by column tiles, accumulators in
// registers.
#pragma once

#include "dot.hpp"
#include "micro_kernel.hpp"
#include "pairs.hpp"

namespace rx::cpu::RX_ISA {

#if defined(RX_BFMMLA)

// BFMMLA's accumulator is two rows of a tile by two of its columns, its operands are 4 k of each:
//
//   a: [2 rows][4 k]     b: [2 columns][4 k]     c: [2 rows][2 columns]
//
// It adds the pairs in turn and rounds as BFDOT does, so that the bits are those of BFDOT. Two
// pairs of a column's tile interleaved are its operand: packed weights and heads are the same.
RX_INLINE V mmla(V acc, V a, V b) {
  return (V)vbfmmlaq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

// Rows of W columns as accumulators, and accumulators as rows: its own inverse.
RX_INLINE void exchange_halves(V& upper, V& lower) {
  const float64x2_t u = (float64x2_t)upper, l = (float64x2_t)lower;
  upper = (V)vzip1q_f64(u, l);
  lower = (V)vzip2q_f64(u, l);
}

// kBytes of each of two rows, 4 k or 2 and zeros; of one row and zeros without kBoth.
template <int kCount>
struct Bytes {
  static constexpr int value = kCount;
};
template <int kBytes, bool kBoth>
RX_INLINE V two_rows(const bf16* p, long ld) {
  float64x1_t upper = {}, lower = {};
  memcpy(&upper, p, kBytes);
  if (kBoth) memcpy(&lower, p + ld, kBytes);
  return (V)vcombine_f64(upper, lower);
}

// acc[r][v] += A[r, 0..2 pairs) * B, whose column tile v lies `side` bytes after the one before and
// whose next tile of the depth lies `step` bytes on. `beside` is told of every whole tile.
template <int kM, int kN, class Beside>
RX_INLINE void accumulate_pairs(const bf16* a, long lda, const char* b, long side, long step,
                                int pairs, V (&acc)[kM][kN], Beside& beside) {
  constexpr int kTwos = (kM + 1) / 2;
  V c[2 * kTwos][kN];  // rows, then accumulators
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kTwos; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) c[r][v] = r < kM ? acc[r][v] : V{};
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kTwos; r += 2)
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) exchange_halves(c[r][v], c[r + 1][v]);

  // Pairs k and k + 1, or the last one alone: what follows it in A need not be a number.
  const auto pair = [&](int k, auto bytes) __attribute__((always_inline)) {
    constexpr int kBytes = decltype(bytes)::value;
    V column[kN][2];
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) {
      const float* const p = (const float*)(b + v * side) + k * W;
      const V first = load(p), second = kBytes == 8 ? load(p + W) : V{};
      column[v][0] = low_lanes(first, second);
      column[v][1] = high_lanes(first, second);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 2 * kTwos; r += 2) {
      const bf16* const p = a + r * lda + 2 * k;
      const V x = r + 1 < kM ? two_rows<kBytes, true>(p, lda) : two_rows<kBytes, false>(p, lda);
#pragma GCC unroll 2
      for (int v = 0; v < kN; ++v) {
        c[r][v] = mmla(c[r][v], x, column[v][0]);
        c[r + 1][v] = mmla(c[r + 1][v], x, column[v][1]);
      }
    }
  };
  for (; pairs >= 16; pairs -= 16) {
    beside.step();
    for (int k = 0; k < 16; k += 2) pair(k, Bytes<8>());
    a += kTileDepth;
    b += step;
  }
  int k = 0;
  for (; k + 1 < pairs; k += 2) pair(k, Bytes<8>());
  if (k < pairs) pair(k, Bytes<4>());

#pragma GCC unroll 16
  for (int r = 0; r < 2 * kTwos; r += 2)
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) exchange_halves(c[r][v], c[r + 1][v]);
#pragma GCC unroll 16
  for (int r = 0; r < kM; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) acc[r][v] = c[r][v];
}

#else

// acc as above.
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

#endif

}  // namespace rx::cpu::RX_ISA
