// ring.cuh - the weights on their way from L2 to the tensor cores.
//
// The tape holds the weights of a net as fragments, 512 bytes that are the registers of a warp for
// a 16 x 16 tile, in the order in which the stages use them. A stage splits its columns over the
// warps, so most fragments are read by one warp alone, and each lane copies exactly the bytes that
// it will read: no barrier of the CTA is needed between a copy and its use, and the warps run
// apart. Only the token MLP, whose warps split rows, reads every fragment in all warps
// (`acquire_shared`).
//
// The copies run kStages - 1 steps ahead of the products, over the ends of stages, blocks, calls
// and samples: after the last call comes the first again, so the tape is endless.
#pragma once
#include "layout.cuh"

namespace owner_sm80 {

struct Ring {
  const Params& p;
  uint32_t slots_s;
  int read = 0;  // slot of the step to use next
  // the step to fetch next
  const char* from_g;
  int steps, repeats, segment, call;

  RX_DEVICE Ring(const Params& params, const unsigned char* smem)
      : p(params), slots_s(rx::smem_u32(smem + params.at.ring)) {
    start_call(0);
#pragma unroll
    for (int slot = 0; slot < kStages - 1; slot++) fetch(slot);
  }

  // Offset in shared memory of the warp's part of the next step's slot, of which this lane may read
  // what it copied itself.
  RX_DEVICE uint32_t acquire() {
    rx::cp_async_wait<kStages - 2>();
    __syncwarp();  // the stage before may have split the warp's part otherwise over the lanes
    return advance() + (threadIdx.x >> 5) * kWarpSlot;
  }

  // Offset of the next step's slot, of which all may read all. `release_shared` ends a run of
  // these.
  RX_DEVICE uint32_t acquire_shared() {
    rx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there for all, and all have left the one before
    return advance();
  }
  RX_DEVICE void release_shared() { __syncthreads(); }

  RX_DEVICE void drain() { rx::cp_async_wait<0>(); }

 private:
  RX_DEVICE uint32_t advance() {
    const int now = read;
    fetch(now == 0 ? kStages - 1 : now - 1);  // the slot that was left last
    read = now + 1 == kStages ? 0 : now + 1;
    return p.at.ring + uint32_t(now) * kSlot;
  }

  RX_DEVICE void start_call(int k) {
    call = k;
    const int net = p.r.calls[k].net;
    from_g = static_cast<const char*>(p.r.nets[net].tape);
    start_segment(net * kMaxSegments);
  }
  RX_DEVICE void start_segment(int s) {
    segment = s;
    steps = p.segments[s].steps;
    repeats = p.segments[s].repeats;
  }

  // Copies this lane's part of the next step into a slot, and moves on.
  RX_DEVICE void fetch(int slot) {
    const Segment& s = p.segments[segment];
    const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
    if (warp < s.warps) {
      const int at = warp * s.warp_bytes;
      const uint32_t to_s = slots_s + uint32_t(slot) * kSlot + uint32_t(warp) * kWarpSlot;
      rx::cp_async<16>(to_s + uint32_t(lane) * 16, from_g + at + lane * 16);
      if (s.warp_bytes == 1024)
        rx::cp_async<16>(to_s + kFragment + uint32_t(lane) * 16,
                         from_g + at + kFragment + lane * 16);
      else if (s.warp_bytes == 768)
        rx::cp_async<8>(to_s + kFragment + uint32_t(lane) * 8, from_g + at + kFragment + lane * 8);
    }
    rx::cp_async_commit();
    from_g += s.warp_bytes * s.warps;
    if (--steps > 0) return;
    if (--repeats > 0) {
      from_g -= segment_bytes(s);
      steps = s.steps;
    } else if (!s.ends_net) {
      start_segment(segment + 1);
    } else {
      start_call(call + 1 < p.r.num_calls ? call + 1 : 0);
    }
  }
};

}  // namespace owner_sm80
