// cluster_sm90a.cuh - the recursion on Hopper: all net calls of a schedule in one launch.
//
//   for each call:  h = sum(state) + (sum(inject));  h = block(h) for each block;  state[write] = h
//
// Two CTAs own a sample, 64 rows each, and keep h in shared memory; a cluster of 2, 4 or 8 CTAs
// shares one multicast tape of weights. A producer thread streams the tape without regard to calls
// and blocks; two consumer warpgroups compute. Between the CTAs of a sample go K and V of each
// head, or the rows of the token mix, by bulk copies between shared memories. No global scratch, no
// grid barrier: a state is read and written in global memory by the thread that owns its elements.
//
// Read in this order: _layout (tape, shared memory), _ring, _products (SwiGLU), _attention,
// _token_mix, this file.
//
// Reckoned, not measured, for T=97, D=512, F=1536 (token middle 512). An SM forms 4096 FLOP a
// cycle; at the 800 TFLOP/s that 132 SMs sustain, a cycle is 0.68 ns. Tensor-core cycles of a CTA:
//   attention, two heads   first 4096, query 2048, scores 512, values 512, O 2048     9,216
//   SwiGLU, a round        first 4096, down 2048                                      6,144
//   token mix, a round     gate and up 2048, down 1024                                3,072
//   a call of two blocks   2 (4 x 9,216 + 12 x 6,144) = 221,184: 150 us; token-MLP 196,608: 133 us
// Shared memory feeds wgmma with M = 64 at some 85 %: 176 and 156 us. Between products a warpgroup
// waits, rotates, exponentiates, stores: about 3,500 cycles for two heads, 1,300 a round, 600 a
// norm, 61,600 a call; the other warpgroup's products should hide half of it: 21 us. States: 3 us.
// So 200 us a call, and 4.2 ms for 21 calls of up to 64 samples (32 clusters of 4): 2.2 TB/s of
// tape from L2, 440 TFLOP/s of useful products. One sample takes as long: the grid kernel is for
// small batches.
//
// Where the time may hide, for whoever has a GPU: the warpgroups in step instead of in turn; angles
// of RoPE loaded through L1 at each use (32 KB a CTA do not fit beside 231 KB of shared memory);
// of six stages two are in use or about to be released, more while one warpgroup is ahead: 64 KB in
// flight cover 1,000 cycles of latency.
#pragma once
#include "cluster_sm90a_token_mix.cuh"
#include "recursion.cuh"

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

template <class P>
RX_DEVICE void consume(const Cta<P>& at, const Params& p) {
  Consumer<P> me(p, at);
  States<P> states(p, at);
  typename Consumer<P>::Progress now{};
  bool resident = false;  // h is what the next call's first operand should be
#pragma unroll 1
  while (now.call < p.r.num_calls) {
    now.net = p.r.calls[now.call].net;
    states.load(p.r.calls[now.call], now.written, resident);
    me.sync_consumers();
#pragma unroll 1
    for (now.block = 0; now.block < p.r.nets[now.net].num_blocks; now.block++) {
      me.keep(now);
      if (me.block().token_mlp)
        TokenMix<P>(me).run();
      else
        attention(me);
      swiglu(me);
      me.free_exchange();
      now = me.progress();
    }
    resident = rx::stays_resident(p.r.calls, now.call, p.r.num_calls);
    if (!resident) now.written |= states.store(p.r.calls[now.call].write);
    now.call++;
  }
  states.copy_the_rest(now.written);
}

template <int kHidden>
__global__ void __launch_bounds__(384, 1) kernel(const __grid_constant__ Params p) {
  using P = Plan<kHidden>;
  RX_DYN_SMEM(smem);
  const Cta<P> at(smem, p);
  if (threadIdx.x == 0) init_barriers(at);
  rx::cluster_arrive();
  rx::cluster_wait();  // no copy and no arrival before every CTA's barriers are there

  if (threadIdx.x < 128) {
    rx::setmaxnreg_dec<24>();
    if (threadIdx.x == 0) produce(at, p);
  } else {
    rx::setmaxnreg_inc<240>();
    consume(at, p);
  }
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();  // a CTA that left could not take the copies and arrivals still to come
}

}  // namespace cluster_sm90a
