// Attention of one head of one sample with AMX.
//
// Tiles of query rows go through three stages: scores S = q k^T (tiles), softmax (vectors), and the
// weighted sum P v (tiles). The stages of three neighbouring tiles overlap: between the rows of
// softmax(i) stand the tile products of S(i + 1) and of P v (i - 1).
#pragma once

#include "layout.hpp"
#include "softmax.hpp"
#include "tile.hpp"

namespace rx::cpu::RX_ISA {

class AmxAttention {
 public:
  AmxAttention(char* memory, int T, int dim, int stride, int rows)
      : T_(T), dim_(dim), stride_(stride), rows_(rows) {
    depth_steps_ = ceil_div(dim, kTileDepth);
    key_steps_ = ceil_div(T, kTileDepth);
    key_tiles_ = ceil_div(T, 16);
    column_tiles_ = dim / 16;
    wide_ = key_steps_ * kTileDepth;
    keys_ = take<char>(memory, (size_t)key_steps_ * 2 * depth_steps_ * kTileBytes);
    values_ = take<char>(memory, (size_t)key_steps_ * column_tiles_ * kTileBytes);
    for (int i = 0; i < 2; ++i) {
      scores_[i] = take<float>(memory, 16 * wide_);
      weights_[i] = take<bf16>(memory, 16 * wide_);
      sums_[i] = take<float>(memory, 16 * dim);
      inverse_[i] = take<float>(memory, 16);
    }
  }

  static size_t bytes(int T, int head_stride) {
    const size_t keys = round_up(T, kTileDepth);
    return keys * head_stride * 4 + 2 * 16 * (keys * 6 + head_stride * 4 + 64) + 1024;
  }

  // mixed[row0 + r, col..col + dim) <- softmax2(q k^T) v for the query rows r of `rows`.
  // q, k, v [T, dim] with `stride` elements between rows.
  void run(bf16* q, bf16* k, const bf16* v, Range rows, Mat<bf16> mixed, int row0, int col) {
    clear_padding(q, rows.end);
    clear_padding(k, T_);
    pack_keys(k);
    pack_values(v);
    memset(weights_[0], 0, 16 * wide_ * sizeof(bf16));
    memset(weights_[1], 0, 16 * wide_ * sizeof(bf16));
    const int tiles = ceil_div(rows.end - rows.begin, rows_);
    const int score_ops = ceil_div(key_tiles_, 2);
    const int sum_ops = ceil_div(column_tiles_, 4) * key_steps_;
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
          inverse_[i & 1][r] =
              softmax2<true>(scores_[i & 1] + r * wide_, weights_[i & 1] + r * wide_, T_);
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
    const int pad = depth_steps_ * kTileDepth - dim_;
    if (pad == 0) return;
    for (int r = 0; r < count; ++r) memset(rows + (long)r * stride_ + dim_, 0, pad * sizeof(bf16));
  }

  // keys: [tile of 16 keys][step][pair of dims][key]: 16 x 16 transposes of pairs.
  void pack_keys(const bf16* k) {
    for (int tile = 0; tile < 2 * key_steps_; ++tile) {
      for (int step = 0; step < depth_steps_; ++step) {
        V block[W];
        for (int i = 0; i < W; ++i) {
          const int key = tile * 16 + i;
          block[i] =
              key < T_ ? load((const float*)(k + (long)key * stride_ + step * kTileDepth)) : V{};
        }
        transpose(block);
        float* const out = (float*)(keys_ + (long)(tile * depth_steps_ + step) * kTileBytes);
        for (int i = 0; i < W; ++i) store(out + i * 16, block[i]);
      }
    }
  }

  // values: [step of 32 keys][tile of 16 columns][pair of keys][column][key of the pair]
  void pack_values(const bf16* v) {
    for (int step = 0; step < key_steps_; ++step) {
      for (int tile = 0; tile < column_tiles_; ++tile) {
        float* const out = (float*)(values_ + (long)(step * column_tiles_ + tile) * kTileBytes);
        for (int pair = 0; pair < 16; ++pair) {
          const int key = step * kTileDepth + 2 * pair;
          const bf16* const p = v + (long)key * stride_ + tile * 16;
          const VU even = key < T_ ? (VU)load(p) >> 16 : VU{};
          const VU odd = key + 1 < T_ ? (VU)load(p + stride_) : VU{};
          store(out + pair * 16, (V)(even | odd));
        }
      }
    }
  }

  // Scores of the key tiles 2 op and 2 op + 1; stores those of the pair before, whose products
  // have had time to end. The last op stores its own too.
  void score(const bf16* q, int buffer, int op, int ops) {
    const bool second = 2 * op + 1 < key_tiles_;
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
    const char* b = keys_ + (long)op * 2 * depth_steps_ * kTileBytes;
    tile_zero<kC>();
    if (second) tile_zero<kC + 1>();
    for (int step = 0; step < depth_steps_; ++step) {
      tile_load<4>(q + step * kTileDepth, stride_ * (long)sizeof(bf16));
      tile_load<6>(b + step * kTileBytes, 64);
      tile_dot<kC, 4, 6>();
      if (second) {
        tile_load<7>(b + (depth_steps_ + step) * kTileBytes, 64);
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
    const int step = op % key_steps_, first = op / key_steps_ * 4;
    const int count = imin(4, column_tiles_ - first);
    if (step == 0) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    const char* const b = values_ + (long)(step * column_tiles_ + first) * kTileBytes;
    tile_load<4>(weights_[buffer] + step * kTileDepth, wide_ * (long)sizeof(bf16));
    weigh_tile<0, 6>(b, count);
    weigh_tile<1, 7>(b, count);
    weigh_tile<2, 6>(b, count);
    weigh_tile<3, 7>(b, count);
    if (step + 1 < key_steps_) return;
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

  int T_, dim_, stride_, rows_;
  int depth_steps_;   // tile depths of head_dim
  int key_steps_;     // tile depths of T
  int key_tiles_;     // tiles of 16 keys
  int column_tiles_;  // tiles of 16 columns of v
  int wide_;          // T, padded to whole steps
  char *keys_, *values_;
  float *scores_[2], *sums_[2], *inverse_[2];
  bf16* weights_[2];
};

}  // namespace rx::cpu::RX_ISA
