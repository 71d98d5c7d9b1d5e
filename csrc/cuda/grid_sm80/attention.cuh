// attention.cuh - softmax(q k^T / sqrt(head_dim)) v for the row tiles of all heads.
//
// A CTA takes one (sample, head, 16 queries) at a time, a warp of it 16 keys: scores, their maxima
// and sums are exchanged through shared memory, then the probabilities (bf16, one tile a warp), and
// each warp forms eight columns of the result over all keys. V is on its way from the start.
#pragma once
#include "product.cuh"

namespace grid_sm80 {

struct Attention {
  const uint4 *q_g, *k_g, *v_g;
  unsigned char* out_g;  // [row tiles][width] tiles
  uint32_t* flags_g;     // of the row tiles
  uint32_t epoch;        // when Q, K and V are there
  int items, head_tiles, width, token_tiles, tokens;
  Divisor by_heads, by_token_tiles;
  float scale;
};

// acc[n] = the scores of 16 queries and the warp's 16 keys; -inf beyond the last token.
RX_DEVICE void scores(float (&acc)[2][4], const Attention& p, int q_tile, int k_tile, int head,
                      int key_tile) {
  const int64_t column = head * p.head_tiles;
  const uint4* q_g = p.q_g + (int64_t(q_tile) * p.width + column) * 32 + lane_id();
  const uint4* k_g = p.k_g + (int64_t(k_tile) * p.width + column) * 32 + lane_id();
#pragma unroll 4
  for (int j = 0; j < p.head_tiles; j++) {
    const uint4 q = q_g[j * 32], k = k_g[j * 32];
    const uint32_t a[4] = {q.x, q.y, q.z, q.w};
    rx::mma_m16n8k16(acc[0], a, k.x, k.z);
    rx::mma_m16n8k16(acc[1], a, k.y, k.w);
  }
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = key_tile * 16 + n * 8 + (lane_id() & 3) * 2 + (e & 1);
      acc[n][e] = key < p.tokens ? acc[n][e] * p.scale : -INFINITY;
    }
}

// Leaves the warp's maximum (or sum) of rows l/4 and l/4 + 8 in rows[warp][16].
RX_DEVICE void leave(float* rows, float low, float high) {
  if (lane_id() & 3) return;
  rows[warp_id() * 16 + (lane_id() >> 2)] = low;
  rows[warp_id() * 16 + 8 + (lane_id() >> 2)] = high;
}

RX_DEVICE void attend(const Attention& p, int item, float* sums_s, float* maxima_s,
                      uint4* probabilities_s) {
  const int query_tile = p.by_token_tiles.rest(item), among = p.by_token_tiles.of(item);
  const int head = p.by_heads.rest(among), sample = p.by_heads.of(among);
  const int first = sample * p.token_tiles;
  const int row = lane_id() >> 2, columns = p.head_tiles * 2;
  const bool has_keys = warp_id() < p.token_tiles;

  Needs{p.flags_g, p.epoch, p.token_tiles, kOne}.wait(sample);

  // V of this warp's columns (warp, and warp + 8 of a wide head), asked for before it is needed.
  uint2 v[kMaxHeadDim / 64][kMaxKeyTiles];
  const unsigned char* v_g = reinterpret_cast<const unsigned char*>(p.v_g);
#pragma unroll
  for (int c = 0; c < kMaxHeadDim / 64; c++)
#pragma unroll
    for (int t = 0; t < kMaxKeyTiles; t++) {
      const int column = warp_id() + c * kWarps;
      if (column >= columns || t >= p.token_tiles) continue;
      const int64_t tile = int64_t(sample) * p.width + head * p.head_tiles + column / 2;
      const int64_t at = (tile * p.token_tiles + t) * 32 + lane_id();
      v[c][t] = *reinterpret_cast<const uint2*>(v_g + at * 16 + column % 2 * 8);
    }

  float s[2][4] = {};
  if (has_keys) {
    scores(s, p, first + query_tile, first + warp_id(), head, warp_id());
    float most[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float m = fmaxf(fmaxf(s[0][half * 2], s[0][half * 2 + 1]),
                            fmaxf(s[1][half * 2], s[1][half * 2 + 1]));
      most[half] = rx::max_of_row(m);
    }
    leave(maxima_s, most[0], most[1]);
  }
  __syncthreads();
  if (has_keys) {
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float m = maxima_s[row + half * 8];
      for (int w = 1; w < p.token_tiles; w++) m = fmaxf(m, maxima_s[w * 16 + row + half * 8]);
      sum[half] = 0.f;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; e++) {
          s[n][e] = __expf(s[n][e] - m);
          sum[half] += s[n][e];
        }
      sum[half] = rx::sum_of_row(sum[half]);
    }
    leave(sums_s, sum[0], sum[1]);
    probabilities_s[warp_id() * 32 + lane_id()] =
        make_uint4(rx::pack_bf16(s[0][0], s[0][1]), rx::pack_bf16(s[0][2], s[0][3]),
                   rx::pack_bf16(s[1][0], s[1][1]), rx::pack_bf16(s[1][2], s[1][3]));
  }
  __syncthreads();
  float total[2] = {0.f, 0.f};
  for (int w = 0; w < p.token_tiles; w++)
    total[0] += sums_s[w * 16 + row], total[1] += sums_s[w * 16 + row + 8];
  const float low = __fdividef(1.f, total[0]), high = __fdividef(1.f, total[1]);
#pragma unroll
  for (int c = 0; c < kMaxHeadDim / 64; c++) {
    const int column = warp_id() + c * kWarps;
    if (column >= columns) break;
    float acc[4] = {};
#pragma unroll
    for (int t = 0; t < kMaxKeyTiles; t++) {
      if (t >= p.token_tiles) break;
      const uint4 x = probabilities_s[t * 32 + lane_id()];
      const uint32_t a[4] = {x.x, x.y, x.z, x.w};
      rx::mma_m16n8k16(acc, a, v[c][t].x, v[c][t].y);
    }
    const int64_t tile = int64_t(first + query_tile) * p.width + head * p.head_tiles + column / 2;
    *reinterpret_cast<uint2*>(p.out_g + (tile * 32 + lane_id()) * 16 + column % 2 * 8) = make_uint2(
        rx::pack_bf16(acc[0] * low, acc[1] * low), rx::pack_bf16(acc[2] * high, acc[3] * high));
  }
  arrive(p.flags_g + (first + query_tile) * kFlagStride, 1);
  // No barrier here: the next item writes maxima, which all have read, and only after its first
  // barrier the sums and probabilities.
}

}  // namespace grid_sm80
