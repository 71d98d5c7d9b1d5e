// kernel.cuh - the recursion on Hopper: all net calls of a schedule in one launch.
//
//   for each call:  h = sum(state) + (sum(inject));  h = block(h) for each block;  state[write] = h
//
// Two CTAs own a sample, 64 rows each, and keep h in shared memory; a cluster of 2, 4 or 8 CTAs
// shares one multicast tape of weights. A producer thread streams the tape without regard to calls
// and blocks; two consumer warpgroups compute. Between the CTAs of a sample go K and V of each
// head, or the rows of the token mix, by bulk copies between shared memories. No global scratch, no
// grid barrier: a state is read and written in global memory by the thread that owns its elements.
//
// Read in this order: layout (tape, shared memory), ring, product (SwiGLU), attention, token_mlp,
// states, this file.
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
#include "states.cuh"
#include "token_mlp.cuh"

namespace cluster_sm90a {

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
    resident = p.r.calls[now.call].stays;
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
