// timeline.cuh - when which phase ran, as the owner's first thread saw it. Compiled out by default.
//
// With -DRX_TIMELINE each owner writes one RxEvent a phase (RECURX_TIMELINE=1 builds it in). The
// phases of one owner follow each other without overlap; a phase that other warps still work on may
// have ended for the first warp, for there is no barrier between most of them.
#pragma once
#include "layout.cuh"

namespace owner_sm80 {

enum Phase : int32_t {  // PHASES of recurx/backends/cuda_abi.py, in this order
  kInput,
  kTokenMlp,
  kQkv,
  kAttention,
  kOut,
  kGateUp,
  kDown,
  kStore,
};

#ifdef RX_TIMELINE

struct Timeline {
  RxEvent* next_g;
  RxEvent* end_g;
  RxEvent open{-1, 0, 0, 0, 0, 0};
  int call = 0, sample = 0;

  RX_DEVICE Timeline(const RxRecursion& r, int owner)
      : next_g(r.timeline ? r.timeline + owner * r.timeline_events : nullptr),
        end_g(next_g + (next_g ? r.timeline_events : 0)) {}

  RX_DEVICE void at(int call_, int sample_) { call = call_, sample = sample_; }

  // Ends the phase before and begins another.
  RX_DEVICE void begin(Phase phase, int block) {
    if (threadIdx.x) return;
    const uint64_t now = rx::global_time_ns();
    close(now);
    open = RxEvent{call, block, phase, sample, now, 0};
  }
  RX_DEVICE void end() {
    if (!threadIdx.x) close(rx::global_time_ns());
  }

 private:
  RX_DEVICE void close(uint64_t now) {
    if (open.call >= 0 && next_g < end_g) {
      open.end_ns = now;
      *next_g++ = open;
    }
    open.call = -1;
  }
};

#else

struct Timeline {
  RX_DEVICE Timeline(const RxRecursion&, int) {}
  RX_DEVICE void at(int, int) {}
  RX_DEVICE void begin(Phase, int) {}
  RX_DEVICE void end() {}
};

#endif

}  // namespace owner_sm80
