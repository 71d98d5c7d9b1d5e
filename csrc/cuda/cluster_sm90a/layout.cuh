// layout.cuh - the sizes of the cluster recursion: its tape and its shared memory.
//
// The tape of a net is a row of stages of 16 KB in the order of use; the two CTAs of a sample have
// a half of each. All weights lie as wgmma's operand B, K-major: tiles of 32 columns (64-byte
// swizzle), of `second` 16 columns (32-byte swizzle). c is the CTA, 0 or 1.
//
//   stage of     holds
//   first        [c][128 rows][32 of k]: K and V of head 2p + c, or gate and up of 64 of the middle
//   query        [c][2 tiles of k][64 rows][32]: Q of head 2p + c
//   second       [c] units [16 of k][hidden / 2 rows][16]: O over two heads, or down over 128 of
//                the middle; c owns the columns c * hidden / 2 .. of the output
//   token first  [2 tiles of k][128 rows][32]: gate and up of 64 of the token middle, k = tokens
//   token second [2 tiles of k][128 rows][32]: rows are tokens, k = 64 of the token middle
//                (both CTAs need all of these two)
//
//   attention    first(0) query(0) | first(p) second(p - 1) query(p), p = 1.. | second(last)
//   token mix    (token first, token first, token second) for each 64 of the token middle
//   SwiGLU       first(0) | first(c) second(c - 1), c = 1.. | second(last)
//
// What a matrix does not fill (inner beyond a multiple of 128, tokens beyond T) is zero.
#pragma once
#include "../api.h"
#include "../rx/common.cuh"

namespace cluster_sm90a {

constexpr int kRows = 64;  // rows that a warpgroup computes: the M of wgmma
constexpr int kMaxTokens = 2 * kRows;
constexpr int kHeadDim = 64;
constexpr int kProducers = 128;   // threads of the warpgroup that streams the tape
constexpr int kMiddle = 128;      // middle columns a round: 64 a CTA
constexpr int kTokenMiddle = 64;  // token middle a round
constexpr int kMaxSamples = 2;    // in the rows of two CTAs
constexpr uint32_t kStage = 16384, kHalfStage = kStage / 2;
constexpr uint32_t kTile = 8192;  // [64 rows][64 columns] of h, K, V, mixed heads, the middle

// Samples of two CTAs. Two short ones have a warpgroup's rows each, and nothing to do with each
// other in attention; where tokens are mixed there is one, for that product takes the rows of both
// tiles.
inline int packed_samples(const RxRecursion& r) {
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++)
      if (r.nets[n].blocks[b].token_mlp) return 1;
  return r.tokens > kRows ? 1 : 2;
}

// Stages of each part of a net of this width.
struct Tape {
  int hidden;

  __host__ __device__ constexpr int first() const { return hidden / 32; }
  __host__ __device__ constexpr int query() const { return hidden / 64; }
  // A unit of `second`: hidden / 2 rows of 32 bytes; 384 wide, a quarter of its place is unused.
  __host__ __device__ constexpr uint32_t unit() const {
    return hidden > 256 ? kHalfStage : uint32_t(hidden) * 16;
  }
  __host__ __device__ constexpr int second() const { return int(16 * unit() / kStage); }

  __host__ __device__ constexpr int rounds(const RxBlock& b) const {
    return (b.inner + kMiddle - 1) / kMiddle;
  }
  __host__ __device__ constexpr int token_rounds(const RxBlock& b) const {
    return (b.token_inner + kTokenMiddle - 1) / kTokenMiddle;
  }
  __host__ __device__ constexpr int mixer(const RxBlock& b) const {
    return b.token_mlp ? 3 * token_rounds(b) : b.heads / 2 * (first() + query() + second());
  }
  __host__ __device__ constexpr int swiglu(const RxBlock& b) const {
    return rounds(b) * (first() + second());
  }
  __host__ __device__ constexpr int block(const RxBlock& b) const { return mixer(b) + swiglu(b); }
};

__host__ __device__ constexpr int most_stages(uint32_t bytes) {
  return bytes > 8 * kHalfStage ? 8 : int(bytes / kHalfStage);
}

// Shared memory of a CTA, and the threads.
//   h         [hidden / 64] tiles of rows 0-63, then as many of the others: operand A of all
//             products. With 112 rows the second tiles are 48 high, and a product reads the first
//             rows of the next one, for rows of which nothing is used.
//   exchange  eight tiles, see Cta::exchange_tile
//   ring      half stages of the tape
template <int kHidden_, int kTokens_>
struct Plan {
  static constexpr int kTokens = kTokens_;  // 112 or 128 rows
  static constexpr int kHidden = kHidden_;
  static constexpr int kColumns = kHidden / 2;  // of h that a CTA computes
  static constexpr int kGroups = kColumns / 64;
  static constexpr int kThreads = 384;  // a producer and two consumer warpgroups
  // Passes of the token mix over its tape: a warpgroup takes 64 channels at a time.
  static constexpr int kTokenPasses = (kGroups + 1) / 2;
  __host__ __device__ static constexpr Tape tape() { return {kHidden}; }
  static constexpr int kTiles = kHidden / 64;
  static constexpr uint32_t kSecondTile = (kTokens - kRows) * 128;
  static constexpr uint32_t kPad = kTiles * (kTile + kSecondTile);  // behind the last low tile
  static constexpr uint32_t kH = 0, kExchange = kPad + (kTile - kSecondTile);
  static constexpr uint32_t kRing = kExchange + 8 * kTile;
  static constexpr uint32_t kFixed = 2560;  // what follows the ring
  static constexpr int kStages = most_stages(rx::kMaxSharedSm90 - kRing - kFixed);
  static constexpr uint32_t kSums = kRing + kStages * kHalfStage;  // [2][2][64] fp32
  static constexpr uint32_t kProgress = kSums + 4 * kRows * 4;     // [256], see Consumer::Progress
  static constexpr uint32_t kFull = kProgress + 256 * 4, kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kExchanged = kEmpty + 8 * kStages;      // [2 in turn][warpgroup]
  static constexpr uint32_t kTaken = kExchanged + 32;               // [2]
  static constexpr uint32_t kSlots = (kTaken + 16 + 15) / 16 * 16;  // see solve.cuh
  static constexpr uint32_t kShared = kSlots + 4 * kMaxSamples * 16;
  static_assert(kTokens == 112 || kTokens == 128, "see add_and_norm");
  static_assert(kHidden % 128 == 0 && kHidden <= 512, "a CTA's columns are one wgmma wide");
  static_assert(kShared <= rx::kMaxSharedSm90 && kStages >= 4, "the CTA does not fit");
};

}  // namespace cluster_sm90a
