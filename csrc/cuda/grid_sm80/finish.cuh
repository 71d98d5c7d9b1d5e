// finish.cuh - what happens to the sums of a product: RoPE, SwiGLU, the residual; and what of that
// is asked for before the sums are there, so that no load is waited for behind them.
#pragma once
#include "product.cuh"

namespace grid_sm80 {

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

// Units of 16 channels: QKV, or eight gates with their eight ups. It holds little and fetches the
// rest when it is needed: registers belong to the products.
struct FinishWide {
  static constexpr bool kResidual = false;
  // Of each unit's rows l/4 and l/4 + 8: cos and sin of the columns j and j + head_dim/2, and of
  // the next.
  struct Early {
    float2 cos[kWideUnits][2][2], sin[kWideUnits][2][2];
  };
  const RxRecursion& r;
  const Sizes& z;
  const BlockShare& share;
  int64_t k, v, middle;  // where they go in scratch
  int inner;             // width of the middle, in tiles
  bool is_qkv;
  bool keeps_scale;  // of the rows, for the residual; else they are normalised

  // Q, K or V.
  RX_DEVICE int part_of(int unit) const { return (unit >= z.width) + (unit >= 2 * z.width); }

  RX_DEVICE void tables(Early& early, int tile, int first, int units) const {
    if (!is_qkv || !r.cos) return;
    const int token = z.by_token_tiles.rest(tile) * 16 + (lane_id() >> 2);
    const int half = share.head_tiles * 8;
#pragma unroll
    for (int u = 0; u < kWideUnits; u++) {
      if (u >= units || first + u >= 2 * z.width) break;
      const int index = first + u - part_of(first + u) * z.width;
      const int j = share.by_head_tiles.rest(index) * 8 + (lane_id() & 3) * 2;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const int at = min(token + row * 8, r.tokens - 1) * 2 * half + j;
#pragma unroll
        for (int side = 0; side < 2; side++) {
          early.cos[u][row][side] = *reinterpret_cast<const float2*>(r.cos + at + side * half);
          early.sin[u][row][side] = *reinterpret_cast<const float2*>(r.sin + at + side * half);
        }
      }
    }
  }

  RX_DEVICE void qkv(int tile, int unit, float (&acc)[2][4], const float (&scale)[2],
                     const Early& early, int u) const {
    const int part = part_of(unit), index = unit - part * z.width;
    unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] *= scale[e >> 1];
    if (part < 2 && r.cos) {
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const float2(&c)[2] = early.cos[u][row], (&s)[2] = early.sin[u][row];
        rx::rotate(acc[0][row * 2], acc[1][row * 2], c[0].x, s[0].x, c[1].x, s[1].x);
        rx::rotate(acc[0][row * 2 + 1], acc[1][row * 2 + 1], c[0].y, s[0].y, c[1].y, s[1].y);
      }
    }
    uint4 x = make_uint4(rx::pack_bf16(acc[0][0], acc[0][1]), rx::pack_bf16(acc[0][2], acc[0][3]),
                         rx::pack_bf16(acc[1][0], acc[1][1]), rx::pack_bf16(acc[1][2], acc[1][3]));
    if (part < 2) {
      uint4* out_g = reinterpret_cast<uint4*>(scratch_g + (part ? k : z.q));
      out_g[(int64_t(tile) * z.width + index) * 32 + lane_id()] = x;
      return;
    }
    // V^T, 16 columns of V x 16 tokens; the words of an n8 operand side by side.
    x = make_uint4(transpose_8x8(x.x), transpose_8x8(x.y), transpose_8x8(x.z), transpose_8x8(x.w));
    const int64_t at = int64_t(z.by_token_tiles.of(tile)) * z.width + index;
    reinterpret_cast<uint4*>(
        scratch_g + v)[(at * z.token_tiles + z.by_token_tiles.rest(tile)) * 32 + lane_id()] = x;
  }

  RX_DEVICE void operator()(int tile, int unit, float (&acc)[2][4], const float (&scale)[2],
                            const Early& early, int u) const {
    unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
    if (unit == 0 && keeps_scale)
      keep_scales(reinterpret_cast<float*>(scratch_g + z.scale), tile, scale);
    if (is_qkv) return qkv(tile, unit, acc, scale, early, u);
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
      x[e] = rx::swiglu(acc[0][e] * scale[e >> 1], acc[1][e] * scale[e >> 1]);
    const int64_t at = (int64_t(tile) * inner + unit / 2) * 32 + lane_id();
    *reinterpret_cast<uint2*>(scratch_g + middle + at * 16 + unit % 2 * 8) =
        make_uint2(rx::pack_bf16(x[0], x[1]), rx::pack_bf16(x[2], x[3]));
  }
};

// out <- out * scale + sums, in place: every element is one lane's alone.
struct FinishResidual {
  static constexpr bool kResidual = true;
  struct Early {
    uint2 out[kNarrowUnits];
    float scale[2];
  };
  unsigned char* out_g;  // [row tiles][width] tiles
  const float* scale_g;  // of the rows that are there; null: 1
  int width;

  RX_DEVICE uint2* place(int tile, int unit) const {
    const int64_t at = (int64_t(tile) * width + unit / 2) * 32 + lane_id();
    return reinterpret_cast<uint2*>(out_g + at * 16 + unit % 2 * 8);
  }

  RX_DEVICE void tables(Early&, int, int, int) const {}
  RX_DEVICE void residual(Early& early, int tile, int first, int units) const {
#pragma unroll
    for (int u = 0; u < kNarrowUnits; u++)
      if (u < units) early.out[u] = *place(tile, first + u);
  }
  RX_DEVICE void scales(Early& early, int tile) const {
    const int row = tile * 16 + (lane_id() >> 2);
    early.scale[0] = scale_g ? scale_g[row] : 1.f;
    early.scale[1] = scale_g ? scale_g[row + 8] : 1.f;
  }

  RX_DEVICE void operator()(int tile, int unit, float (&acc)[1][4], const float (&)[2],
                            const Early& early, int u) const {
    const float s0 = early.scale[0], s1 = early.scale[1];
    const float2 low = rx::unpack_bf16(early.out[u].x), high = rx::unpack_bf16(early.out[u].y);
    *place(tile, unit) =
        make_uint2(rx::pack_bf16(low.x * s0 + acc[0][0], low.y * s0 + acc[0][1]),
                   rx::pack_bf16(high.x * s1 + acc[0][2], high.y * s1 + acc[0][3]));
  }
};

}  // namespace grid_sm80
