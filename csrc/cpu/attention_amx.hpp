// Attention of one head of one sample with AMX.
//
// Tiles of query rows go through three stages: scores S = q k^T (tiles), softmax (vectors), and the
// weighted sum P v (tiles). The stages of three neighbouring tiles overlap: between the rows of
// softmax(i) stand the tile products of S(i + 1) and of P v (i - 1).
#pragma once

#include "pairs.hpp"
#include "softmax.hpp"
#include "tile.hpp"

namespace rx::cpu::RX_ISA {

class AmxAttention {
 public:
  AmxAttention(char* memory, int T, int dim, int stride, int rows)
      : head_(memory, T, dim, stride), T_(T), dim_(dim), stride_(stride), rows_(rows) {
    wide_ = head_.key_steps * kTileDepth;
    for (int i = 0; i < 2; ++i) {
      scores_[i] = take<float>(memory, 16 * wide_);
      weights_[i] = take<bf16>(memory, 16 * wide_);
      sums_[i] = take<float>(memory, 16 * dim);
      inverse_[i] = take<float>(memory, 16);
    }
  }

  static size_t bytes(int T, int head_stride) {
    const size_t keys = round_up(T, kTileDepth);
    return HeadTiles::bytes(T, head_stride) + 2 * 16 * (keys * 6 + head_stride * 4 + 64) + 1024;
  }

  // mixed[row0 + r, col..col + dim) <- softmax2(q k^T) v for the query rows r of `rows`.
  // q, k, v [T, dim] with `stride` elements between rows. lse [T, heads] if not null: log2 of the
  // sum of a row's 2^scores.
  template <class Seen>
  void run(bf16* q, bf16* k, const bf16* v, Range rows, Mat<bf16> mixed, int row0, int col,
           float* lse, int heads, Seen seen) {
    clear_padding(q, rows.end);
    clear_padding(k, T_);
    head_.pack_keys(k);
    head_.pack_values(v);
    memset(weights_[0], 0, 16 * wide_ * sizeof(bf16));
    memset(weights_[1], 0, 16 * wide_ * sizeof(bf16));
    const int tiles = ceil_div(rows.end - rows.begin, rows_);
    const int score_ops = ceil_div(head_.key_tiles, 2);
    const int sum_ops = ceil_div(head_.column_tiles, 4) * head_.key_steps;
    const bf16* const q0 = q + (long)rows.begin * stride_;
    for (int op = 0; op < score_ops; ++op) score(q0, 0, op, score_ops);
    for (int i = 0; i <= tiles; ++i) {
      const int scores = i + 1 < tiles ? score_ops : 0;
      const int ops = scores + (i > 0 ? sum_ops : 0);
      int op = 0;
      const auto advance = [&](int until) __attribute__((always_inline)) {
        for (; op < until; ++op) {
          if (op < scores) {
            score(q0 + (long)(i + 1) * rows_ * stride_, (i + 1) & 1, op, score_ops);
          } else {
            weigh((i - 1) & 1, op - scores);
          }
        }
      };
      if (i < tiles) {
        for (int r = 0; r < rows_; ++r) {
          advance(ops * (r + 1) / rows_);
          const int row = rows.begin + i * rows_ + r;
          float top;
          const float inverse = seen.template softmax<true>(
              scores_[i & 1] + r * wide_, weights_[i & 1] + r * wide_, row, T_, &top);
          inverse_[i & 1][r] = inverse;
          if (lse && row < rows.end) lse[(long)row * heads] = top - log2f(inverse);
        }
      }
      advance(ops);
      if (i > 0) {
        const int first = rows.begin + (i - 1) * rows_;
        write((i - 1) & 1, imin(rows_, rows.end - first), mixed, row0 + first, col);
      }
    }
  }

 private:
  template <class T>
  static T* take(char*& memory, size_t count) {
    T* p = (T*)memory;
    memory += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }

  // Columns dim.. up to the depth of a tile take part in q k^T.
  void clear_padding(bf16* rows, int count) const {
    const int pad = head_.depth_steps * kTileDepth - dim_;
    if (pad == 0) return;
    for (int r = 0; r < count; ++r) memset(rows + (long)r * stride_ + dim_, 0, pad * sizeof(bf16));
  }

  // Scores of the key tiles 2 op and 2 op + 1; stores those of the pair before, whose products
  // have had time to end. The last op stores its own too.
  void score(const bf16* q, int buffer, int op, int ops) {
    const bool second = 2 * op + 1 < head_.key_tiles;
    float* const out = scores_[buffer] + op * 32;
    if (op % 2 == 0) {
      score_pair<0>(q, op, second);
      if (op > 0) store_pair<2>(out - 32, true);
      if (op == ops - 1) store_pair<0>(out, second);
    } else {
      score_pair<2>(q, op, second);
      store_pair<0>(out - 32, true);
      if (op == ops - 1) store_pair<2>(out, second);
    }
  }

  template <int kC>
  void score_pair(const bf16* q, int op, bool second) {
    const char* b = head_.keys + (long)op * 2 * head_.depth_steps * kTileBytes;
    tile_zero<kC>();
    if (second) tile_zero<kC + 1>();
    for (int step = 0; step < head_.depth_steps; ++step) {
      tile_load<4>(q + step * kTileDepth, stride_ * (long)sizeof(bf16));
      tile_load<6>(b + step * kTileBytes, 64);
      tile_dot<kC, 4, 6>();
      if (second) {
        tile_load<7>(b + (head_.depth_steps + step) * kTileBytes, 64);
        tile_dot<kC + 1, 4, 7>();
      }
    }
  }

  template <int kC>
  void store_pair(float* out, bool second) {
    tile_store<kC>(out, wide_ * (long)sizeof(float));
    if (second) tile_store<kC + 1>(out + 16, wide_ * (long)sizeof(float));
  }

  // One step of 32 keys of P v for up to four column tiles.
  void weigh(int buffer, int op) {
    const int step = op % head_.key_steps, first = op / head_.key_steps * 4;
    const int count = imin(4, head_.column_tiles - first);
    if (step == 0) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    const char* const b = head_.values + (long)(step * head_.column_tiles + first) * kTileBytes;
    tile_load<4>(weights_[buffer] + step * kTileDepth, wide_ * (long)sizeof(bf16));
    weigh_tile<0, 6>(b, count);
    weigh_tile<1, 7>(b, count);
    weigh_tile<2, 6>(b, count);
    weigh_tile<3, 7>(b, count);
    if (step + 1 < head_.key_steps) return;
    float* const out = sums_[buffer] + first * 16;
    store_sums<0>(out, count);
    store_sums<1>(out, count);
    store_sums<2>(out, count);
    store_sums<3>(out, count);
  }

  template <int kC, int kB>
  static void weigh_tile(const char* b, int count) {
    if (kC >= count) return;
    tile_load<kB>(b + kC * kTileBytes, 64);
    tile_dot<kC, 4, kB>();
  }

  template <int kC>
  void store_sums(float* out, int count) const {
    if (kC < count) tile_store<kC>(out + kC * 16, dim_ * (long)sizeof(float));
  }

  void write(int buffer, int count, Mat<bf16> mixed, int row, int col) const {
    for (int r = 0; r < count; ++r) {
      const V scale = splat(inverse_[buffer][r]);
      for (int d = 0; d < dim_; d += W)
        store(mixed.at(row + r, col + d), load(sums_[buffer] + r * dim_ + d) * scale);
    }
  }

  HeadTiles head_;
  int T_, dim_, stride_, rows_;
  int wide_;  // T, padded to whole steps
  float *scores_[2], *sums_[2], *inverse_[2];
  bf16* weights_[2];
};

}  // namespace rx::cpu::RX_ISA
