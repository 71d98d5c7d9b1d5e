// kernel.cuh - a whole recursion in one launch: a CTA owns its samples and runs every call.
//
//   for each call of the schedule:  state[write] <- net(sum(state) + (sum(inject)))
//                                   (recursion.cuh says where factors stand)
//   attention block   h = rms(h + O(attn(rope(Q h), rope(K h), V h)));  h = rms(h + swiglu_D(h))
//   token-MLP block   h' = h^T;  h' = rms(h' + swiglu_T(h'));  h = h'^T;  h = rms(h + swiglu_D(h))
// A block may scale what it adds to h, have another activation, fewer K/V heads and biases
// (RxBlock).
//
// h [T, D] of one sample, or of several small ones, stays in shared memory from call to call, or in
// the CTA's scratch where that is too small (place.cuh); the other states are in L2. The weights
// are a tape that each warp streams through its part of a ring (ring.cuh). The stages are
// attention.cuh, mlp.cuh and token_mlp.cuh, on top of product.cuh and residual.cuh; states.cuh
// forms the input of a call.
//
//   shared memory at T=97, D=512 (A100: 163 KB): h 104 KB | K, V of a head 26 KB | ring 32 KB |
//                                                row scales 0.5 KB; partial sums lie over K
//   scratch of an owner in L2: Q of a head 14 KB, attention 112 KB, middle 336 KB, z_H + x 112 KB
//
// Predicted for a net call of TRM-att at T=97 (112 rows), D=512, one sample a CTA; not measured:
//   tensor cores  1.58 GFLOP with padding (1.36 without): A100 at 1024 FMA a clock 746k clocks,
//                 0.53 ms; H100 by mma.sync at about 62 % of its peak 0.34 ms
//   L1 pipe       a step of 32 columns a warp moves 28 KB of A, 8 KB of weights in and 8 KB out:
//                 352 clocks against 448 on an A100's tensor cores; H100 614k clocks, 0.35 ms
//   L2            13.6 MB of tape a call: 2.8 TB/s over 108 owners (A100), 5.1 over 132 (H100),
//                 which is near the limit; the cluster kernel of sm_90a shares one tape instead
// So 21 calls of shared h take 11 ms on an A100 and 7.4 ms on an H100, for as many samples as there
// are SMs.
//
// Devices of 99 KB (sm_86, sm_89, sm_120), h in scratch: attention 58 KB of shared memory (K, V 26
// | ring 32), token MLP 84 KB (columns of h 52 | ring 32). One CTA an SM all the same, whose
// registers it fills. Reckoned with 85 % of the tensor cores' rate, not measured: 21 calls of
// TRM-att take 30 ms on an RTX 4090 (128 samples) and 15 ms on an L40S (142); of TRM-mlp 27 and 14
// ms.
//   tensor cores  RTX 4090 256 FMA a clock and SM: a step of all warps 1,792 clocks; L40S 896
//   L1 pipe       as above, 352 clocks; A comes by 16 bytes a lane in the place of ldmatrix
//   L2            a call moves 13.6 MB of tape and 8.5 MB of scratch if the warps find in L1 what
//                 another has asked for (3.5 KB a step), and up to eight times the scratch if not
#pragma once
#include "attention.cuh"
#include "mlp.cuh"
#include "residual.cuh"
#include "solve.cuh"
#include "states.cuh"
#include "token_mlp.cuh"

namespace owner_sm80 {

// A block is two halves, each a residual and a norm: tokens are mixed, then columns.
template <class P>
RX_DEVICE void net_call(Owner<P>& o, int n) {
  const RxNet& net = o.p.r.nets[n];
  for (int half = 0; half < 2 * net.num_blocks; half++) {
    const int block = half / 2;
    const RxBlock& b = net.blocks[block];
    o.first_bias = n * kMaxBiases + block * 4;
    const bool mixes_tokens = half % 2 == 0;
    if (mixes_tokens && b.token_mlp) {
      o.timeline.begin(kTokenMlp, block);
      token_mlp(o, b);
      continue;
    }
    const uint4* operand_g = mixes_tokens ? o.mixed_g() : o.middle_g();
    int steps = P::kSteps;
    if (mixes_tokens) {
      attention(o, b, block);
    } else {
      o.timeline.begin(kGateUp, block);
      steps = gate_up(o, b);
    }
    __syncthreads();  // the operand is complete, and nobody reads h as an operand any more
    o.timeline.begin(mixes_tokens ? kOut : kDown, block);
    residual_product(o, operand_g, steps, b, mixes_tokens ? 1 : 3);
  }
}

// All calls of the schedule on one group of samples.
template <class P>
RX_DEVICE void run_recursion(Owner<P>& o, int first_sample) {
  const RxRecursion& r = o.p.r;
  uint32_t written = 0;  // bit i: states_out[i] holds what a call wrote
  for (int k = 0; k < r.num_calls; k++) {
    o.timeline.at(k, first_sample);
    o.timeline.begin(kInput, 0);
    form_input(o, first_sample, written, k);
    net_call(o, r.calls[k].net);
    if (rx::finishes(r.calls[k])) {
      o.timeline.begin(kStore, 0);
      finish_call(o, first_sample, written, k);
    }
    if (r.calls[k].stays) continue;
    o.timeline.begin(kStore, 0);
    store_state(o, first_sample, r.calls[k].write);
    written |= 1u << r.calls[k].write;
  }
  for (int i = 0; i < r.num_states; i++)
    if (!(written >> i & 1)) copy_state(o, first_sample, i);
  o.timeline.end();
}

template <int kHidden, int kTiles, int kPlace>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Params p) {
  RX_DYN_SMEM(smem);
  Owner<Plan<kHidden, kTiles, kPlace>> o(p, smem);
  const bool solves = p.solve.entries > 0;
  int first = int(blockIdx.x) * p.at.samples;
  if (solves) fill_slots(p);
  while (solves ? begin_step(p) : first < p.r.batch) {
    run_recursion(o, first);
    if (solves)
      end_step(p);
    else
      first += int(gridDim.x) * p.at.samples;
  }
  o.ring.drain();
}

}  // namespace owner_sm80
