// layout.cuh - the sizes of the cluster recursion: its tape and its shared memory.
//
// The tape of a net is a row of stages of 16 KB in the order of use. All weights lie as wgmma's
// operand B, K-major: tiles of 32 columns (64-byte swizzle), of `second` 16 columns (32-byte
// swizzle). w is a warpgroup, 0 or 1, of the two that multiply; a tile serves one of them, a stage
// both.
//
//   stage of     holds
//   first        [w][128 rows][32 of k]: K and V of head 2p + w, or gate and up of 64 of the middle
//   query        [w][2 tiles of k][64 rows][32]: Q of head 2p + w
//   second       units [16 of k][w][hidden / 2 rows][16]: O over two heads, or down over 128 of the
//                middle; w owns the columns w * hidden / 2 .. of the output
//   token first  [2 tiles of k][128 rows][32]: gate and up of 64 of the token middle, k = tokens
//   token second [2 tiles of k][128 rows][32]: rows are tokens, k = 64 of the token middle
//                (both warpgroups multiply all of these two)
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

constexpr int kRows = 64;  // rows of a sample that a CTA owns: the M of wgmma; two CTAs a sample
constexpr int kMaxTokens = 2 * kRows;
constexpr int kHeadDim = 64;
constexpr int kMiddle = 128;      // middle columns a round: 64 a warpgroup
constexpr int kTokenMiddle = 64;  // token middle a round
constexpr uint32_t kStage = 16384, kHalfStage = kStage / 2;
constexpr uint32_t kTile = 8192;  // [64 rows][64 columns] of h, K, V, mixed heads, the middle

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
  __host__ __device__ constexpr int block(const RxBlock& b) const {
    return mixer(b) + rounds(b) * (first() + second());
  }
};

// Shared memory of a CTA, and the threads. kHidden 512: 231,048 bytes.
//   h         [hidden / 64] tiles of [64][64], 128-byte swizzle: operand A of all products
//   exchange  four pairs of tiles, see Cta::exchange_tile: K and V of two heads, both CTAs' rows
//   ring      stages of the tape
template <int kHidden_>
struct Plan {
  static constexpr int kHidden = kHidden_;
  static constexpr int kColumns = kHidden / 2;  // of h that a warpgroup computes
  static constexpr int kThreads = 384;          // a producer and two consumer warpgroups
  __host__ __device__ static constexpr Tape tape() { return {kHidden}; }
  static constexpr uint32_t kH = 0, kExchange = kHidden * kRows * 2;
  static constexpr uint32_t kRing = kExchange + 8 * kTile;
  static constexpr int kStages = 6;
  static constexpr uint32_t kSums = kRing + kStages * kStage;   // [2][64] fp32
  static constexpr uint32_t kProgress = kSums + 2 * kRows * 4;  // [256], see Consumer::Progress
  static constexpr uint32_t kFull = kProgress + 256 * 4, kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kExchanged = kEmpty + 8 * kStages;  // [2], a warpgroup each
  static constexpr uint32_t kExchangeFree = kExchanged + 16, kReturned = kExchangeFree + 8;
  static constexpr uint32_t kShared = kReturned + 8;
  static_assert(kHidden % 128 == 0 && kHidden <= 512, "a warpgroup's columns are one wgmma wide");
  static_assert(kShared <= rx::kMaxSharedSm90, "the CTA does not fit");
};

}  // namespace cluster_sm90a
