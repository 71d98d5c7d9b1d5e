// product.cuh - one product of a stage: rows of L2 times the CTA's slice of a weight, and what
// happens to the sums: RoPE, SwiGLU, the residual.
//
// A warp takes a row tile (or a part of its depth, `k_splits` of them) and some units of
// output channels. Operands of the rows come from L2 straight into registers, two batches of eight
// tiles in flight; operands of the weights from shared memory, or from L2 where they did not fit.
// "No norm pass": rows are stored before their rms; whoever multiplies a row has all of it at hand,
// forms its scale on the way and applies that to the sums.
#pragma once
#include "../rx/rx.cuh"
#include "layout.cuh"

namespace grid_sm80 {

struct Product {
  const uint4* a_g;        // [row tiles][depth] tiles
  const unsigned char* w;  // the slice of this CTA: units of unit_bytes, shared or global memory
  int row_tiles, depth, unit_bytes;
  Slice slice;
  int splits, slot_bytes;  // warps that share a row tile's depth; what one of them hands over
  bool normalise;          // rows are not normalised yet
  float eps;
};

// n8 tiles a unit: 2 wide, 1 narrow.
template <int kTiles>
constexpr int kUnits = kTiles == 2 ? kWideUnits : kNarrowUnits;
template <int kTiles>
using Accumulators = float[kUnits<kTiles>][kTiles][4];

constexpr int kBatch = 8;  // tiles of A that a warp loads at once: 4 KB

RX_DEVICE int lane_id() { return threadIdx.x & 31; }
RX_DEVICE int warp_id() { return threadIdx.x >> 5; }

RX_DEVICE void load_batch(uint4 (&a)[kBatch], const uint4* a_g, int k, int end) {
#pragma unroll
  for (int i = 0; i < kBatch; i++) {
    a[i] = make_uint4(0, 0, 0, 0);
    if (k + i < end) a[i] = a_g[(k + i) * 32 + lane_id()];
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
RX_DEVICE uint4 load_weight(const unsigned char* unit, int index) {
  if constexpr (!kFp8) return reinterpret_cast<const uint4*>(unit)[index * 32 + lane_id()];
  const uint2 v = reinterpret_cast<const uint2*>(unit)[index * 32 + lane_id()];
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
template <int kTiles, bool kFp8>
RX_DEVICE void multiply_batch(Accumulators<kTiles>& acc, float (&squares)[2],
                              const uint4 (&a)[kBatch], const Product& p, const unsigned char* w,
                              int k, int end, int units) {
  constexpr int kStep = 3 - kTiles;  // tiles of A that one 16-byte operand of W meets
#pragma unroll
  for (int i = 0; i < kBatch; i += kStep) {
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
      const uint4 b = load_weight<kFp8>(w + u * p.unit_bytes, (k + i) / kStep);
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

// Adds the sums of the warps that share a row tile, in the order of their parts; part 0 keeps them.
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
  __syncthreads();
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
  for (int half = 0; half < 2; half++) {
    float s = squares[half];
    s += __shfl_xor_sync(rx::kFullWarp, s, 1);
    s += __shfl_xor_sync(rx::kFullWarp, s, 2);
    scale[half] = rsqrtf(s / float(length) + eps);
  }
}

// All row tiles of this CTA's group times all units of its slice.
// finish(row tile, unit, sums of the unit, scales of the two rows) runs in one warp.
template <int kTiles, bool kFp8, class Finish>
RX_DEVICE void product(const Product& p, unsigned char* handover, const Finish& finish) {
  constexpr int kStep = 3 - kTiles;
  const int rows = kWarps / p.splits, row = warp_id() / p.splits, part = warp_id() % p.splits;
  const int steps = p.depth / kStep;
  const int begin = steps * part / p.splits * kStep, end = steps * (part + 1) / p.splits * kStep;
  const int tiles = ceil_div(p.row_tiles - p.slice.group, p.slice.groups);
#pragma unroll 1
  for (int first = p.slice.first; first < p.slice.last; first += kUnits<kTiles>) {
    const int units = min(kUnits<kTiles>, p.slice.last - first);
    const unsigned char* w = p.w + int64_t(first - p.slice.first) * p.unit_bytes;
#pragma unroll 1
    for (int base = 0; base < tiles; base += rows) {
      const int tile = (base + row) * p.slice.groups + p.slice.group;
      const bool work = base + row < tiles;
      Accumulators<kTiles> acc = {};
      float squares[2] = {0.f, 0.f}, scale[2] = {1.f, 1.f};
      if (work) {
        const uint4* a_g = p.a_g + int64_t(tile) * p.depth * 32;
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
      if (p.splits > 1) combine(acc, squares, handover, p.slot_bytes, row, part, p.splits, units);
      if (work && part == 0) {
        if (p.normalise) row_scales(scale, squares, p.depth * 16, p.eps);
#pragma unroll
        for (int u = 0; u < kUnits<kTiles>; u++) {
          if (u >= units) break;
          if constexpr (kFp8) scale_channels(acc[u], w + u * p.unit_bytes, p.depth);
          finish(tile, first + u, acc[u], scale);
        }
      }
      if (p.splits > 1) __syncthreads();  // the slots are free again
    }
  }
}

// An 8 x 8 block, lane l row l/4 and columns 2(l%4) and the next, exchanged with its transpose.
RX_DEVICE uint32_t transpose_8x8(uint32_t v) {
  const int row = lane_id() >> 2, column = lane_id() & 3;
  const uint32_t even = __shfl_sync(rx::kFullWarp, v, column * 8 + (row >> 1));
  const uint32_t odd = __shfl_sync(rx::kFullWarp, v, column * 8 + 4 + (row >> 1));
  return row & 1 ? (even >> 16) | (odd & 0xffff0000u) : (even & 0xffffu) | (odd << 16);
}

// Keeps the scales of a row tile for the product that adds the residual.
RX_DEVICE void keep_scales(float* scale_g, int tile, const float (&scale)[2]) {
  if (lane_id() & 3) return;
  scale_g[tile * 16 + (lane_id() >> 2)] = scale[0];
  scale_g[tile * 16 + 8 + (lane_id() >> 2)] = scale[1];
}

// ---- what happens to the sums

// They hold little and fetch the rest when it is needed: registers belong to the products.

struct FinishQkv {
  const RxRecursion& r;
  const Sizes& z;
  int head_tiles;

  // lo and hi are the columns j and j + head_dim/2 of a row.
  RX_DEVICE void rotate(float& lo, float& hi, int token, int j) const {
    const int half = head_tiles * 8, dim = 2 * half, at = min(token, r.tokens - 1) * dim + j;
    const float x = lo, y = hi;
    lo = x * r.cos[at] - y * r.sin[at];
    hi = y * r.cos[at + half] + x * r.sin[at + half];
  }

  RX_DEVICE void operator()(int tile, int unit, float (&acc)[2][4], const float (&scale)[2]) const {
    const int part = unit / z.width, index = unit % z.width, token_tile = tile % z.token_tiles;
    unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] *= scale[e >> 1];
    if (part < 2 && r.cos) {
      const int token = token_tile * 16 + (lane_id() >> 2);
      const int j = index % head_tiles * 8 + (lane_id() & 3) * 2;
#pragma unroll
      for (int e = 0; e < 4; e++) rotate(acc[0][e], acc[1][e], token + (e >> 1) * 8, j + (e & 1));
    }
    uint4 v = make_uint4(rx::pack_bf16(acc[0][0], acc[0][1]), rx::pack_bf16(acc[0][2], acc[0][3]),
                         rx::pack_bf16(acc[1][0], acc[1][1]), rx::pack_bf16(acc[1][2], acc[1][3]));
    if (part < 2) {
      uint4* out_g = reinterpret_cast<uint4*>(scratch_g + (part ? z.k : z.q));
      out_g[(int64_t(tile) * z.width + index) * 32 + lane_id()] = v;
      return;
    }
    // V^T, 16 columns of V x 16 tokens; the words of an n8 operand side by side.
    v = make_uint4(transpose_8x8(v.x), transpose_8x8(v.y), transpose_8x8(v.z), transpose_8x8(v.w));
    const int64_t at = int64_t(tile / z.token_tiles) * z.width + index;
    reinterpret_cast<uint4*>(scratch_g + z.v)[(at * z.token_tiles + token_tile) * 32 + lane_id()] =
        v;
  }
};

// Units of 16 channels: QKV, or eight gates with their eight ups.
struct FinishWide {
  FinishQkv qkv;
  int inner;  // width of the middle, in tiles
  bool is_qkv;
  bool keeps_scale;  // of the rows, for the residual; else they are normalised

  RX_DEVICE static float swiglu(float gate, float up) {
    return __fdividef(gate, 1.f + __expf(-gate)) * up;
  }

  RX_DEVICE void operator()(int tile, int unit, float (&acc)[2][4], const float (&scale)[2]) const {
    unsigned char* scratch_g = static_cast<unsigned char*>(qkv.r.scratch);
    if (unit == 0 && keeps_scale)
      keep_scales(reinterpret_cast<float*>(scratch_g + qkv.z.scale), tile, scale);
    if (is_qkv) return qkv(tile, unit, acc, scale);
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = swiglu(acc[0][e] * scale[e >> 1], acc[1][e] * scale[e >> 1]);
    const int64_t at = (int64_t(tile) * inner + unit / 2) * 32 + lane_id();
    *reinterpret_cast<uint2*>(scratch_g + qkv.z.middle + at * 16 + unit % 2 * 8) =
        make_uint2(rx::pack_bf16(x[0], x[1]), rx::pack_bf16(x[2], x[3]));
  }
};

// out <- out * scale + sums, in place: every element is one lane's alone.
struct FinishResidual {
  unsigned char* out_g;  // [row tiles][width] tiles
  const float* scale_g;  // of the rows that are there; null: 1
  int width;

  RX_DEVICE void operator()(int tile, int unit, float (&acc)[1][4], const float (&)[2]) const {
    const int row = tile * 16 + (lane_id() >> 2);
    const float s0 = scale_g ? scale_g[row] : 1.f, s1 = scale_g ? scale_g[row + 8] : 1.f;
    const int64_t at = (int64_t(tile) * width + unit / 2) * 32 + lane_id();
    uint2* out = reinterpret_cast<uint2*>(out_g + at * 16 + unit % 2 * 8);
    const float2 low = rx::unpack_bf16(out->x), high = rx::unpack_bf16(out->y);
    *out = make_uint2(rx::pack_bf16(low.x * s0 + acc[0][0], low.y * s0 + acc[0][1]),
                      rx::pack_bf16(high.x * s1 + acc[0][2], high.y * s1 + acc[0][3]));
  }
};

}  // namespace grid_sm80
