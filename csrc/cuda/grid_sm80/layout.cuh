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
// A warp's ring of rows (ring.cuh), which is in shared memory where CTAs come in clusters.
constexpr int kRingChunks = 4, kChunkTiles = 4;
constexpr int kFlagStride = 32;  // words from one flag to the next: a line of L2 each

enum Slot { kMixerIn, kMixerOut, kGateUp, kDown, kSlots };

using rx::ceil_div, rx::round_up;

// n / d and n % d by a product, where a division would take a reciprocal and twenty instructions.
// Exact as long as n * d < 2^31: the multiplier is too large by less than 1, the quotient by less
// than n / 2^31.
struct Divisor {
  uint32_t multiplier, d;
  RX_BOTH int of(int n) const { return int(uint64_t(uint32_t(n)) * multiplier >> 31); }
  RX_BOTH int rest(int n) const { return n - of(n) * int(d); }
};
RX_BOTH Divisor divisor(int d) {
  return {(0x80000000u + uint32_t(d) - 1) / uint32_t(d), uint32_t(d)};
}

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

// Row tiles and what is kept in scratch. Flags (flags.cuh) lie at its start.
struct Sizes {
  int token_tiles, row_tiles, width, column_tiles;  // of a sample; of all; D / 16; rows of h^T
  Divisor by_token_tiles, by_width;
  int64_t h, ht, q, mixed, middle, token_middle, scale, end;  // bytes from the start of scratch
  // K and V, twice: while one attention block reads them, rows that are further on write the next.
  int64_t k[2], v[2];

  RX_BOTH int flags() const { return row_tiles + column_tiles + row_tiles / token_tiles; }
};

RX_BOTH Sizes sizes_of(const RxRecursion& r) {
  Sizes s{};
  s.token_tiles = ceil_div(r.tokens, 16);
  s.row_tiles = r.batch * s.token_tiles;
  s.width = r.hidden / 16;
  s.column_tiles = r.batch * s.width;
  s.by_token_tiles = divisor(s.token_tiles), s.by_width = divisor(s.width);
  int64_t middle = 0, token_middle = 0;
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const RxBlock& block = r.nets[n].blocks[b];
      const int64_t rows = int64_t(s.row_tiles) * weight_of(r, block, kDown).depth;
      const int64_t columns = int64_t(s.column_tiles) * (round_up(block.token_inner, 32) / 16);
      middle = rows > middle ? rows : middle;
      token_middle = columns > token_middle ? columns : token_middle;
    }
  const int64_t whole = int64_t(s.row_tiles) * s.width * kTileBytes;
  int64_t at = s.flags() * kFlagStride * 4;
  auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += bytes;
    return here;
  };
  s.h = take(whole), s.ht = take(whole);
  s.q = take(whole), s.mixed = take(whole);
  for (int i = 0; i < 2; i++) s.k[i] = take(whole), s.v[i] = take(whole);
  s.middle = take(middle * kTileBytes), s.token_middle = take(token_middle * kTileBytes);
  s.scale = take(int64_t(s.row_tiles) * 16 * 4);
  s.end = at;
  return s;
}

// A CTA's share of one product, worked out once.
struct Share {
  const unsigned char* weights;  // its slice, in shared memory or in the tape
  const unsigned char* staged;   // the slice in the tape, if it comes to the stage in each call
  int first, last, all_units;    // units of output channels: its own, of all CTAs
  int tiles;                     // row tiles, group, group + groups, ..
  int depth, unit_bytes;
  int slot_bytes;  // what a warp hands over that shares a row tile's depth with others
  int next;        // number of the next product of the net whose slice is staged, or -1
};

// What a CTA knows of a block.
struct alignas(16) BlockShare {
  Share product[kSlots];
  int heads, head_tiles;  // of attention
  Divisor by_heads, by_head_tiles;
};

// Shared memory of a CTA: fixed parts first, then as many slices of weights as fit.
struct Shared {
  uint32_t table;          // [nets][blocks] BlockShare, behind Sizes and this struct
  int group[kSlots];       // of the row groups of each product, this CTA's
  int split_bits[kSlots];  // 2^so many warps share a row tile's depth
  uint32_t rows;           // [warps][16] fp32, partial sums of a row
  uint32_t maxima;         // the same, for attention
  uint32_t scratch;  // probabilities of a row tile, or accumulators on their way to another warp
  uint32_t weights;  // the stage if there is one, then the slices that are kept
  int32_t staged[kRxMaxNets];  // number of the first product whose slice is staged, or -1
};

// Behind the scratch of a CTA in a cluster: what ring.cuh is about.
struct alignas(128) Rings {
  uint64_t full[kWarps][kRingChunks], empty[kWarps][kRingChunks];
  uint32_t chunks[kWarps];                            // so far
  int32_t units[kRxMaxNets * kRxMaxBlocks * kSlots];  // the most that a CTA of the cluster has
  unsigned char rows[kWarps][kRingChunks][kChunkTiles * kTileBytes];
};

// The row group and the units of output channels that are this CTA's in one product.
struct Slice {
  int group, groups, first, last;
};

// kRing: CTAs may come in clusters, whose row group is the same.
template <bool kRing>
RX_BOTH Slice slice_of(const RxGridPlan& plan, int slot, int units, int cta) {
  const int groups = plan.row_groups[slot], each = kRing ? plan.cluster : 1;
  const int columns = plan.ctas / each / groups * each;
  const int mine = cta / each / groups * each + cta % each;
  Slice s{cta / each % groups, groups, 0, 0};
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

template <bool kRing>
RX_BOTH Shared shared_of(const RxRecursion& r, const RxGridPlan& plan, int cta) {
  int scratch = kMaxKeyTiles * int(kTileBytes);  // probabilities
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++)
#pragma unroll 1
      for (int slot = 0; slot < kSlots; slot++) {
        const Weight w = weight_of(r, r.nets[n].blocks[b], slot);
        const Slice widest = slice_of<kRing>(plan, slot, w.units, 0);
        const int waiting = kWarps - kWarps / plan.k_splits[slot];
        const int need = waiting * handover_bytes(w, widest);
        scratch = need > scratch ? need : scratch;
      }
  Shared s{};
  for (int slot = 0; slot < kSlots; slot++) {
    s.group[slot] = cta / (kRing ? plan.cluster : 1) % plan.row_groups[slot];
    while (2 << s.split_bits[slot] <= plan.k_splits[slot]) s.split_bits[slot]++;
  }
  s.table = 256;
  s.rows = s.table + kRxMaxNets * kRxMaxBlocks * uint32_t(sizeof(BlockShare));
  s.maxima = s.rows + kWarps * 16 * 4;
  s.scratch = s.maxima + kWarps * 16 * 4;
  s.weights = s.scratch + uint32_t(scratch);
  if (kRing && plan.cluster > 1) s.weights += uint32_t(sizeof(Rings));
  return s;
}

// Walks over all slices of a CTA in the order of use, calling
// visit(net, block, slot, weight, slice, bytes before it in the tape, bytes of it, offset or -1,
// whether there is a stage).
// If not all fit in shared memory, place for the largest is set aside: the stage. Those for which
// no place is left then come to the stage while other stages are at work (-1); or are read from L2
// where they are used, if the stage alone does not fit.
template <bool kRing, class Visit>
RX_BOTH void for_each_slice(const RxRecursion& r, const RxGridPlan& plan, int cta, Visit visit) {
  const int64_t first = shared_of<kRing>(r, plan, cta).weights;
  int64_t all = 0, largest = 0, at = first;
  bool stage = false;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
    for (int n = 0; n < r.num_nets; n++) {
      int64_t tape = 0;
      for (int b = 0; b < r.nets[n].num_blocks; b++)
#pragma unroll 1
        for (int slot = 0; slot < kSlots; slot++) {
          const Weight w = weight_of(r, r.nets[n].blocks[b], slot, plan.fp8);
          const Slice slice = slice_of<kRing>(plan, slot, w.units, cta);
          const int64_t bytes = (slice.last - slice.first) * w.unit_bytes();
          if (pass == 0) {
            all += bytes, largest = bytes > largest ? bytes : largest;
            continue;
          }
          const bool fits = at + bytes <= plan.shared_bytes;
          visit(n, b, slot, w, slice, tape + slice.first * w.unit_bytes(), bytes,
                fits ? int(at) : -1, stage);
          if (fits) at += bytes;
          tape += w.bytes();
        }
    }
    if (pass == 0) {
      stage = first + all > plan.shared_bytes && first + largest <= plan.shared_bytes;
      if (stage) at += largest;
    }
  }
}

}  // namespace grid_sm80
