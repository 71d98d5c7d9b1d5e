// layout.cuh - what is how large, and where it lies: tiles, the tape, scratch, a CTA's shared
// memory.
//
// The unit of everything is a tile of 512 bytes: 16 rows x 16 columns of bf16 as mma.sync holds
// them, lane l its 16 bytes (four words: rows l/4 and l/4 + 8 of columns 2(l%4).., then the same
// rows of columns 8 + 2(l%4)..). A warp reads an operand by one 16-byte load a lane, from L2 or
// from shared memory, with neither ldmatrix nor bank conflicts nor a swizzle; and the accumulator
// of a product is, rounded, the operand of the next.
//
//   weights, wide    16 output channels x 16 of depth, as a tile: two n8 operands (words 0, 2 and
//                    1, 3). QKV pairs channels (j, j + head_dim/2), gate_up a gate with its up
//   weights, narrow  8 output channels x 32 of depth: O, down and their token twins have so few
//                    channels that sixteen at a time would leave half of the CTAs idle
//   with FP8         the same, a byte (e4m3) for each value, and behind each unit the fp32 scales
//                    of its channels
//   activations      [row tiles][depth / 16]; a sample's tokens are padded to whole tiles
#pragma once
#include "../api.h"
#include "../rx/common.cuh"

namespace grid_sm80 {

constexpr int kWarps = 8, kThreads = kWarps * 32;
// Units of output channels that one pass over the rows computes: 24 and 16 accumulators. A fourth
// wide unit makes ptxas spill on sm_120.
constexpr int kWideUnits = 3, kNarrowUnits = 4;
constexpr int kRowWarpTiles = 4;  // tiles of a row that one warp normalises: D <= 8 * 4 * 16
constexpr int kMaxKeyTiles = 8;   // attention has a warp for every 16 keys: T <= 128
constexpr int kMaxHeadDim = 128;  // 16 columns of n8, two for each warp
constexpr uint32_t kTileBytes = 512;
constexpr uint32_t kBarrierBytes = 256;  // at the start of scratch; a line of its own

enum Slot { kMixerIn, kMixerOut, kGateUp, kDown, kSlots };

RX_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
RX_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// One weight as the tape holds it: `units` of output channels, each `depth` tiles of 16 deep.
struct Weight {
  int units, depth;
  bool wide, fp8;
  RX_BOTH int64_t unit_bytes() const {
    const int64_t values = int64_t(depth) * (wide ? 256 : 128);
    return fp8 ? values + (wide ? 64 : 32) : values * 2;
  }
  RX_BOTH int64_t bytes() const { return units * unit_bytes(); }
};

RX_BOTH Weight weight_of(int hidden, int tokens, const RxBlock& b, int slot, bool fp8 = false) {
  const int inner = round_up(b.inner, 32), token_inner = round_up(b.token_inner, 32);
  if (slot == kGateUp) return {inner / 8, hidden / 16, true, fp8};
  if (slot == kDown) return {hidden / 8, inner / 16, false, fp8};
  if (b.token_mlp) {
    if (slot == kMixerIn) return {token_inner / 8, ceil_div(tokens, 16), true, fp8};
    return {ceil_div(tokens, 8), token_inner / 16, false, fp8};
  }
  if (slot == kMixerIn) return {3 * hidden / 16, hidden / 16, true, fp8};
  return {hidden / 8, hidden / 16, false, fp8};
}
RX_BOTH Weight weight_of(const RxRecursion& r, const RxBlock& b, int slot, bool fp8 = false) {
  return weight_of(r.hidden, r.tokens, b, slot, fp8);
}

// Row tiles and what is kept in scratch, in tiles from the start of each buffer.
struct Sizes {
  int token_tiles, row_tiles, width, column_tiles;    // of a sample; of all; D / 16; rows of h^T
  int64_t h, ht, q, k, v, mixed, middle, scale, end;  // bytes from the start of scratch
};

RX_BOTH Sizes sizes_of(const RxRecursion& r) {
  Sizes s{};
  s.token_tiles = ceil_div(r.tokens, 16);
  s.row_tiles = r.batch * s.token_tiles;
  s.width = r.hidden / 16;
  s.column_tiles = r.batch * s.width;
  int64_t middle = 0;
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const RxBlock& block = r.nets[n].blocks[b];
      const int64_t rows = int64_t(s.row_tiles) * weight_of(r, block, kDown).depth;
      const int64_t columns = int64_t(s.column_tiles) * (round_up(block.token_inner, 32) / 16);
      middle = rows > middle ? rows : middle;
      middle = columns > middle ? columns : middle;
    }
  const int64_t whole = int64_t(s.row_tiles) * s.width * kTileBytes;
  int64_t at = kBarrierBytes;
  auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += bytes;
    return here;
  };
  s.h = take(whole), s.ht = take(whole);
  s.q = take(whole), s.k = take(whole), s.v = take(whole), s.mixed = take(whole);
  s.middle = take(middle * kTileBytes);
  s.scale = take(int64_t(s.row_tiles) * 16 * 4);
  s.end = at;
  return s;
}

// Where a CTA's slice of a weight begins: in the tape, and in shared memory (-1: only in the tape).
struct Place {
  int64_t tape;
  int32_t shared, unused;
};

// Shared memory of a CTA: fixed parts first, then as many slices of weights as fit.
struct Shared {
  uint32_t sizes;    // Sizes and this struct: read when needed, for registers are scarce
  uint32_t table;    // [nets][blocks][slots] Place
  uint32_t rows;     // [warps][16] fp32, partial sums of a row
  uint32_t maxima;   // the same, for attention
  uint32_t scratch;  // probabilities of a row tile, or accumulators on their way to another warp
  uint32_t weights;  // the first slice
};

// The row group and the units of output channels that are this CTA's in one product.
struct Slice {
  int group, groups, first, last;
};

RX_BOTH Slice slice_of(const RxGridPlan& plan, int slot, int units, int cta) {
  const int groups = plan.row_groups[slot], columns = plan.ctas / groups, mine = cta / groups;
  Slice s{cta % groups, groups, 0, 0};
  if (mine >= columns) return s;              // ctas is no multiple of groups: the last ones rest
  s.first = ceil_div(units * mine, columns);  // rounded up, so that column group 0 is never empty
  s.last = ceil_div(units * (mine + 1), columns);  // nor has another more units
  return s;
}

// One warp's sums on their way to another: the accumulators of one pass, and two sums of squares a
// lane.
RX_BOTH int handover_bytes(const Weight& w, const Slice& s) {
  const int most = w.wide ? kWideUnits : kNarrowUnits;
  const int units = s.last - s.first < most ? s.last - s.first : most;
  return units * (w.wide ? 2 : 1) * 512 + 256;
}

static_assert(sizeof(Sizes) + sizeof(Shared) <= 256, "they lie in front of the table");

RX_BOTH Shared shared_of(const RxRecursion& r, const RxGridPlan& plan) {
  int scratch = kMaxKeyTiles * int(kTileBytes);  // probabilities
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++)
      for (int slot = 0; slot < kSlots; slot++) {
        const Weight w = weight_of(r, r.nets[n].blocks[b], slot);
        const Slice widest = slice_of(plan, slot, w.units, 0);
        const int waiting = kWarps - kWarps / plan.k_splits[slot];
        const int need = waiting * handover_bytes(w, widest);
        scratch = need > scratch ? need : scratch;
      }
  Shared s{};
  s.table = 256;
  s.rows = s.table + kRxMaxNets * kRxMaxBlocks * kSlots * uint32_t(sizeof(Place));
  s.maxima = s.rows + kWarps * 16 * 4;
  s.scratch = s.maxima + kWarps * 16 * 4;
  s.weights = s.scratch + uint32_t(scratch);
  return s;
}

// Walks over all slices of a CTA in the order of use, calling
// visit(net, block, slot, bytes before the slice in the tape, bytes of the slice, offset or -1).
// Slices lie in shared memory as long as they fit; the others are read from L2 in every call.
template <class Visit>
RX_BOTH void for_each_slice(const RxRecursion& r, const RxGridPlan& plan, int cta, Visit visit) {
  int64_t at = shared_of(r, plan).weights;
  for (int n = 0; n < r.num_nets; n++) {
    int64_t tape = 0;
    for (int b = 0; b < r.nets[n].num_blocks; b++)
      for (int slot = 0; slot < kSlots; slot++) {
        const Weight w = weight_of(r, r.nets[n].blocks[b], slot, plan.fp8);
        const Slice slice = slice_of(plan, slot, w.units, cta);
        const int64_t bytes = (slice.last - slice.first) * w.unit_bytes();
        const bool fits = at + bytes <= plan.shared_bytes;
        visit(n, b, slot, tape + slice.first * w.unit_bytes(), bytes, fits ? int(at) : -1);
        if (fits) at += bytes;
        tape += w.bytes();
      }
  }
}

}  // namespace grid_sm80
