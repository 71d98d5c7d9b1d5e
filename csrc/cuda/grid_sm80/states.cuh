// states.cuh - from the states in global memory to rows in scratch and back: the call's input, and
// the rms that must be written out.
//
// A CTA takes a row tile, its warps share the columns. A row tile is always the same CTA's, and an
// element of it the same thread's, so that states written in one call are read in the next without
// a barrier between.
#pragma once
#include "../recursion.cuh"
#include "finish.cuh"

namespace grid_sm80 {

// This warp's tiles (warp, warp + 8, ..) of a row tile: word w holds row l/4 + 8 (w % 2).
using Words = uint32_t[kRowWarpTiles][4];

RX_DEVICE int first_row() { return lane_id() >> 2; }
// Column of word w of tile t of this warp.
RX_DEVICE int column_of(int t, int w) {
  return (warp_id() + t * kWarps) * 16 + (w >> 1) * 8 + (lane_id() & 3) * 2;
}

// x <- bf16(rms(rows of h)); rows beyond the last token become zeros.
RX_DEVICE void normalised_rows(Words& x, const uint4* h_g, int tile, const Sizes& z, int tokens,
                               float eps, float* sums_s) {
  const uint4* row_g = h_g + int64_t(tile) * z.width * 32;
  float squares[2] = {0.f, 0.f};
#pragma unroll
  for (int t = 0; t < kRowWarpTiles; t++) {
    const int column = warp_id() + t * kWarps;
    if (column >= z.width) break;
    const uint4 v = row_g[column * 32 + lane_id()];
    x[t][0] = v.x, x[t][1] = v.y, x[t][2] = v.z, x[t][3] = v.w;
    squares[0] += square_of(v.x) + square_of(v.z);
    squares[1] += square_of(v.y) + square_of(v.w);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    squares[half] = rx::sum_of_row(squares[half]);
    if ((lane_id() & 3) == 0) sums_s[warp_id() * 16 + half * 8 + first_row()] = squares[half];
  }
  __syncthreads();
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; w++) sum += sums_s[w * 16 + half * 8 + first_row()];
    scale[half] = rsqrtf(__fdividef(sum, float(z.width * 16)) + eps);
    if (z.by_token_tiles.rest(tile) * 16 + half * 8 + first_row() >= tokens) scale[half] = 0.f;
  }
  __syncthreads();  // the sums may be written again
#pragma unroll
  for (int t = 0; t < kRowWarpTiles; t++)
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (warp_id() + t * kWarps >= z.width) break;
      const float2 v = rx::unpack_bf16(x[t][w]);
      x[t][w] = rx::pack_bf16(v.x * scale[w & 1], v.y * scale[w & 1]);
    }
}

// Where word w of tile t lies in a state [B, T, D], or null beyond the last token.
RX_DEVICE uint32_t* word_of(const void* state_g, int tile, int t, int w, const Sizes& z,
                            int tokens) {
  const int token = z.by_token_tiles.rest(tile) * 16 + (w & 1) * 8 + first_row();
  if (token >= tokens) return nullptr;
  const int64_t row = int64_t(z.by_token_tiles.of(tile)) * tokens + token;
  return static_cast<uint32_t*>(const_cast<void*>(state_g)) +
         (row * z.width * 16 + column_of(t, w)) / 2;
}

RX_DEVICE void store_state(void* state_g, const Words& x, int tile, const Sizes& z, int tokens) {
#pragma unroll
  for (int t = 0; t < kRowWarpTiles; t++)
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (warp_id() + t * kWarps >= z.width) break;
      if (uint32_t* at = word_of(state_g, tile, t, w, z, tokens)) *at = x[t][w];
    }
}

// Rows as the first product of a block reads them: h, or h^T before a token-MLP.
RX_DEVICE void store_rows(unsigned char* scratch_g, const Words& x, int tile, const Sizes& z,
                          bool transposed) {
  uint4* h_g = reinterpret_cast<uint4*>(scratch_g + z.h);
  uint4* ht_g = reinterpret_cast<uint4*>(scratch_g + z.ht);
  const int sample = z.by_token_tiles.of(tile), token_tile = z.by_token_tiles.rest(tile);
#pragma unroll
  for (int t = 0; t < kRowWarpTiles; t++) {
    const int column = warp_id() + t * kWarps;
    if (column >= z.width) break;
    if (transposed) {
      const int64_t row = int64_t(sample) * z.width + column;
      ht_g[(row * z.token_tiles + token_tile) * 32 + lane_id()] =
          make_uint4(transpose_8x8(x[t][0]), transpose_8x8(x[t][2]), transpose_8x8(x[t][1]),
                     transpose_8x8(x[t][3]));
    } else {
      h_g[(int64_t(tile) * z.width + column) * 32 + lane_id()] =
          make_uint4(x[t][0], x[t][1], x[t][2], x[t][3]);
    }
  }
}

// sum <- left-to-right sum of `count` states, each partial sum rounded; `fresh` is state `made`.
RX_DEVICE void add_states(Words& sum, const int32_t* which, int count, const RxRecursion& r,
                          uint32_t written, const Words& fresh, int made, int tile,
                          const Sizes& z) {
  for (int i = 0; i < count; i++) {
    const bool is_fresh = which[i] == made;
    const void* state_g = rx::state_source(r, written, which[i]);
#pragma unroll
    for (int t = 0; t < kRowWarpTiles; t++)
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if (warp_id() + t * kWarps >= z.width) break;
        uint32_t v = 0;
        if (is_fresh)
          v = fresh[t][w];
        else if (const uint32_t* at = word_of(state_g, tile, t, w, z, r.tokens))
          v = *at;
        sum[t][w] = i ? rx::add_bf16(sum[t][w], v) : v;
      }
  }
}

// x <- what call `last` writes, of what its net left: damped, with noise; `old` is what it damps.
// Rows beyond the last token stay zeros. Words take turns in the first place: the noise is long.
RX_DEVICE void finish_rows(Words& x, Words& old, const RxRecursion& r, const RxCall& last, int tile,
                           const Sizes& z) {
  const int first = z.by_token_tiles.rest(tile) * 16 + first_row();
#pragma unroll 1
  for (int i = 0; i < kRowWarpTiles * 4; i++) {
    const int t = i >> 2, token = first + (i & 1) * 8;
    uint32_t word = x[0][0];
    if (token < r.tokens && warp_id() + t * kWarps < z.width)
      word = rx::finish_pair(r, last, word, old[0][0], uint32_t(z.by_token_tiles.of(tile)),
                             uint32_t(token * z.width * 16 + column_of(t, i & 3)) / 2);
#pragma unroll
    for (int j = 0; j < kRowWarpTiles * 4 - 1; j++) {
      x[j >> 2][j & 3] = x[(j + 1) >> 2][(j + 1) & 3];
      old[j >> 2][j & 3] = old[(j + 1) >> 2][(j + 1) & 3];
    }
    x[kRowWarpTiles - 1][3] = word;
  }
}

// Between two calls: the rows that the last one (null: there was none) left become the state that
// it writes, and the next one's input is formed (null: there is none). `written`: states of earlier
// calls.
RX_DEVICE void enter(const RxRecursion& r, const Sizes& z, uint32_t* flags_g, uint32_t epoch,
                     uint32_t written, const RxCall* last, float eps, const RxCall* call,
                     bool transposed, float* sums_s) {
  unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
  const int made = last ? last->write : -1;
  const bool finishes = last && rx::finishes(*last);
  bool late = made >= 0;  // the injected sum has to wait for the last call's rows, too
  if (call && late) {
    late = false;
    for (int i = 0; i < call->num_inject; i++) late |= call->inject[i] == made;
  }
  for (int tile = blockIdx.x; tile < z.row_tiles; tile += gridDim.x) {
    Words fresh = {}, sum = {}, inject = {};
    if (finishes) add_states(sum, &last->write, 1, r, written, fresh, -1, tile, z);
#pragma unroll 1
    for (int after = 0; after < 2; after++) {
      if (after && made >= 0) {
        Needs{flags_g, epoch, 1, kOne}.wait(tile);
        normalised_rows(fresh, reinterpret_cast<const uint4*>(scratch_g + z.h), tile, z, r.tokens,
                        eps, sums_s);
        if (finishes) finish_rows(fresh, sum, r, *last, tile, z);
      }
      if (call && after == late)
        add_states(inject, call->inject, call->num_inject, r, written, fresh, made, tile, z);
    }
    if (call) {
      add_states(sum, call->state, call->num_state, r, written, fresh, made, tile, z);
      if (call->scale != 1.f) {
#pragma unroll
        for (int t = 0; t < kRowWarpTiles; t++)
#pragma unroll
          for (int w = 0; w < 4; w++) sum[t][w] = rx::scale_bf16(sum[t][w], call->scale);
      }
      if (call->num_inject) {
#pragma unroll
        for (int t = 0; t < kRowWarpTiles; t++)
#pragma unroll
          for (int w = 0; w < 4; w++) sum[t][w] = rx::add_bf16(sum[t][w], inject[t][w]);
      }
      store_rows(scratch_g, sum, tile, z, transposed);
      arrive(flags_g + tile * kFlagStride, 1);
    }
    if (made >= 0) store_state(r.states_out[made], fresh, tile, z, r.tokens);
  }
}

// States that no call wrote leave as they came.
RX_DEVICE void copy_unwritten(const RxRecursion& r, uint32_t written) {
  const int64_t words = int64_t(r.batch) * r.tokens * r.hidden / 8;
  for (int i = 0; i < r.num_states; i++) {
    if (written >> i & 1) continue;
    const uint4* in_g = static_cast<const uint4*>(r.states_in[i]);
    uint4* out_g = static_cast<uint4*>(r.states_out[i]);
    for (int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x; j < words;
         j += int64_t(gridDim.x) * kThreads)
      out_g[j] = in_g[j];
  }
}

}  // namespace grid_sm80
