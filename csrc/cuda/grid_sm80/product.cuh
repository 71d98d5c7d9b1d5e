// product.cuh - one product of a stage: rows of L2 times the CTA's slice of a weight. finish.cuh
// says what happens to the sums.
//
// A warp takes a row tile (or a part of its depth, `k_splits` of them) and some units of
// output channels. Operands of the rows come from L2 straight into registers, two batches of eight
// tiles in flight, or on Hopper through a ring that a cluster shares (ring.cuh); operands of the
// weights from shared memory, or from L2 where they did not fit.
// "No norm pass": rows are stored before their rms; whoever multiplies a row has all of it at hand,
// forms its scale on the way and applies that to the sums.
#pragma once
#include "ring.cuh"

namespace grid_sm80 {

struct Product {
  const uint4* a_g;  // [row tiles][depth] tiles
  const Share& share;
  int group, groups;  // row tiles group, group + groups, .. are this CTA's
  int split_bits;     // 2^so many warps share a row tile's depth
  Needs needs;        // of a row tile before it is read
  uint32_t ready;     // epoch of that flag from which on the residual is complete
  uint32_t* done_g;   // flags of the row tiles that it writes
  bool normalise;     // rows are not normalised yet
  float eps;
  Rings* rings;  // null without clusters
  int cluster;
  int most;  // units of the CTA of the cluster that has most of them
};

// n8 tiles a unit: 2 wide, 1 narrow.
template <int kTiles>
constexpr int kUnits = kTiles == 2 ? kWideUnits : kNarrowUnits;
template <int kTiles>
using Accumulators = float[kUnits<kTiles>][kTiles][4];

constexpr int kBatch = 8;  // tiles of A that a warp loads at once: 4 KB

RX_DEVICE void load_batch(uint4 (&a)[kBatch], const uint4* a_g, int k, int end) {
  a_g += k * 32 + lane_id();
#pragma unroll
  for (int i = 0; i < kBatch; i++) {
    a[i] = make_uint4(0, 0, 0, 0);
    if (k + i < end) a[i] = a_g[i * 32];
  }
}

RX_DEVICE float square_of(uint32_t pair) {
  const float2 x = rx::unpack_bf16(pair);
  return x.x * x.x + x.y * x.y;
}

// Two e4m3 values (bits 0-7 and 8-15 of `two`) as bf16, exactly. Exponent and mantissa are shifted
// to where fp32 has its own, and 2^120 corrects the bias; so are subnormals.
RX_DEVICE uint32_t bf16_of_e4m3(uint32_t two) {
  union Word {
    uint32_t bits;
    float value;
  };
  const Word lo = {(two << 24 & 0x80000000u) | (two & 0x7f) << 20};
  const Word hi = {(two << 16 & 0x80000000u) | (two >> 8 & 0x7f) << 20};
  return rx::pack_bf16(lo.value * 0x1p120f, hi.value * 0x1p120f);
}

// The operand at `index` of a unit: 16 bytes a lane as bf16, 8 as e4m3.
template <bool kFp8>
RX_DEVICE uint4 load_weight(const unsigned char* unit, int index, int lane) {
  if constexpr (!kFp8) return reinterpret_cast<const uint4*>(unit)[index * 32 + lane];
  const uint2 v = reinterpret_cast<const uint2*>(unit)[index * 32 + lane];
  return make_uint4(bf16_of_e4m3(v.x), bf16_of_e4m3(v.x >> 16), bf16_of_e4m3(v.y),
                    bf16_of_e4m3(v.y >> 16));
}

// Sums times the scales of their channels, which lie behind the unit's codes.
template <int kTiles>
RX_DEVICE void scale_channels(float (&acc)[kTiles][4], const unsigned char* unit, int depth) {
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
    const float2 s =
        reinterpret_cast<const float2*>(unit + depth * kTiles * 128)[n * 4 + (lane_id() & 3)];
    acc[n][0] *= s.x, acc[n][1] *= s.y, acc[n][2] *= s.x, acc[n][3] *= s.y;
  }
}

// acc[u][n] += one batch times unit u.
template <int kTiles, bool kFp8, int kCount>
RX_DEVICE void multiply_batch(Accumulators<kTiles>& acc, float (&squares)[2],
                              const uint4 (&a)[kCount], const Product& p, const unsigned char* w,
                              int k, int end, int units) {
  constexpr int kStep = 3 - kTiles;  // tiles of A that one 16-byte operand of W meets
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    if (k + i >= end) break;
    if (p.normalise) {
#pragma unroll
      for (int j = 0; j < kStep; j++) {
        squares[0] += square_of(a[i + j].x) + square_of(a[i + j].z);
        squares[1] += square_of(a[i + j].y) + square_of(a[i + j].w);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits<kTiles>; u++) {
      if (u >= units) break;
      const uint4 b = load_weight<kFp8>(w + u * p.share.unit_bytes, (k + i) / kStep, lane);
      const uint32_t a0[4] = {a[i].x, a[i].y, a[i].z, a[i].w};
      if constexpr (kTiles == 2) {
        rx::mma_m16n8k16(acc[u][0], a0, b.x, b.z);
        rx::mma_m16n8k16(acc[u][1], a0, b.y, b.w);
      } else {
        const uint32_t a1[4] = {a[i + 1].x, a[i + 1].y, a[i + 1].z, a[i + 1].w};
        rx::mma_m16n8k16(acc[u][0], a0, b.x, b.y);
        rx::mma_m16n8k16(acc[u][0], a1, b.z, b.w);
      }
    }
  }
}

// acc += the tiles begin..end of a row times the units, in the same order either way.
template <bool kRing, int kTiles, bool kFp8>
RX_DEVICE void multiply_row(Accumulators<kTiles>& acc, float (&squares)[2], const uint4* a_g,
                            const Product& p, const unsigned char* w, int begin, int end,
                            int units) {
  if constexpr (kRing) {
    Ring ring(*p.rings, p.cluster);
    uint4 a[kChunkTiles];
    int ahead = begin;  // what is sent next
    auto send = [&] {
      if (ahead < end) ring.send(a_g + ahead * 32, min(kChunkTiles, end - ahead));
      ahead += kChunkTiles;
    };
#pragma unroll 1
    for (int i = 0; i < kRingChunks; i++) send();
#pragma unroll 1
    for (int k = begin; k < end; k += kChunkTiles) {
      ring.take(a, end - k);
      if (k > begin) send();  // in place of the chunk before: peers have had time to leave that
      multiply_batch<kTiles, kFp8>(acc, squares, a, p, w, k, end, units);
    }
    ring.close();
  } else {
    uint4 now[kBatch], next[kBatch];
    load_batch(now, a_g, begin, end);
#pragma unroll 1
    for (int k = begin; k < end; k += 2 * kBatch) {
      load_batch(next, a_g, k + kBatch, end);
      multiply_batch<kTiles, kFp8>(acc, squares, now, p, w, k, end, units);
      load_batch(now, a_g, k + 2 * kBatch, end);
      multiply_batch<kTiles, kFp8>(acc, squares, next, p, w, k + kBatch, end, units);
    }
  }
}

// Adds the sums of the warps that share a row tile, in the order of their parts; part 0 keeps them.
// Named barrier `1 + row` is theirs.
template <int kTiles>
RX_DEVICE void combine(Accumulators<kTiles>& acc, float (&squares)[2], unsigned char* slots,
                       int slot_bytes, int row, int part, int splits, int units) {
  unsigned char* mine = slots + (row * (splits - 1) + part - 1) * slot_bytes;
  if (part > 0) {
#pragma unroll
    for (int u = 0; u < kUnits<kTiles>; u++) {
      if (u >= units) break;
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        reinterpret_cast<float4*>(mine)[(u * kTiles + n) * 32 + lane_id()] =
            make_float4(acc[u][n][0], acc[u][n][1], acc[u][n][2], acc[u][n][3]);
    }
    reinterpret_cast<float2*>(mine + slot_bytes - 256)[lane_id()] =
        make_float2(squares[0], squares[1]);
  }
  rx::bar_sync(1 + row, splits * 32);
  if (part > 0) return;
  for (int other = 1; other < splits; other++) {
    mine += slot_bytes;
#pragma unroll
    for (int u = 0; u < kUnits<kTiles>; u++) {
      if (u >= units) break;
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const float4 more =
            reinterpret_cast<const float4*>(mine)[(u * kTiles + n) * 32 + lane_id()];
        acc[u][n][0] += more.x, acc[u][n][1] += more.y;
        acc[u][n][2] += more.z, acc[u][n][3] += more.w;
      }
    }
    const float2 more = reinterpret_cast<const float2*>(mine + slot_bytes - 256)[lane_id()];
    squares[0] += more.x, squares[1] += more.y;
  }
}

// The scales of rows l/4 and l/4 + 8 from each lane's share of the squares.
RX_DEVICE void row_scales(float (&scale)[2], const float (&squares)[2], int length, float eps) {
#pragma unroll
  for (int half = 0; half < 2; half++)
    scale[half] = rsqrtf(__fdividef(rx::sum_of_row(squares[half]), float(length)) + eps);
}

// All row tiles of this CTA's group times all units of its slice. In one warp run
//   finish.residual(early, tile, first unit, units)  what is there from epoch `ready` on
//   finish.scales(early, tile)                       what is there from `needs.epoch` on
//   finish.tables(early, ..)                         what was always there, before parts are added
//   finish(tile, unit, sums of the unit, scales of the two rows, early, number of the unit)
template <int kTiles, bool kFp8, bool kRing, class Finish>
RX_DEVICE void product(const Product& p, unsigned char* handover, const Finish& finish) {
  constexpr int kStep = 3 - kTiles;
  const Share& s = p.share;
  const int splits = 1 << p.split_bits, row = warp_id() >> p.split_bits;
  const int part = warp_id() & (splits - 1), steps = s.depth / kStep;
  const int begin = (steps * part >> p.split_bits) * kStep;
  const int end = (steps * (part + 1) >> p.split_bits) * kStep;
#pragma unroll 1
  for (int first = s.first; first < (kRing ? s.first + p.most : s.last); first += kUnits<kTiles>) {
    const int left = s.last - first, units = min(kUnits<kTiles>, kRing ? max(left, 0) : left);
    const unsigned char* w = s.weights + int64_t(first - s.first) * s.unit_bytes;
#pragma unroll 1
    for (int mine = row; mine < s.tiles; mine += kWarps >> p.split_bits) {
      const int tile = mine * p.groups + p.group;
      const bool finishes = part == 0 && (!kRing || units > 0);
      Accumulators<kTiles> acc = {};
      float squares[2] = {0.f, 0.f}, scale[2] = {1.f, 1.f};
      typename Finish::Early early = {};
      uint32_t seen = p.needs.epoch;  // after the first units the rows are there
      if (first == s.first) seen = p.needs.wait(tile, Finish::kResidual ? p.ready : p.needs.epoch);
      if constexpr (Finish::kResidual) {
        if (finishes) finish.residual(early, tile, first, units);
        if (__shfl_sync(rx::kFullWarp, seen, 0) < p.needs.epoch) p.needs.wait(tile);
        if (finishes) finish.scales(early, tile);
      }
      const uint4* a_g = p.a_g + int64_t(tile) * s.depth * 32;
      multiply_row<kRing, kTiles, kFp8>(acc, squares, a_g, p, w, begin, end, units);
      if (finishes) finish.tables(early, tile, first, units);
      if (splits > 1) combine(acc, squares, handover, s.slot_bytes, row, part, splits, units);
      if (finishes) {
        if (p.normalise) row_scales(scale, squares, s.depth * 16, p.eps);
#pragma unroll
        for (int u = 0; u < kUnits<kTiles>; u++) {
          if (u >= units) break;
          if constexpr (kFp8) scale_channels(acc[u], w + u * s.unit_bytes, s.depth);
          finish(tile, first + u, acc[u], scale, early, u);
        }
        arrive(p.done_g + tile * kFlagStride, units);
      }
      if (splits > 1) rx::bar_sync(1 + row, splits * 32);  // the slots are free again
    }
  }
}

}  // namespace grid_sm80
