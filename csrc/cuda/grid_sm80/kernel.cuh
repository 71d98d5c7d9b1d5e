// kernel.cuh - a whole recursion in one cooperative launch, every net call spread over all CTAs:
// the lowest latency for a few samples.
//
// Why a grid, and weights in shared memory. One call of TRM-att (T=97, D=512, two blocks) is 13.6
// MB of weights for 97 rows. A sample owned by one SM, or by a cluster of 16, would draw all of
// that through 1 or 16 SMs' paths to L2 (about 40 bytes/ns each on an H100): 340 or 21 us a call.
// Over 132 SMs the slices are 103 KB each, and need not be read again at all if they stay in shared
// memory; what moves instead are the rows, to every CTA that multiplies them:
//
//   stage (H100, B=1, one block)   units  row groups   rows read, KB   weights, KB
//   enter   last rms, next input     -        -              16              -
//   qkv     + RoPE                  96        4              32             48
//   attend  56 items                 -        -              30              -
//   o       + residual              64        4              32             16
//   gate_up + SwiGLU               192        2              64             48
//   down    + residual              64        4              96             48
//
// A product whose rows are dealt to g groups of CTAs reads 1/g of the rows and keeps g copies of
// the weight in the grid: the plan (recurx/plan/cuda_grid.py) chooses g for each product, least
// predicted time first, and what does not fit in shared memory is read from L2 in each call. Above
// that is 144 of the two blocks' 320 KB, and costs less than the rows that fewer groups would read
// (g = 1, 2, 2, 2 keeps all weights and reads 432 KB of rows a block instead of 224). With FP8 all
// fits. Ten barriers a call (about 1.2 us each) and one to enter; TRM's 21 calls are 231 barriers.
// A cluster a sample would have cheaper barriers, but 1/8 of the paths to L2 and no room for the
// weights; and the grid runs on any sm_80.
//
// Deterministic: every sum has one owner and one order; no float atomics. Between stages stands a
// barrier over the grid: a counter in global memory that each CTA adds to (release) and watches
// (acquire).
#pragma once
#include "attention.cuh"
#include "states.cuh"
#include "token_mlp.cuh"

namespace grid_sm80 {

// All CTAs' writes before are seen by all after. `target` counts arrivals since the launch.
struct GridBarrier {
  uint32_t* arrived_g;
  uint32_t target;

  RX_DEVICE void operator()() {
    __syncthreads();
    target += gridDim.x;
    if (threadIdx.x == 0) {
      rx::red_add_release(arrived_g, 1);
      while (rx::ld_acquire(arrived_g) < target) {
      }
    }
    __syncthreads();
  }
};

// What is where, at the start of shared memory.
struct Header {
  Sizes sizes;
  Shared shared;
};

// Fills shared memory with this CTA's slices, and the tables of where everything lies.
RX_DEVICE void keep_weights(const RxRecursion& r, const RxGridPlan& plan, unsigned char* smem) {
  const Shared at = shared_of(r, plan);
  Place* table = reinterpret_cast<Place*>(smem + at.table);
  if (threadIdx.x == 0) *reinterpret_cast<Header*>(smem) = {sizes_of(r), at};
  for_each_slice(
      r, plan, blockIdx.x, [&](int n, int b, int slot, int64_t tape, int64_t bytes, int offset) {
        if (threadIdx.x == 0) table[(n * kRxMaxBlocks + b) * kSlots + slot] = {tape, offset, 0};
        if (offset < 0) return;
        const unsigned char* from = static_cast<const unsigned char*>(r.nets[n].tape) + tape;
        for (int64_t i = threadIdx.x * 16; i < bytes; i += kThreads * 16)
          rx::cp_async<16>(rx::smem_u32(smem + offset + i), from + i);
      });
  rx::cp_async_commit();
  rx::cp_async_wait<0>();
  __syncthreads();
}

// kFp8: tapes hold e4m3 codes and scales.
template <bool kFp8>
struct Grid {
  const RxRecursion& r;
  const RxGridPlan& plan;
  const Sizes& z;    // in shared memory
  const Shared& at;  // too
  unsigned char* smem;
  unsigned char* scratch_g;
  GridBarrier barrier;

  RX_DEVICE float* sums_s() const { return reinterpret_cast<float*>(smem + at.rows); }
  RX_DEVICE float* scale_g() const { return reinterpret_cast<float*>(scratch_g + z.scale); }
  RX_DEVICE uint4* tiles_g(int64_t offset) const {
    return reinterpret_cast<uint4*>(scratch_g + offset);
  }

  RX_DEVICE Product describe(int n, int b, int slot, int64_t rows, int row_tiles, bool normalise,
                             float eps) const {
    const RxNet& net = r.nets[n];
    const Weight w = weight_of(r, net.blocks[b], slot, kFp8);
    const Place place =
        reinterpret_cast<const Place*>(smem + at.table)[(n * kRxMaxBlocks + b) * kSlots + slot];
    const unsigned char* weights = place.shared < 0
                                       ? static_cast<const unsigned char*>(net.tape) + place.tape
                                       : smem + place.shared;
    const Slice slice = slice_of(plan, slot, w.units, blockIdx.x);
    return {tiles_g(rows),       weights, row_tiles,           w.depth,
            int(w.unit_bytes()), slice,   plan.k_splits[slot], handover_bytes(w, slice),
            normalise,           eps};
  }

  RX_DEVICE void attention(int heads) {
    const int head_tiles = z.width / heads;
    const Attention a{tiles_g(z.q),
                      tiles_g(z.k),
                      tiles_g(z.v),
                      scratch_g + z.mixed,
                      r.batch * heads * z.token_tiles,
                      heads,
                      head_tiles,
                      z.width,
                      z.token_tiles,
                      r.tokens,
                      rsqrtf(float(head_tiles * 16))};
    for (int item = blockIdx.x; item < a.items; item += gridDim.x)
      attend(a, item, sums_s(), reinterpret_cast<float*>(smem + at.maxima),
             reinterpret_cast<uint4*>(smem + at.scratch));
  }

  // A block is two pairs of products: the mixer and the SwiGLU over D. One piece of code serves
  // both, or the kernel would be three times as long.
  //   attention   rows h (before their rms: scale_g keeps it) -> q, k, v | mixed -> h
  //   token-MLP   normalised rows of h^T -> middle -> h^T, then back to normalised rows h
  //   SwiGLU      rows h -> middle -> h, before its rms
  RX_DEVICE void block_call(int n, int b, bool normalise, float before) {
    const RxBlock& block = r.nets[n].blocks[b];
#pragma unroll 1
    for (int pair = 0; pair < 2; pair++) {
      const bool mixer = pair == 0, turned = mixer && block.token_mlp;
      const bool attends = mixer && !block.token_mlp;
      const int row_tiles = turned ? z.column_tiles : z.row_tiles;
      const int inner = round_up(mixer ? block.token_inner : block.inner, 32) / 16;
      const bool scaled = !block.token_mlp && (normalise || !mixer);
      const int64_t rows = turned ? z.ht : z.h;
      product<2, kFp8>(
          describe(n, b, pair * 2, rows, row_tiles, scaled, mixer ? before : block.eps),
          smem + at.scratch,
          FinishWide{
              {r, z, attends ? z.width / block.heads : 1}, inner, attends, !block.token_mlp});
      barrier();
      if (attends) {
        attention(block.heads);
        barrier();
      }
      product<1, kFp8>(
          describe(n, b, pair * 2 + 1, attends ? z.mixed : z.middle, row_tiles, false, 0.f),
          smem + at.scratch,
          FinishResidual{scratch_g + rows, block.token_mlp ? nullptr : scale_g(),
                         turned ? z.token_tiles : z.width});
      barrier();
      if (turned) {
        turn_back(r, z, block.eps);
        barrier();
      }
    }
  }

  RX_DEVICE void net_call(int n) {
#pragma unroll 1
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const float before = b ? r.nets[n].blocks[b - 1].eps : 0.f;
      if (b && r.nets[n].blocks[b].token_mlp) {
        turn(r, z, before, sums_s());
        barrier();
      }
      block_call(n, b, b > 0, before);
    }
  }
};

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ RxRecursion r, const __grid_constant__ RxGridPlan plan) {
  RX_DYN_SMEM(smem);
  unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
  keep_weights(r, plan, smem);
  const Header& header = *reinterpret_cast<const Header*>(smem);
  Grid<kFp8> grid{r,
                  plan,
                  header.sizes,
                  header.shared,
                  smem,
                  scratch_g,
                  {reinterpret_cast<uint32_t*>(scratch_g), 0}};
  uint32_t written = 0;  // bit i: state i is in states_out
  int made = -1;         // the state that the last call wrote: its rows are in scratch yet
  float eps = 0.f;
#pragma unroll 1
  for (int c = 0; c <= r.num_calls; c++) {
    const RxCall* call = c < r.num_calls ? r.calls + c : nullptr;
    const bool turned = call && r.nets[call->net].blocks[0].token_mlp;
    enter(r, grid.z, written, made, eps, call, turned, grid.sums_s());
    if (made >= 0) written |= 1u << made;
    if (!call) break;
    grid.barrier();
    grid.net_call(call->net);
    made = call->write;
    eps = r.nets[call->net].blocks[r.nets[call->net].num_blocks - 1].eps;
  }
  copy_unwritten(r, written);
}

}  // namespace grid_sm80
