// states.cuh - from the states in global memory to h and back: what surrounds a net call.
#pragma once
#include "../recursion.cuh"
#include "ring.cuh"

namespace cluster_sm90a {

// The input and the output of calls. A thread moves the same vectors of 8 columns every time: of
// the rows of its warpgroup and the columns of its CTA. The other columns of h come from the peer.
template <class P>
struct States {
  static constexpr int kVectors = P::kColumns / 8;  // a row

  const Params& p;
  const Cta<P>& at;

  RX_DEVICE States(const Params& p, const Cta<P>& at) : p(p), at(at) {}

  // Calls f(address in h, offset in a state, whether that row exists, row) for every vector of
  // mine.
  template <class F>
  RX_DEVICE void each(F f) const {
    // Opaque, or all that follows from it is kept, and spilled, from call to call.
    const int thread = int(rx::opaque(threadIdx.x - kProducers)), w = thread / 128;
    const int others = at.pair() * p.samples;  // samples of the CTAs before me
    const int first = int(at.half()) * P::kColumns;
    for (int i = thread % 128; i < (w ? P::kTokens - kRows : kRows) * kVectors; i += 128) {
      const int c = i % kVectors, row = w * kRows + i / kVectors;
      const int sample = others + sample_of(p, row), token = token_of(p, row);
      const bool exists = sample < p.r.batch && token < p.r.tokens;
      f(at.own_h(c / 8, w) + rx::swizzle_128b(i / kVectors, c % 8),
        (size_t(sample) * p.r.tokens + token) * P::kHidden + first + c * 8, exists, row);
    }
  }

  RX_DEVICE void load(const RxCall& call, uint32_t written, bool resident) const {
    each([&](uint32_t h, size_t offset, bool exists, int) {
      if (!exists) {
        at.vector(h) = make_uint4(0, 0, 0, 0);
        return;
      }
      uint4 sum = resident ? at.vector(h) : rx::sum_states(p.r, written, call.state, 1, offset);
      for (int i = 1; i < call.num_state; i++)
        sum = rx::add_rounded(sum, rx::sum_states(p.r, written, call.state + i, 1, offset));
      if (call.scale != 1.f) sum = rx::scale_rounded(sum, call.scale);
      if (call.num_inject)
        sum = rx::add_rounded(sum,
                              rx::sum_states(p.r, written, call.inject, call.num_inject, offset));
      at.vector(h) = sum;
    });
  }
  // What a call writes; returns its state's bit. Damped or noisy it is not put back into h, which
  // the peer may be getting still.
  RX_DEVICE uint32_t store(const RxCall& call, uint32_t written) const {
    const int state = call.write;
    const bool finishes = rx::finishes(call);
    each([&](uint32_t h, size_t offset, bool exists, int row) {
      if (!exists) return;
      uint4 x = at.vector(h);
      if (finishes) {
        const int sample = at.pair() * p.samples + sample_of(p, row);
        const size_t first = size_t(sample) * p.r.tokens * P::kHidden;
        x = rx::finish_vector(p.r, call, x, rx::sum_states(p.r, written, &call.write, 1, offset),
                              uint32_t(sample), uint32_t(offset - first) / 2);
      }
      *reinterpret_cast<uint4*>(static_cast<rx::bf16*>(p.r.states_out[state]) + offset) = x;
    });
    return 1u << state;
  }
  // A state that no call wrote comes out as it went in.
  RX_DEVICE void copy_the_rest(uint32_t written) const {
    for (int state = 0; state < p.r.num_states; state++) {
      if (written >> state & 1) continue;
      each([&](uint32_t, size_t offset, bool exists, int) {
        if (exists)
          *reinterpret_cast<uint4*>(static_cast<rx::bf16*>(p.r.states_out[state]) + offset) =
              *reinterpret_cast<const uint4*>(static_cast<const rx::bf16*>(p.r.states_in[state]) +
                                              offset);
      });
    }
  }
};

}  // namespace cluster_sm90a
