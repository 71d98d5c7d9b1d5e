// gemm_residual_rms_sm90a.cuh - out = rms(residual + A W^T), a cluster of CTAs a row block.
//
//   A [M, K], residual and out [M, 2 * kColumns], bf16; rms(x) = x * rsqrt(mean(x^2) + eps).
//   W arrives as a tape (pack_tape.cu): [K / 64][N][64], swizzled, in the order of use.
//
// CTA `rank` of a cluster owns rows of group rank / 2 and the columns of half rank % 2. Both halves
// of a row group need the same tile of A, all row groups the same tile of W: each CTA fetches its
// share and multicasts it, so that A and W cross from L2 once a cluster. A producer thread fills
// the ring; two consumer warpgroups multiply, 64 rows each. The two halves of a row exchange their
// sums of squares through distributed shared memory.
//
//   ring:     kStages x (A 128 x 64 | W kColumns x 64), 128-byte rows, 128-byte swizzle
//   sums:     128 fp32, written by the other half
//   barriers: full[kStages], empty[kStages], sums_ready
#pragma once
#include "rx.cuh"

namespace gemm_residual_rms_sm90a {

struct Params {
  const rx::bf16 *tape_g, *residual_g;
  rx::bf16* out_g;
  int m, k;
  float eps;
};

template <int kColumns_, int kRowGroups_>
struct Plan {
  static constexpr int kColumns = kColumns_, kRowGroups = kRowGroups_;
  static constexpr int kRows = 128, kDepth = 64;   // a CTA's rows; columns of A and W a stage
  static constexpr int kCluster = 2 * kRowGroups;  // CTAs
  static constexpr int kThreads = 384;             // one producer and two consumer warpgroups
  static constexpr int kConsumers = 2;             // warpgroups
  // A CTA's copies land in its row group (2 CTAs) and its column half (kRowGroups), itself in both.
  static constexpr int kReceivers = 2 + kRowGroups - 1;
  static constexpr uint32_t kTileA = kRows * 128, kTileW = kColumns * 128, kStage = kTileA + kTileW;
  static constexpr uint32_t kForRing =
      rx::kMaxSharedSm90 - 1024;  // sums and barriers need the rest
  static constexpr int kStages = kForRing / kStage < 6 ? kForRing / kStage : 6;
  static constexpr uint32_t kSums = kStages * kStage;  // offset
  static constexpr uint32_t kFull = kSums + kRows * 4, kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kSumsReady = kEmpty + 8 * kStages, kShared = kSumsReady + 8;
  static_assert(kStages >= 3 && kShared <= rx::kMaxSharedSm90, "the ring needs three stages");
};

// Where this CTA stands, and the shared addresses of its ring.
template <class P>
struct Place {
  uint32_t smem_s, rank, row_group, half;
  int row0;
  RX_DEVICE explicit Place(const void* smem)
      : smem_s(rx::smem_u32(smem)), rank(rx::cluster_rank()), row_group(rank / 2), half(rank % 2) {
    row0 = (blockIdx.x / P::kCluster * P::kRowGroups + row_group) * P::kRows;
  }
  RX_DEVICE uint32_t tile_a(int kt) const { return smem_s + uint32_t(kt % P::kStages) * P::kStage; }
  RX_DEVICE uint32_t tile_w(int kt) const { return tile_a(kt) + P::kTileA; }
  RX_DEVICE uint32_t full(int kt) const { return smem_s + P::kFull + 8 * (kt % P::kStages); }
  RX_DEVICE uint32_t empty(int kt) const { return smem_s + P::kEmpty + 8 * (kt % P::kStages); }
  RX_DEVICE uint32_t parity(int kt) const { return uint32_t(kt / P::kStages) & 1; }
  // Do copies of this CTA land in CTA `other`? The relation is symmetric.
  RX_DEVICE bool shares_with(uint32_t other) const {
    return other / 2 == row_group || other % 2 == half;
  }
};

template <class P>
RX_DEVICE void init_barriers(const Place<P>& at) {
  for (int s = 0; s < P::kStages; s++) {
    rx::mbar_init(at.full(s), 1);
    rx::mbar_init(at.empty(s), P::kReceivers * P::kConsumers);
  }
  rx::mbar_init(at.smem_s + P::kSumsReady, P::kConsumers * 4);  // a warp of the other half each
  rx::fence_mbarrier_init();
}

// One thread: for each tile, wait until every receiver has left the stage, then send this CTA's
// share.
template <class P>
RX_DEVICE void produce(const Place<P>& at, const rx::TensorMap* a_map, const Params& p) {
  constexpr int kShareA = P::kRows / 2, kShareW = P::kColumns / P::kRowGroups;  // rows
  const uint16_t to_row_group = uint16_t(3u << (2 * at.row_group));
  const uint16_t to_half = uint16_t((P::kRowGroups == 2 ? 5u : 1u) << at.half);
  const int tiles = p.k / P::kDepth;
  for (int kt = 0; kt < tiles; kt++) {
    rx::mbar_wait(at.empty(kt), at.parity(kt) ^ 1);  // passes at once in the first round
    rx::mbar_arrive_expect_tx(at.full(kt), P::kStage);
    rx::tensor_load_2d_multicast(at.tile_a(kt) + at.half * kShareA * 128, a_map, kt * P::kDepth,
                                 at.row0 + int(at.half) * kShareA, at.full(kt), to_row_group);
    const uint32_t first_row = at.row_group * kShareW;
    const size_t tape_row = size_t(kt) * 2 * P::kColumns + at.half * P::kColumns + first_row;
    rx::bulk_load_multicast(at.tile_w(kt) + first_row * 128, p.tape_g + tape_row * P::kDepth,
                            kShareW * 128, at.full(kt), to_half);
  }
}

// A warpgroup multiplies its 64 rows. A stage is released once the products that read it are done,
// which is known one tile later: the tensor cores never idle between tiles.
template <class P>
RX_DEVICE void multiply(const Place<P>& at, float (&acc)[P::kColumns / 2], int tiles) {
  const uint32_t t = threadIdx.x % 128, rows_a = (threadIdx.x / 128 - 1) * 64 * 128;
  for (int kt = 0; kt < tiles; kt++) {
    rx::mbar_wait(at.full(kt), at.parity(kt));
    rx::wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < P::kDepth / 16; ks++)
      rx::wgmma<P::kColumns>(acc, rx::wgmma_desc_128b(at.tile_a(kt) + rows_a + ks * 32),
                             rx::wgmma_desc_128b(at.tile_w(kt) + ks * 32), (kt | ks) != 0);
    rx::wgmma_commit();
    rx::wgmma_wait<1>();
    if (kt > 0 && t < P::kCluster && at.shares_with(t))
      rx::mbar_arrive_remote(rx::mapa(at.empty(kt - 1), t));
  }
  rx::wgmma_wait<0>();
}

// Adds the residual, normalises with the sums of both halves, stores.
template <class P>
RX_DEVICE void finish(const Place<P>& at, float (&acc)[P::kColumns / 2], const float* sums_s,
                      const Params& p) {
  constexpr int kN = 2 * P::kColumns;
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4;
  const int column0 = int(at.half) * P::kColumns + (lane & 3) * 2;
  const uint32_t sums_there = rx::mapa(at.smem_s + P::kSums, at.rank ^ 1);
  const uint32_t ready = at.smem_s + P::kSumsReady;
  float squares[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = warp * 16 + h * 8 + (lane >> 2), r = at.row0 + row;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < P::kColumns / 8; j++) {
      uint32_t v = 0;
      if (r < p.m)
        v = *reinterpret_cast<const uint32_t*>(p.residual_g + size_t(r) * kN + column0 + j * 8);
      const float2 x = rx::unpack_bf16(v);
      float &lo = acc[4 * j + 2 * h], &hi = acc[4 * j + 2 * h + 1];
      lo += x.x, hi += x.y;
      sum += lo * lo + hi * hi;
    }
    sum += __shfl_xor_sync(rx::kFullWarp, sum, 1);
    sum += __shfl_xor_sync(rx::kFullWarp, sum, 2);
    squares[h] = sum;
    if ((lane & 3) == 0) rx::st_cluster_f32(sums_there + row * 4, sum);
  }
  __syncwarp();  // lane 0 speaks for the stores of its warp
  if (lane == 0) rx::mbar_arrive_remote(rx::mapa(ready, at.rank ^ 1));
  rx::mbar_wait(ready, 0);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = warp * 16 + h * 8 + (lane >> 2), r = at.row0 + row;
    const float scale = rsqrtf((squares[h] + sums_s[row]) * (1.f / kN) + p.eps);
    if (r >= p.m) continue;
#pragma unroll
    for (int j = 0; j < P::kColumns / 8; j++)
      *reinterpret_cast<uint32_t*>(p.out_g + size_t(r) * kN + column0 + j * 8) =
          rx::pack_bf16(acc[4 * j + 2 * h] * scale, acc[4 * j + 2 * h + 1] * scale);
  }
}

template <int kColumns, int kRowGroups>
__global__ void __launch_bounds__(384, 1)
    kernel(const __grid_constant__ rx::TensorMap a_map, const Params p) {
  using P = Plan<kColumns, kRowGroups>;
  RX_DYN_SMEM(smem);
  const Place<P> at(smem);
  if (threadIdx.x == 0) init_barriers(at);
  rx::cluster_arrive();
  rx::cluster_wait();  // no copy and no arrival before every CTA's barriers are there

  if (threadIdx.x < 128) {
    rx::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) produce(at, &a_map, p);
  } else {
    rx::setmaxnreg_inc<232>();
    float acc[kColumns / 2];
    multiply<P>(at, acc, p.k / P::kDepth);
    finish<P>(at, acc, reinterpret_cast<const float*>(smem + P::kSums), p);
  }
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();  // a CTA that left could not take the arrivals that are still to come
}

}  // namespace gemm_residual_rms_sm90a
