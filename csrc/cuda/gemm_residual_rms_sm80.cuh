// gemm_residual_rms_sm80.cuh - out = rms(residual + A W^T), a row block a CTA.
//
//   A [M, K], W [N, K], residual and out [M, N], bf16; rms(x) = x * rsqrt(mean(x^2) + eps) over N.
//
// A CTA owns kRows rows and all N columns, so that the rms of a row is local to it. Tiles of 32
// columns of A and W arrive by cp.async in a ring; its depth is a template argument because devices
// of 99 KB hold two stages of N = 512 and those of 163 KB four. Warps stand side by side along N,
// each with kRows x kWarpColumns accumulators in registers.
//
//   ring: kStages x (A tile kRows x 32 | W tile N x 32), 64-byte rows, 16-byte chunks swizzled
//   sums: kWarps x kRows fp32, partial sums of squares
#pragma once
#include "rx.cuh"

namespace gemm_residual_rms_sm80 {

struct Params {
  const rx::bf16 *a_g, *w_g, *residual_g;
  rx::bf16* out_g;
  int m, k;
  float eps;
};

template <int N, int kStages_>
struct Plan {
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 32;   // two m16 tiles: W fragments are used twice
  static constexpr int kDepth = 32;  // columns of A and W a stage
  static constexpr int kWarps = N >= 128 ? 8 : N / 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpColumns = N / kWarps;
  static constexpr uint32_t kTileA = kRows * kDepth * 2, kTileW = N * kDepth * 2;
  static constexpr uint32_t kStage = kTileA + kTileW;
  static constexpr uint32_t kSums = kStages * kStage;  // offset
  static constexpr uint32_t kShared = kSums + kWarps * kRows * 4;
  static_assert(N % 64 == 0 && kWarpColumns % 16 == 0, "W is loaded 16 rows at a time");
  static_assert(kShared <= rx::kMaxSharedSm80, "more shared memory than an A100 has");
};

// Byte offset of 16-byte chunk c (0..3) of row r: eight consecutive rows of a chunk fall into
// different banks, for the copies as for ldmatrix.
RX_DEVICE uint32_t tile_offset(int r, int c) {
  return uint32_t(r * 64 + ((c ^ (r >> 1 & 3)) << 4));
}

// Starts the copies of tile `kt`; rows of A beyond m arrive as zeros.
template <class P, int N>
RX_DEVICE void load_stage(const Params& p, uint32_t stage_s, int row0, int kt) {
  const int tid = threadIdx.x;
  for (int i = tid; i < P::kRows * 4; i += P::kThreads) {
    const int r = i >> 2, c = i & 3;
    const bool inside = row0 + r < p.m;
    const rx::bf16* src = p.a_g + size_t(inside ? row0 + r : 0) * p.k + kt * P::kDepth + c * 8;
    rx::cp_async<16>(stage_s + tile_offset(r, c), src, inside ? 16 : 0);
  }
  for (int i = tid; i < N * 4; i += P::kThreads) {
    const int r = i >> 2, c = i & 3;
    rx::cp_async<16>(stage_s + P::kTileA + tile_offset(r, c),
                     p.w_g + size_t(r) * p.k + kt * P::kDepth + c * 8);
  }
}

// acc[i][j] += the products of one stage; i numbers m16 tiles, j n8 tiles of the warp.
template <class P, int kTiles>
RX_DEVICE void multiply_stage(float (&acc)[2][kTiles][4], uint32_t stage_s) {
  const int lane = threadIdx.x & 31, column0 = (threadIdx.x >> 5) * P::kWarpColumns;
  const uint32_t w_s = stage_s + P::kTileA;
#pragma unroll
  for (int ks = 0; ks < P::kDepth / 16; ks++) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
      rx::ldmatrix_x4(a[i], stage_s + tile_offset(i * 16 + (lane & 15), ks * 2 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t w[4];
      const int r = column0 + j * 8 + ((lane >> 4) << 3) + (lane & 7);
      rx::ldmatrix_x4(w, w_s + tile_offset(r, ks * 2 + ((lane >> 3) & 1)));
      rx::mma_m32n16k16(acc[0][j], acc[0][j + 1], acc[1][j], acc[1][j + 1], a[0], a[1], w);
    }
  }
}

// Adds the residual and returns this thread's share of the sums of squares of its four rows.
template <class P, int N, int kTiles>
RX_DEVICE void add_residual(const Params& p, float (&acc)[2][kTiles][4], float (&squares)[2][2],
                            int row0) {
  const int lane = threadIdx.x & 31;
  const int column0 = (threadIdx.x >> 5) * P::kWarpColumns + (lane & 3) * 2;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row0 + i * 16 + half * 8 + (lane >> 2);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        uint32_t v = 0;
        if (r < p.m)
          v = *reinterpret_cast<const uint32_t*>(p.residual_g + size_t(r) * N + column0 + j * 8);
        const float2 x = rx::unpack_bf16(v);
        float &lo = acc[i][j][half * 2], &hi = acc[i][j][half * 2 + 1];
        lo += x.x, hi += x.y;
        sum += lo * lo + hi * hi;
      }
      squares[i][half] = sum;
    }
}

// Sums over the four lanes of a row, then over the warps through shared memory.
template <class P>
RX_DEVICE void reduce_rows(float (&squares)[2][2], float* sums_s) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float& s = squares[i][half];
      s += __shfl_xor_sync(rx::kFullWarp, s, 1);
      s += __shfl_xor_sync(rx::kFullWarp, s, 2);
      if ((lane & 3) == 0) sums_s[warp * P::kRows + i * 16 + half * 8 + (lane >> 2)] = s;
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float s = 0.f;
      for (int w = 0; w < P::kWarps; w++)
        s += sums_s[w * P::kRows + i * 16 + half * 8 + (lane >> 2)];
      squares[i][half] = s;
    }
}

template <class P, int N, int kTiles>
RX_DEVICE void store_rows(const Params& p, const float (&acc)[2][kTiles][4],
                          const float (&squares)[2][2], int row0) {
  const int lane = threadIdx.x & 31;
  const int column0 = (threadIdx.x >> 5) * P::kWarpColumns + (lane & 3) * 2;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row0 + i * 16 + half * 8 + (lane >> 2);
      const float scale = rsqrtf(squares[i][half] * (1.f / N) + p.eps);
      if (r >= p.m) continue;
#pragma unroll
      for (int j = 0; j < kTiles; j++)
        *reinterpret_cast<uint32_t*>(p.out_g + size_t(r) * N + column0 + j * 8) =
            rx::pack_bf16(acc[i][j][half * 2] * scale, acc[i][j][half * 2 + 1] * scale);
    }
}

template <int N, int kStages>
__global__ void __launch_bounds__(Plan<N, kStages>::kThreads) kernel(const Params p) {
  using P = Plan<N, kStages>;
  constexpr int kTiles = P::kWarpColumns / 8;
  RX_DYN_SMEM(smem);
  const uint32_t ring_s = rx::smem_u32(smem);
  const int row0 = blockIdx.x * P::kRows, tiles = p.k / P::kDepth;
  auto stage = [&](int kt) { return ring_s + uint32_t(kt % kStages) * P::kStage; };

  float acc[2][kTiles][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;

  for (int kt = 0; kt < kStages - 1; kt++) {
    if (kt < tiles) load_stage<P, N>(p, stage(kt), row0, kt);
    rx::cp_async_commit();  // an empty group keeps the count of groups in step with kt
  }
  for (int kt = 0; kt < tiles; kt++) {
    rx::cp_async_wait<kStages - 2>();
    __syncthreads();  // tile kt is there for all, and all have left tile kt - 1
    const int next = kt + kStages - 1;
    if (next < tiles) load_stage<P, N>(p, stage(next), row0, next);
    rx::cp_async_commit();
    multiply_stage<P>(acc, stage(kt));
  }

  float squares[2][2];
  add_residual<P, N>(p, acc, squares, row0);
  reduce_rows<P>(squares, reinterpret_cast<float*>(smem + P::kSums));
  store_rows<P, N>(p, acc, squares, row0);
}

}  // namespace gemm_residual_rms_sm80
