// kernel.cuh - the recursion on Hopper: all net calls of a schedule in one launch.
//
//   for each call:  h = sum(state) + (sum(inject));  h = block(h) for each block;  state[write] = h
//                   (recursion.cuh says where factors stand)
//
// Two CTAs own a sample, or two of up to 64 tokens, a warpgroup each (NOTES.md says why no more).
// Each keeps all rows of h in shared memory and computes half of every
// product's columns, for which it needs half of the weights; so a tile of them serves 128 rows. A
// cluster of 2, 4 or 8 CTAs shares one multicast tape. A producer thread streams the tape without
// regard to calls and blocks; two consumer warpgroups have 64 rows each and compute. Between the
// CTAs go mixed heads, the middle and h, by bulk copies between shared memories. No global scratch,
// no grid barrier: an element of a state is read and written in global memory by one thread.
//
// Read in this order: layout (tape, shared memory), ring, product (SwiGLU), attention, token_mlp,
// states, solve (a queue), this file.
//
// Reckoned, not measured, for T=97, D=512, F=1536 (token middle 512). An SM forms 4096 FLOP a
// cycle; at the 800 TFLOP/s that 132 SMs sustain, a cycle is 0.68 ns. Cycles of a CTA, which has a
// head or 64 columns of the middle at a time: tensor cores | shared memory, 128 bytes a cycle, for
// the operands of both warpgroups and the stages that come in
//   attention, a head      first 4096 | 4096, query 2048 | 2560, scores and values 1024 | 768,
//                          O 2048 | 1792                                        9,216 | 9,216
//   SwiGLU, a round        first 4096 | 4096, down 2048 | 1792                  6,144 | 5,888
//   token mix, a round     gate and up 2048 | 2048, down 1024 | 1024            3,072 | 3,072
//   a call of two blocks   221,184 | 215,040: 150 us; token-MLP 196,608 | 190,464: 133 us
// (64 rows and all columns a CTA, as this kernel was before, took in twice the stages: 270,000.)
// What is exchanged takes shared memory twice 8 KB a head or round and warpgroup, 64 KB a norm:
// 11,000 cycles a call, and each norm waits for two trips to the peer, some 2,500 cycles, while the
// other warpgroup computes. Rotations, exponentials, stores: about 3,500 cycles a head, 1,300 a
// round, of which the other warpgroup's products should hide half: 21 us. States: 3 us. So 175 us a
// call, and 3.7 ms for 21 calls of up to 64 samples (32 clusters of 4): 2.6 TB/s of tape from L2,
// 500 TFLOP/s of useful products. One sample takes as long: the grid kernel is for small batches.
//
// Where the time may hide, for whoever has a GPU: the warpgroups in step instead of in turn; angles
// of RoPE loaded through L1 at each use (there is no room for 32 KB of them); a half stage feeds
// both warpgroups for 256 cycles, so of five stages with 112 rows three and a half are in flight
// and cover 900 cycles of latency, of four with 128 rows (T > 112) 640; a supervision step of a
// queue begins with an empty ring.
#pragma once
#include "solve.cuh"
#include "states.cuh"
#include "token_mlp.cuh"

namespace cluster_sm90a {

// All calls of the schedule on the samples of the cluster.
template <class P>
RX_DEVICE void run_recursion(Consumer<P>& last, const States<P>& states) {
  Consumer<P> me(last);  // anew, or what follows from w is kept, and spilled, from step to step
  const Params& p = me.p;
  typename Consumer<P>::Progress now{};
  bool resident = false;  // h is what the next call's first operand should be
#pragma unroll 1
  while (now.call < p.r.num_calls) {
    now.net = p.r.calls[now.call].net;
    me.meet();  // the peer has got my columns of h
    states.load(p.r.calls[now.call], now.written, resident);
    me.exchange_h();
#pragma unroll 1
    for (now.block = 0; now.block < p.r.nets[now.net].num_blocks; now.block++) {
      me.keep(now);
      if (me.block().token_mlp)
        TokenMix<P>(me).run();
      else
        attention(me);
      swiglu(me);
      now = me.progress();
    }
    resident = p.r.calls[now.call].stays && !rx::finishes(p.r.calls[now.call]);
    if (!resident) now.written |= states.store(p.r.calls[now.call], now.written);
    now.call++;
  }
  states.copy_the_rest(now.written);
  last.go_on_from(me);
}

template <class P>
RX_DEVICE void consume(const Cta<P>& at, const Params& p, const Queue<P>& queue) {
  Consumer<P> me(p, at);
  const States<P> states(p, at);
#pragma unroll 1
  while (!queue.solves() || queue.goes_on()) {
    if (queue.solves()) queue.begin_step(states);
    run_recursion(me, states);
    if (!queue.solves()) break;
    queue.end_step();
  }
}

template <class P>
__global__ void __launch_bounds__(384, 1) kernel(const __grid_constant__ Params p) {
  RX_DYN_SMEM(smem);
  const Cta<P> at(smem, p);
  if (threadIdx.x == 0) init_barriers(at);
  for (int i = int(threadIdx.x) * 16; i < int(P::kExchange - P::kPad); i += P::kThreads * 16)
    at.vector(at.smem_s + P::kPad + uint32_t(i)) = make_uint4(0, 0, 0, 0);
  rx::fence_proxy_async_shared();
  rx::cluster_arrive();
  rx::cluster_wait();  // no copy and no arrival before every CTA's barriers are there
  const Queue<P> queue{p, at};
  if (queue.solves()) {
    queue.fill();
    __syncwarp();
    sync_cluster();  // the slots have come
  }

  if (threadIdx.x < kProducers) {
    rx::setmaxnreg_dec<24>();
    Producer<P> producer{at, p};
#pragma unroll 1
    while (!queue.solves() || queue.goes_on()) {
      if (threadIdx.x == 0) producer.run();
      if (!queue.solves()) break;
      queue.follow_step();
    }
  } else {
    rx::setmaxnreg_inc<240>();
    consume(at, p, queue);
  }
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();  // a CTA that left could not take the copies and arrivals still to come
}

}  // namespace cluster_sm90a
