// states.cuh - from the states in global memory to h and back: what surrounds a net call.
#pragma once
#include "../recursion.cuh"
#include "ring.cuh"

namespace cluster_sm90a {

// The input and the output of calls. A thread moves the same vectors of 8 columns every time.
template <class P>
struct States {
  static constexpr int kVectors = P::kHidden / 8;  // a row

  const Params& p;
  const Cta<P>& at;

  RX_DEVICE States(const Params& p, const Cta<P>& at) : p(p), at(at) {}

  // Calls f(address in h, offset in a state, whether that row exists) for every vector of mine.
  template <class F>
  RX_DEVICE void each(F f) const {
    // Opaque, or all that follows from it is kept, and spilled, from call to call.
    const uint32_t thread = rx::opaque(threadIdx.x - 128);
    for (int i = int(thread); i < kRows * kVectors; i += 256) {
      const int row = i / kVectors, c = i % kVectors, token = int(at.half()) * kRows + row;
      const bool exists = at.sample() < p.r.batch && token < p.r.tokens;
      f(at.h(c / 8) + rx::swizzle_128b(row, c % 8),
        (size_t(at.sample()) * p.r.tokens + token) * P::kHidden + c * 8, exists);
    }
  }

  RX_DEVICE void load(const RxCall& call, uint32_t written, bool resident) const {
    each([&](uint32_t h, size_t offset, bool exists) {
      if (!exists) {
        at.vector(h) = make_uint4(0, 0, 0, 0);
        return;
      }
      uint4 sum = resident ? at.vector(h) : rx::sum_states(p.r, written, call.state, 1, offset);
      for (int i = 1; i < call.num_state; i++)
        sum = rx::add_rounded(sum, rx::sum_states(p.r, written, call.state + i, 1, offset));
      if (call.num_inject)
        sum = rx::add_rounded(sum,
                              rx::sum_states(p.r, written, call.inject, call.num_inject, offset));
      at.vector(h) = sum;
    });
    rx::fence_proxy_async_shared();
  }
  RX_DEVICE uint32_t store(int state) const {  // returns its bit
    each([&](uint32_t h, size_t offset, bool exists) {
      if (exists)
        *reinterpret_cast<uint4*>(static_cast<rx::bf16*>(p.r.states_out[state]) + offset) =
            at.vector(h);
    });
    return 1u << state;
  }
  // A state that no call wrote comes out as it went in.
  RX_DEVICE void copy_the_rest(uint32_t written) const {
    for (int state = 0; state < p.r.num_states; state++) {
      if (written >> state & 1) continue;
      each([&](uint32_t, size_t offset, bool exists) {
        if (exists)
          *reinterpret_cast<uint4*>(static_cast<rx::bf16*>(p.r.states_out[state]) + offset) =
              *reinterpret_cast<const uint4*>(static_cast<const rx::bf16*>(p.r.states_in[state]) +
                                              offset);
      });
    }
  }
};

}  // namespace cluster_sm90a
