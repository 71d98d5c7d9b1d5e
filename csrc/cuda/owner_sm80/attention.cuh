// attention.cuh - attn(rope(Q h), rope(K h), V h), the operand of O.
//
// Unit by unit (one head of 64 or 128, or two of 32): the product makes Q, K and V of the unit, its
// epilogue applies the row scales and the rotation and stores Q to scratch, K and V to shared
// memory; then each warp takes row tiles of queries, with all their scores in registers.
//
// Heads that share a K/V head make its K and V anew, each for itself: the tape repeats the weights
// (pack.cu), and this code knows nothing of groups.
#pragma once
#include "product.cuh"

namespace owner_sm80 {

// Column tiles of Q (and K, V) in a unit.
template <int kColumns>
constexpr int kUnitBlocks = kColumns / 8;

enum class Part { kQuery, kKey };

// First tokens of the row tiles of a group of samples, one after the other.
struct TokenCounter {
  const int sample_tiles;
  int tile = rx::opaque(0);
  RX_DEVICE int next() {
    const int token = tile * 16;
    tile = tile + 1 == sample_tiles ? 0 : tile + 1;
    return token;
  }
};

// Scales, rotates and stores a pair of column tiles of Q or K. The rotation pairs column j of a
// head with j + head_dim / 2: pair `n` of a unit holds both.
template <class P, int kColumns>
RX_DEVICE void store_rotated(Owner<P>& o, const float (&acc_lo)[4], const float (&acc_hi)[4], int i,
                             int token0, int n, Part part, int head_dim) {
  constexpr int kBlocks = kUnitBlocks<kColumns>;
  const RxRecursion& r = o.p.r;
  const int apart = head_dim / 16, in_head = n % apart;  // in column tiles
  const int lo_block = n / apart * 2 * apart + in_head, hi_block = lo_block + apart;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (!o.is_stored(i, half)) continue;
    const float scale = o.scales()[o.row(i, half)];
    float lo[2] = {acc_lo[half * 2] * scale, acc_lo[half * 2 + 1] * scale};
    float hi[2] = {acc_hi[half * 2] * scale, acc_hi[half * 2 + 1] * scale};
    const int token = token0 + half * 8 + (o.lane >> 2);
    if (r.cos && token < r.tokens) {
      const int at = token * head_dim + in_head * 8 + (o.lane & 3) * 2;
      const float2 cos_lo = *reinterpret_cast<const float2*>(r.cos + at);
      const float2 sin_lo = *reinterpret_cast<const float2*>(r.sin + at);
      const float2 cos_hi = *reinterpret_cast<const float2*>(r.cos + at + head_dim / 2);
      const float2 sin_hi = *reinterpret_cast<const float2*>(r.sin + at + head_dim / 2);
      rx::rotate(lo[0], hi[0], cos_lo.x, sin_lo.x, cos_hi.x, sin_hi.x);
      rx::rotate(lo[1], hi[1], cos_lo.y, sin_lo.y, cos_hi.y, sin_hi.y);
    }
    const uint32_t lo_word = rx::pack_bf16(lo[0], lo[1]), hi_word = rx::pack_bf16(hi[0], hi[1]);
    if (part == Part::kKey) {
      *o.pair(o.p.at.keys, i, half, kBlocks, lo_block) = lo_word;
      *o.pair(o.p.at.keys, i, half, kBlocks, hi_block) = hi_word;
    } else {
      uint32_t* query_g = reinterpret_cast<uint32_t*>(o.query_g());
      query_g[o.fragment(lo_block / 2, i) * 4 + lo_block % 2 * 2 + half] = lo_word;
      query_g[o.fragment(hi_block / 2, i) * 4 + hi_block % 2 * 2 + half] = hi_word;
    }
  }
}

template <class P, int kColumns>
RX_DEVICE void store_value(Owner<P>& o, const float (&acc)[4], int i, int block) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (!o.is_stored(i, half)) continue;
    const float scale = o.scales()[o.row(i, half)];
    *o.pair(o.p.at.values, i, half, kUnitBlocks<kColumns>, block) =
        rx::pack_bf16(acc[half * 2] * scale, acc[half * 2 + 1] * scale);
  }
}

// Q, K and V of one unit. The barriers keep K, V and Q of the unit before until all have read them.
template <class P, int kColumns>
RX_DEVICE void project_unit(Owner<P>& o, int unit, int head_dim) {
  if constexpr (kColumns == 64) {  // a warp: a pair of tiles of Q (warps 0..3) or K, one of V
    float acc[P::kTiles][3][4];
    clear(acc);
    multiply_h(o, acc);
    add_bias<true>(o, acc, 0, unit);
    __syncthreads();
    const Part part = o.warp < 4 ? Part::kQuery : Part::kKey;
    TokenCounter tokens{o.p.at.sample_tiles};
#pragma unroll
    for (int i = 0; i < P::kTiles; i++) {
      if (i >= o.p.at.tiles) break;
      store_rotated<P, kColumns>(o, acc[i][0], acc[i][1], i, tokens.next(), o.warp & 3, part,
                                 head_dim);
      store_value<P, kColumns>(o, acc[i][2], i, o.warp);
    }
  } else {  // a warp: a pair of tiles of Q, then of K, then of V
    for (int pass = 0; pass < 3; pass++) {
      float acc[P::kTiles][2][4];
      clear(acc);
      multiply_h(o, acc);
      add_bias<true>(o, acc, 0, unit * 3 + pass);
      if (pass == 0) __syncthreads();
      TokenCounter tokens{o.p.at.sample_tiles};
#pragma unroll
      for (int i = 0; i < P::kTiles; i++) {
        if (i >= o.p.at.tiles) break;
        if (pass < 2) {
          const Part part = pass == 0 ? Part::kQuery : Part::kKey;
          store_rotated<P, kColumns>(o, acc[i][0], acc[i][1], i, tokens.next(), o.warp, part,
                                     head_dim);
        } else {
          store_value<P, kColumns>(o, acc[i][0], i, o.warp);
          store_value<P, kColumns>(o, acc[i][1], i, o.warp + kWarps);
        }
      }
    }
  }
  __syncthreads();
}

// Scores of row tile i against the keys of its sample, in registers; padding keys get -inf.
template <class P, int kHeadDim, int kColumns>
RX_DEVICE void scores_of_tile(Owner<P>& o, float (&score)[P::kTiles][2][4], int i, int head) {
  constexpr int kSteps = kHeadDim / 16;
  const int first = i / o.p.at.sample_tiles * o.p.at.sample_tiles;
  uint32_t q[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
    const uint4 v = o.query_g()[o.fragment(head * kSteps + k, i)];
    q[k][0] = v.x, q[k][1] = v.y, q[k][2] = v.z, q[k][3] = v.w;
  }
  clear(score);
#pragma unroll
  for (int j = 0; j < P::kTiles; j++) {
    if (j >= o.p.at.sample_tiles) continue;
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      uint32_t key[4];
      const int block = (head * kSteps + k) * 2 + (o.lane >> 3 & 1);
      rx::ldmatrix_x4(
          key, o.row_address(o.p.at.keys, first + j, o.lane >> 4, kUnitBlocks<kColumns>, block));
      rx::mma_m16n16k16(score[j][0], score[j][1], q[k], key);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (j * 16 + n * 8 + (o.lane & 3) * 2 + (e & 1) >= o.p.r.tokens) score[j][n][e] = -INFINITY;
  }
}

// score becomes exp(scale * (score - max)); returns the sums of the rows of this lane.
template <class P>
RX_DEVICE float2 exponentiate(Owner<P>& o, float (&score)[P::kTiles][2][4], float scale) {
  float sum[2] = {0.f, 0.f}, top[2] = {-INFINITY, -INFINITY};
  const int tiles = o.p.at.sample_tiles;
#pragma unroll
  for (int j = 0; j < P::kTiles; j++)
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (j < tiles) top[e >> 1 & 1] = fmaxf(top[e >> 1 & 1], score[j][e >> 2][e & 3]);
  top[0] = max_of_row(top[0]), top[1] = max_of_row(top[1]);
#pragma unroll
  for (int j = 0; j < P::kTiles; j++)
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (j >= tiles) continue;
      float& s = score[j][e >> 2][e & 3];
      s = __expf((s - top[e >> 1 & 1]) * scale);
      sum[e >> 1 & 1] += s;
    }
  return make_float2(sum_of_row(sum[0]), sum_of_row(sum[1]));
}

// softmax(Q K^T / sqrt(head_dim)) V of row tile i, to scratch as fragments of O's operand.
template <class P, int kHeadDim, int kColumns>
RX_DEVICE void attend_tile(Owner<P>& o, int unit, int head, int i) {
  constexpr int kPairs = kHeadDim / 16;  // of column tiles of V
  const int first = i / o.p.at.sample_tiles * o.p.at.sample_tiles;
  float score[P::kTiles][2][4], out[kPairs][2][4];
  scores_of_tile<P, kHeadDim, kColumns>(o, score, i, head);
  const float2 sum = exponentiate(o, score, rsqrtf(float(kHeadDim)));
  clear(out);
#pragma unroll
  for (int j = 0; j < P::kTiles; j++) {
    if (j >= o.p.at.sample_tiles) continue;
    const uint32_t p[4] = {rx::pack_bf16(score[j][0][0], score[j][0][1]),
                           rx::pack_bf16(score[j][0][2], score[j][0][3]),
                           rx::pack_bf16(score[j][1][0], score[j][1][1]),
                           rx::pack_bf16(score[j][1][2], score[j][1][3])};
#pragma unroll
    for (int d = 0; d < kPairs; d++) {
      uint32_t value[4];
      const int block = (head * kPairs + d) * 2 + (o.lane >> 4);
      rx::ldmatrix_x4_trans(value, o.row_address(o.p.at.values, first + j, o.lane >> 3 & 1,
                                                 kUnitBlocks<kColumns>, block));
      rx::mma_m16n16k16(out[d][0], out[d][1], p, value);
    }
  }
  const float inverse[2] = {1.f / sum.x, 1.f / sum.y};
#pragma unroll
  for (int d = 0; d < kPairs; d++) {
    auto word = [&](int n, int half) {
      return rx::pack_bf16(out[d][n][half * 2] * inverse[half],
                           out[d][n][half * 2 + 1] * inverse[half]);
    };
    const int kt = unit * (kColumns / 16) + head * kPairs + d;
    o.mixed_g()[o.fragment(kt, i)] = make_uint4(word(0, 0), word(0, 1), word(1, 0), word(1, 1));
  }
}

template <class P, int kColumns>
RX_DEVICE void attend(Owner<P>& o, int unit, int head_dim) {
  const int tiles = o.p.at.tiles;
  for (int task = o.warp; task < kColumns / head_dim * tiles; task += kWarps) {
    const int head = task / tiles, i = task % tiles;
    if constexpr (kColumns == 128)
      attend_tile<P, 128, kColumns>(o, unit, head, i);
    else if (head_dim == 64)
      attend_tile<P, 64, kColumns>(o, unit, head, i);
    else
      attend_tile<P, 32, kColumns>(o, unit, head, i);
  }
}

template <class P, int kColumns>
RX_DEVICE void attention_units(Owner<P>& o, int head_dim, int block) {
  for (int unit = 0; unit < P::kHidden / kColumns; unit++) {
    o.forget_addresses();
    o.timeline.begin(kQkv, block);
    project_unit<P, kColumns>(o, unit, head_dim);
    o.forget_addresses();
    o.timeline.begin(kAttention, block);
    attend<P, kColumns>(o, unit, head_dim);
  }
}

// Attention's output, in scratch when all warps are done.
template <class P>
RX_DEVICE void attention(Owner<P>& o, const RxBlock& b, int block) {
  const int head_dim = P::kHidden / b.heads;
  if (attention_unit(head_dim) == 64)
    attention_units<P, 64>(o, head_dim, block);
  else if constexpr (P::kHidden >= 128)
    attention_units<P, 128>(o, head_dim, block);
}

}  // namespace owner_sm80
