// Attention of one head of one sample in fp32: scores, softmax, weighted sum of the values.
//
// K is transposed once per head into panels, then both products run through the same inner loop
// as the big ones, a tile of query rows at a time; scores never leave L1.
#pragma once

#include "micro_kernel.hpp"
#include "softmax.hpp"

namespace rx::cpu::RX_ISA {

// mixed[row0 + r, col..col + dim) <- softmax2(q k^T) v for the query rows r of `rows`.
// q, k, v [T, dim] with `stride` floats between rows; `scratch` holds attention_bytes().
template <class Seen>
RX_INLINE void attend_head(float* scratch, const float* q, const float* k, const float* v,
                           int stride, int T, int dim, Range rows, Mat<float> mixed, int row0,
                           int col, Seen seen) {
  const int padded = round_up(T, kPanel);
  float* const keys = scratch;                         // [padded / kPanel][dim][kPanel]
  float* const scores = scratch + (long)padded * dim;  // [kRows][padded]
  for (int key = 0; key < padded; key += W) {
    for (int d = 0; d < dim; d += W) {
      V block[W];
      for (int i = 0; i < W; ++i)
        block[i] = key + i < T ? load(k + (long)(key + i) * stride + d) : V{};
      transpose(block);
      float* const out = keys + (long)(key / kPanel * dim + d) * kPanel + key % kPanel;
      for (int i = 0; i < W; ++i) store(out + i * kPanel, block[i]);
    }
  }

  for_row_tiles(rows.begin, rows.end, [&](int row, auto m) __attribute__((always_inline)) {
    constexpr int kM = decltype(m)::value;
    for (int first = 0; first < padded; first += kPanel) {
      V acc[kM][2];
      clear(acc);
      accumulate(q + (long)row * stride, stride, PairPtr{keys + (long)first * dim, kPanel}, dim,
                 acc);
      store_tile(scores + first, acc, padded);
    }
    float inverse[kM];
    for (int r = 0; r < kM; ++r) {
      float* const p = scores + (long)r * padded;
      inverse[r] = seen.template softmax<false>(p, p, row + r, T);
    }
    const int valid = imin(kM, rows.end - row);  // rows past the end belong to another thread
    for (int d = 0; d < dim; d += kPanel) {
      V acc[kM][2];
      clear(acc);
      accumulate(scores, padded, PairPtr{v + d, stride}, T, acc);
      for (int r = 0; r < valid; ++r) {
        store(mixed.at(row0 + row + r, col + d), acc[r][0] * inverse[r]);
        if (d + W < dim) store(mixed.at(row0 + row + r, col + d + W), acc[r][1] * inverse[r]);
      }
    }
  });
}

}  // namespace rx::cpu::RX_ISA
