// flags.cuh - how stages wait for each other: a row tile at a time, never for the whole grid.
//
// A flag counts what was done to a row tile since the launch: each stage adds as many as it has
// units of output channels (or warps), whichever CTA did them. So the sum over the stages so far,
// which every CTA keeps as it goes along, is the epoch: a flag that has reached it says that the
// last stage is complete for that tile. Stages of one tile follow each other, therefore one flag
// serves all of them.
//
//   rows     [row tiles]           a tile of h, q, k, v, mixed or middle
//   columns  [row tiles of h^T]    the products of a token-MLP
//   samples  [batch]               h after a token-MLP: all columns of a sample were turned back
//
// Nobody waits for a ring. A stage waits only for what an earlier stage of every CTA adds, and all
// CTAs run at once (cooperative launch): by induction over the stages each flag gets there. Memory
// is written again (h, mixed, middle, scale) only by a stage of the tile that follows its readers,
// whose own arrivals it waited for. K and V have readers among other tiles, and two buffers
// (layout.cuh).
#pragma once
#include "../rx/rx.cuh"
#include "layout.cuh"

namespace grid_sm80 {

// Worked out where they are used, or ptxas keeps all that follows from them in registers
// throughout.
RX_DEVICE int lane_id() { return rx::opaque(int(threadIdx.x)) & 31; }
RX_DEVICE int warp_id() { return rx::opaque(int(threadIdx.x)) >> 5; }

// What the flags of every row tile, column tile and sample amount to when the last stage is over.
struct Epochs {
  uint32_t rows, columns, samples;
};

// All that the lanes of this warp wrote, and what they had waited for, comes before the addition.
RX_DEVICE void arrive(uint32_t* flag_g, uint32_t n) {
  __syncwarp();
  if (lane_id() == 0) rx::red_add_release(flag_g, n);
}

// What a stage reads of row tile i: `count` flags from i / per * count on must have come to epoch.
struct Needs {
  const uint32_t* flags_g;
  uint32_t epoch;
  int count;
  Divisor per;

  // Waits for `epoch`, or for less; what a flag was then, where there is only one.
  RX_DEVICE uint32_t wait(int tile, uint32_t least) const {
    uint32_t seen = 0;
    if (lane_id() < count) {
      const uint32_t* flag_g = flags_g + (per.of(tile) * count + lane_id()) * kFlagStride;
      do {
        seen = rx::ld_acquire(flag_g);
      } while (seen < least);
    }
    __syncwarp();
    return seen;
  }
  RX_DEVICE void wait(int tile) const { wait(tile, epoch); }
};

constexpr Divisor kOne = {0x80000000u, 1};

}  // namespace grid_sm80
