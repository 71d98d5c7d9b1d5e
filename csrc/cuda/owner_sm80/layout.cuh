// layout.cuh - the sizes of the owner kernel: row tiles, shared memory, scratch, and the tape's
// segments.
#pragma once
#include "../api.h"
#include "../rx/rx.cuh"

namespace owner_sm80 {

using rx::bf16, rx::ceil_div;

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kStages = 4;  // ring slots: 24 KB in flight cover about 700 clocks of L2 latency
constexpr uint32_t kWarpSlot = 1024;  // bytes a warp takes a step at most: 32 columns x 16 of k
constexpr uint32_t kSlot = kWarps * kWarpSlot;
constexpr int kFragment = 512;     // bytes: 16 x 16 bf16 in the order of the lanes' registers
constexpr int kMiddleChunk = 128;  // columns of the SwiGLU's middle a pass: 16 gate + 16 up a warp
constexpr int kTokenChunk = 32;    // columns of the token SwiGLU's middle a pass
constexpr int kTokenSteps = 3;     // ring steps of such a pass: gate + up twice, down
constexpr uint32_t kMatrix = 128;  // bytes: 8 x 8 bf16, what ldmatrix reads at once
constexpr int kMaxSegments = 4 * kRxMaxBlocks;
constexpr int kMaxBiases = 4 * kRxMaxBlocks;  // of a net

enum Place : int { kShared, kScratch };  // of h

template <int kHidden_, int kTiles_, int kPlace>
struct Plan {
  static constexpr int kHidden = kHidden_;  // D
  static constexpr int kTiles = kTiles_;    // row tiles of 16
  static constexpr bool kInScratch = kPlace == kScratch;
  static constexpr int kRows = kTiles * 16;
  static constexpr int kColumnBlocks = kHidden / 8;
  static constexpr int kSteps = kHidden / 16;  // steps of a product over D
  // Column tiles of 8 that a warp takes in a pass of O or down. 4 halve the reads of A a product,
  // but 8 warps x 32 columns must divide D.
  static constexpr int kOutTiles = kHidden % 256 == 0 ? 4 : 2;
  static constexpr int kOutColumns = kWarps * kOutTiles * 8;
  static constexpr int kOutPasses = ceil_div(kHidden, kOutColumns);
  static_assert(kHidden % 64 == 0 && kTiles >= 1 && kTiles <= 8, "not a shape of this kernel");
};

// How a net's weights come: `steps` ring steps in a row, each `warps` x `warp_bytes`, the whole
// `repeats` times over.
struct Segment {
  int32_t steps, repeats, warp_bytes, warps;
  int32_t ends_net;  // 1: after it comes the next call
};
RX_BOTH int64_t segment_bytes(const Segment& s) {
  return int64_t(s.steps) * s.warp_bytes * s.warps;
}

// Columns of Q (and K, V) that one pass of the attention stage makes: one head of 64 or 128, or two
// of 32.
RX_BOTH constexpr int attention_unit(int head_dim) { return head_dim == 128 ? 128 : 64; }

// The segments of one block, in the order of use; returns their number. `token_repeats` counts the
// passes of the token MLP over the tape: column groups x samples.
inline int block_segments(const RxBlock& b, int hidden, int tokens, int token_repeats,
                          Segment* out) {
  const int wide = hidden % 256 == 0 ? 1024 : 512, columns = kWarps * wide / 32;
  const int passes = ceil_div(hidden, columns), steps = hidden / 16;
  int n = 0;
  if (b.token_mlp) {
    const int tiles = ceil_div(tokens, 16);
    out[n++] = {kTokenSteps * ceil_div(b.token_inner, kTokenChunk), token_repeats, 1024, tiles, 0};
  } else {
    const int unit = attention_unit(hidden / b.heads), units = hidden / unit;
    out[n++] = unit == 64 ? Segment{units * steps, 1, 768, kWarps, 0}
                          : Segment{units * 3 * steps, 1, 512, kWarps, 0};
    out[n++] = {passes * steps, 1, wide, kWarps, 0};
  }
  const int middle = rx::round_up(b.inner, kMiddleChunk);
  out[n++] = {middle / kMiddleChunk * steps, 1, 1024, kWarps, 0};
  out[n++] = {passes * (middle / 16), 1, wide, kWarps, 0};
  return n;
}

// How the biases of a matrix lie: fp32, [pass][warp][column tile][8], the order in which warps hold
// the product. They follow a net's weights, matrix after matrix of those that have one.
struct BiasTable {
  int32_t passes, warps, tiles;
};
RX_BOTH int bias_values(const BiasTable& t) { return t.passes * t.warps * t.tiles * 8; }

// Matrices of a block as RxPack counts them; those without a bias have no values.
inline void bias_tables(const RxBlock& b, int hidden, int tokens, BiasTable (&out)[4]) {
  Segment segments[4];
  const int count = block_segments(b, hidden, tokens, 1, segments);
  for (int k = 0; k < 4; k++) {
    out[k] = {0, 0, 0};
    if (!(b.biases >> k & 1)) continue;
    if (b.token_mlp && k == 0) {  // all warps have the columns of a ring step
      out[k] = {2 * ceil_div(b.token_inner, kTokenChunk), 1, 4};
    } else if (b.token_mlp && k == 1) {  // a bias a token
      out[k] = {1, ceil_div(tokens, 16), 2};
    } else {
      const Segment& s = segments[count - 4 + k];
      const int depth = k == 3 ? rx::round_up(b.inner, kMiddleChunk) : hidden;
      out[k] = {s.steps / (depth / 16), kWarps, s.warp_bytes / 256};
    }
  }
}

// Bytes of a net's tape, with its biases or without.
inline int64_t tape_bytes(const RxBlock* blocks, int count, int hidden, int tokens, bool biases) {
  int64_t bytes = 0;
  for (int i = 0; i < count; i++) {
    Segment segments[4];
    BiasTable tables[4];
    const int stages = block_segments(blocks[i], hidden, tokens, 1, segments);
    bias_tables(blocks[i], hidden, tokens, tables);
    for (int s = 0; s < stages; s++) bytes += segment_bytes(segments[s]);
    for (int k = 0; k < 4 && biases; k++) bytes += 4 * bias_values(tables[k]);
  }
  return bytes;
}

// Rows of 16 d that the token MLP takes a pass and warp: two tiles share each weight fragment. With
// all of 128 tokens their accumulators and the next products' do not fit the registers.
RX_BOTH constexpr int token_row_tiles(int hidden, int tiles) {
  return hidden % 256 == 0 && tiles < 8 ? 2 : 1;
}
RX_BOTH constexpr int token_passes(int hidden, int tiles) {
  return ceil_div(hidden, kWarps * 16 * token_row_tiles(hidden, tiles));
}

// Sizes that depend on the problem but not on the sample.
struct Geometry {
  int32_t samples;       // a group
  int32_t sample_tiles;  // row tiles of one sample
  int32_t tiles;         // row tiles in use: samples * sample_tiles
  int32_t row_blocks;    // rows of 8 that are stored: the last may be left out when nobody needs it
  int32_t unit;          // widest attention unit of any block; 0 without attention
  int32_t middle;        // widest padded middle of any block
  // byte offsets in shared memory; h is at 0, if it is there
  uint32_t keys, values, ring, scales, shared_bytes;
  // byte offsets in the scratch of one owner
  int64_t query, mixed, middle_at, inject, h, slots, gate, scratch_bytes;
};

struct Params {
  RxRecursion r;
  RxSolve solve;  // entries 0: one recursion on every sample of the batch
  Geometry at;
  Segment segments[kRxMaxNets * kMaxSegments];   // of net n from n * kMaxSegments on
  const float* biases[kRxMaxNets * kMaxBiases];  // of matrix k of block i of net n; null: none
};

inline Geometry geometry(const RxRecursion& r, const RxOwnerPlan& plan) {
  const int samples = plan.samples, tiles = plan.tiles;
  Geometry g{};
  bool token_mlp = false, gates = false;
  g.samples = samples;
  g.sample_tiles = ceil_div(r.tokens, 16);
  g.tiles = samples * g.sample_tiles;
  const int rows = (samples - 1) * g.sample_tiles * 16 + r.tokens;
  g.row_blocks = rows <= tiles * 16 - 8 ? 2 * tiles - 1 : 2 * tiles;
  for (int n = 0; n < r.num_nets; n++)
    for (int i = 0; i < r.nets[n].num_blocks; i++) {
      const RxBlock& b = r.nets[n].blocks[i];
      token_mlp |= b.token_mlp != 0;
      gates |= b.activation != kRxSilu;
      if (!b.token_mlp && attention_unit(r.hidden / b.heads) > g.unit)
        g.unit = attention_unit(r.hidden / b.heads);
      if (rx::round_up(b.inner, kMiddleChunk) > g.middle)
        g.middle = rx::round_up(b.inner, kMiddleChunk);
    }
  const uint32_t panel = uint32_t(g.row_blocks * (g.unit / 8)) * kMatrix;
  // Partial sums of squares lie over K, as do the token MLP's columns of h in scratch.
  uint32_t stage = uint32_t(kWarps * tiles * 16 * 4);
  if (2 * panel > stage) stage = 2 * panel;
  if (plan.in_scratch && token_mlp) {
    const int blocks = g.row_blocks < 2 * g.sample_tiles ? g.row_blocks : 2 * g.sample_tiles;
    const uint32_t columns =
        uint32_t(blocks * 2 * kWarps * token_row_tiles(r.hidden, tiles)) * kMatrix;
    if (columns > stage) stage = columns;
  }
  g.keys = plan.in_scratch ? 0 : uint32_t(g.row_blocks * (r.hidden / 8)) * kMatrix;
  g.values = g.keys + panel;
  g.ring = g.keys + stage;
  g.scales = g.ring + kStages * kSlot;
  g.shared_bytes = g.scales + uint32_t(tiles * 16 * 4);
  const int64_t tile_row = int64_t(tiles) * kFragment;  // one k16 column of A fragments
  g.query = 0;
  g.mixed = g.query + tile_row * (g.unit / 16);
  g.middle_at = g.mixed + tile_row * (r.hidden / 16);
  g.inject = g.middle_at + tile_row * (g.middle / 16);
  g.h = g.inject + int64_t(2 * tiles) * (r.hidden / 8) * kMatrix;
  g.slots = g.h + (plan.in_scratch ? tile_row * (r.hidden / 16) : 0);
  g.gate = g.slots + 8 * 16;  // up to 8 slots of 16 bytes (solve.cuh)
  g.scratch_bytes = g.gate + (gates ? tile_row * kWarps : 0);
  return g;
}

}  // namespace owner_sm80
