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
// predicted time first. What does not fit in shared memory comes from L2 in each call, one slice
// after another to a place set aside for the largest (the stage), while the CTA waits or is at
// products whose weights it keeps. Above that is 192 of the two blocks' 320 KB, and costs less than
// the rows that fewer groups would read (g = 1, 2, 2, 2 keeps all weights and reads 432 KB of rows
// a block instead of 224). With FP8 all fits.
//
// Stages wait for each other by flags of row tiles (flags.cuh): TRM's 21 calls are 231 stages one
// after another, and at none does the whole grid wait. A CTA sends for weights as soon as the stage
// is free, for the residual as soon as that is complete, for injected states before the rows that
// they are added to, and for rotary tables before the parts of a sum are added. On Hopper the CTAs
// of a cluster multiply the same rows and get them from L2 once (ring.cuh). But a cluster a sample
// would wait less, but it has 1/8 of the paths to L2 and no room for the weights; and the grid runs
// on any sm_80.
//
// Deterministic: every sum has one owner and one order; no float atomics.
#pragma once
#include "attention.cuh"
#include "states.cuh"
#include "token_mlp.cuh"

namespace grid_sm80 {

// What is where, at the start of shared memory.
struct Header {
  Sizes sizes;
  Shared shared;
};

// Copies a slice of weights to shared memory; the caller commits.
RX_DEVICE void copy_slice(unsigned char* to, const unsigned char* from_g, int64_t bytes) {
  for (int64_t i = threadIdx.x * 16; i < bytes; i += kThreads * 16)
    rx::cp_async<16>(rx::smem_u32(to + i), from_g + i);
}

RX_DEVICE Rings* rings_of(unsigned char* smem, const Shared& at) {
  return reinterpret_cast<Rings*>(smem + at.weights - sizeof(Rings));
}

// Units of the CTA that has most of them in the cluster of `cta`.
RX_DEVICE int most_units(const RxGridPlan& plan, int slot, int units, int cta) {
  int most = 0;
#pragma unroll 1
  for (int i = 0; i < plan.cluster; i++) {
    const Slice s = slice_of<true>(plan, slot, units, cta / plan.cluster * plan.cluster + i);
    most = max(most, s.last - s.first);
  }
  return most;
}

// Fills shared memory with this CTA's slices, and the table of its shares.
template <bool kRing>
RX_DEVICE void keep_weights(const RxRecursion& r, const RxGridPlan& plan, unsigned char* smem) {
  Header& header = *reinterpret_cast<Header*>(smem);
  const Shared at = shared_of<kRing>(r, plan, blockIdx.x);
  BlockShare* table = reinterpret_cast<BlockShare*>(smem + at.table);
  const Sizes z = sizes_of(r);
  if (threadIdx.x == 0) header = {z, at};
  int32_t* next = nullptr;  // where the number of the next staged product belongs
  int net = -1;
  for_each_slice<kRing>(
      r, plan, blockIdx.x,
      [&](int n, int b, int slot, const Weight& w, const Slice& mine, int64_t tape, int64_t bytes,
          int offset, bool stage) {
        const unsigned char* from_g = static_cast<const unsigned char*>(r.nets[n].tape) + tape;
        if (threadIdx.x == 0) {
          const RxBlock& block = r.nets[n].blocks[b];
          BlockShare& share = table[n * kRxMaxBlocks + b];
          const int rows = block.token_mlp && slot < kGateUp ? z.column_tiles : z.row_tiles;
          const bool staged = offset < 0 && stage;
          share.product[slot] = {offset >= 0 ? smem + offset
                                 : staged    ? smem + at.weights
                                             : from_g,
                                 staged ? from_g : nullptr,
                                 mine.first,
                                 mine.last,
                                 w.units,
                                 ceil_div(rows - mine.group, mine.groups),
                                 w.depth,
                                 int(w.unit_bytes()),
                                 handover_bytes(w, mine),
                                 -1};
          if (slot == 0) {
            share.heads = block.token_mlp ? 0 : block.heads;
            share.head_tiles = block.token_mlp ? 1 : z.width / block.heads;
            share.by_heads = divisor(block.token_mlp ? 1 : block.heads);
            share.by_head_tiles = divisor(share.head_tiles);
          }
          if constexpr (kRing)
            rings_of(smem, at)->units[(n * kRxMaxBlocks + b) * kSlots + slot] =
                most_units(plan, slot, w.units, blockIdx.x);
          if (n != net) net = n, next = header.shared.staged + n, *next = -1;
          if (staged) {
            *next = (n * kRxMaxBlocks + b) * kSlots + slot;
            next = &share.product[slot].next;
          }
        }
        if (offset >= 0) copy_slice(smem + offset, from_g, bytes);
      });
  rx::cp_async_commit();
  rx::cp_async_wait<0>();
  __syncthreads();
}

// kFp8: tapes hold e4m3 codes and scales. kRing: CTAs come in clusters.
template <bool kFp8, bool kRing>
struct Grid {
  const RxRecursion& r;
  const RxGridPlan& plan;
  const Sizes& z;    // in shared memory
  const Shared& at;  // too
  unsigned char* smem;
  unsigned char* scratch_g;
  Epochs epoch;
  int attended;  // attention blocks so far: which of two buffers K and V are in
  int upcoming;  // the first product of later calls whose slice is staged, or -1

  RX_DEVICE float* sums_s() const { return reinterpret_cast<float*>(smem + at.rows); }
  RX_DEVICE float* scale_g() const { return reinterpret_cast<float*>(scratch_g + z.scale); }
  RX_DEVICE uint32_t* rows_g() const { return reinterpret_cast<uint32_t*>(scratch_g); }
  RX_DEVICE uint32_t* columns_g() const { return rows_g() + z.row_tiles * kFlagStride; }
  RX_DEVICE uint32_t* samples_g() const { return columns_g() + z.column_tiles * kFlagStride; }
  RX_DEVICE uint4* tiles_g(int64_t offset) const {
    return reinterpret_cast<uint4*>(scratch_g + offset);
  }
  RX_DEVICE const BlockShare& share_of(int n, int b) const {
    return reinterpret_cast<const BlockShare*>(smem + at.table)[n * kRxMaxBlocks + b];
  }

  // The CTA's own warps: shared memory that one stage used is free for the next.
  RX_DEVICE void next_stage() const { __syncthreads(); }

  // Sends for the slice of a staged product, as soon as nobody reads the one before.
  RX_DEVICE void send_for(int product) const {
    if (product < 0) return;
    const Share& s = share_of(0, product / kSlots).product[product % kSlots];
    copy_slice(smem + at.weights, s.staged, int64_t(s.last - s.first) * s.unit_bytes);
    rx::cp_async_commit();
  }
  RX_DEVICE void wait_for_stage(const Share& s) const {
    if (!s.staged) return;
    rx::cp_async_wait<0>();
    __syncthreads();
  }
  RX_DEVICE void next_stage(const Share& s) const {
    __syncthreads();
    if (s.staged) send_for(s.next < 0 ? upcoming : s.next);
  }

  RX_DEVICE Product describe(const Share& share, int block, int slot, int64_t rows,
                             const Needs& needs, uint32_t ready, uint32_t* done_g, bool normalise,
                             float eps) const {
    Rings* rings = kRing ? rings_of(smem, at) : nullptr;
    return {tiles_g(rows),
            share,
            at.group[slot],
            plan.row_groups[slot],
            at.split_bits[slot],
            needs,
            ready,
            done_g,
            normalise,
            eps,
            rings,
            plan.cluster,
            kRing ? rings->units[block * kSlots + slot] : 0};
  }

  RX_DEVICE void attention(const BlockShare& share, int kv, uint32_t ready) {
    const Attention a{tiles_g(z.q),
                      tiles_g(z.k[kv]),
                      tiles_g(z.v[kv]),
                      scratch_g + z.mixed,
                      rows_g(),
                      ready,
                      z.row_tiles * share.heads,
                      share.head_tiles,
                      z.width,
                      z.token_tiles,
                      r.tokens,
                      share.by_heads,
                      z.by_token_tiles,
                      rsqrtf(float(share.head_tiles * 16))};
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
    const BlockShare& share = share_of(n, b);
    const int block_number = n * kRxMaxBlocks + b;
#pragma unroll 1
    for (int pair = 0; pair < 2; pair++) {
      const bool mixer = pair == 0, turned = mixer && block.token_mlp;
      const bool attends = mixer && !block.token_mlp;
      const Share &in = share.product[pair * 2], &out = share.product[pair * 2 + 1];
      const bool scaled = !block.token_mlp && (normalise || !mixer);
      const int64_t rows = turned ? z.ht : z.h, middle = turned ? z.token_middle : z.middle;
      const int kv = attended & 1;
      // What the rows wait for, and what counts how far they are.
      Needs needs = {rows_g(), epoch.rows, 1, kOne};
      if (turned) needs.count = z.token_tiles, needs.per = z.by_width;
      if (!mixer && block.token_mlp)
        needs.flags_g = samples_g(), needs.epoch = epoch.samples, needs.per = z.by_token_tiles;
      uint32_t* done_g = turned ? columns_g() : rows_g();
      uint32_t done = turned ? epoch.columns : epoch.rows;
      // Whoever adds to a row tile's flag has waited for all of that tile of h.
      const uint32_t ready = done + 1;
      wait_for_stage(in);
      product<2, kFp8, kRing>(
          describe(in, block_number, pair * 2, rows, needs, 0, done_g, scaled,
                   mixer ? before : block.eps),
          smem + at.scratch,
          FinishWide{r, z, share, z.k[kv], z.v[kv], middle, out.depth, attends, !block.token_mlp});
      done += in.all_units;
      next_stage(in);
      if (attends) {
        attention(share, kv, done);
        done += share.heads * kWarps, attended++;
        next_stage();
      }
      wait_for_stage(out);
      product<1, kFp8, kRing>(
          describe(out, block_number, pair * 2 + 1, attends ? z.mixed : middle,
                   {done_g, done, 1, kOne}, ready, done_g, false, 0.f),
          smem + at.scratch,
          FinishResidual{scratch_g + rows, block.token_mlp ? nullptr : scale_g(),
                         turned ? z.token_tiles : z.width});
      done += out.all_units;
      next_stage(out);
      if (turned) {
        turn_back(r, z, columns_g(), done, samples_g(), block.eps);
        epoch.columns = done, epoch.samples += z.width;
      } else {
        epoch.rows = done;
      }
    }
  }

  // Number of the first staged product from call c on, or -1.
  RX_DEVICE int staged_from(int c) const {
    int found = -1;
    for (; c < r.num_calls && found < 0; c++) found = at.staged[r.calls[c].net];
    return found;
  }

  RX_DEVICE void net_call(int n, int c) {
    upcoming = staged_from(c + 1);
#pragma unroll 1
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const float before = b ? r.nets[n].blocks[b - 1].eps : 0.f;
      if (b && r.nets[n].blocks[b].token_mlp) {
        turn(r, z, rows_g(), epoch.rows, before, sums_s());
        epoch.rows += kWarps;
      }
      block_call(n, b, b > 0, before);
    }
  }
};

template <bool kFp8, bool kRing>
RX_DEVICE void recur(const RxRecursion& r, const RxGridPlan& plan) {
  RX_DYN_SMEM(smem);
  unsigned char* scratch_g = static_cast<unsigned char*>(r.scratch);
  keep_weights<kRing>(r, plan, smem);
  const Header& header = *reinterpret_cast<const Header*>(smem);
  Grid<kFp8, kRing> grid{r, plan, header.sizes, header.shared, smem, scratch_g, {}, 0, -1};
  if constexpr (kRing) open_rings(*rings_of(smem, grid.at), plan.cluster);
  grid.send_for(grid.staged_from(0));
  uint32_t written = 0;  // bit i: state i is in states_out
  float eps = 0.f;       // of the last call's last rms
#pragma unroll 1
  for (int c = 0; c <= r.num_calls; c++) {
    // The rows that the last call left are in scratch yet.
    const RxCall* last = c ? r.calls + c - 1 : nullptr;
    const RxCall* call = c < r.num_calls ? r.calls + c : nullptr;
    const bool turned = call && r.nets[call->net].blocks[0].token_mlp;
    enter(r, grid.z, grid.rows_g(), grid.epoch.rows, written, last, eps, call, turned,
          grid.sums_s());
    grid.epoch.rows += kWarps;
    if (last) written |= 1u << last->write;
    if (!call) break;
    grid.net_call(call->net, c);
    eps = r.nets[call->net].blocks[r.nets[call->net].num_blocks - 1].eps;
  }
  copy_unwritten(r, written);
  if constexpr (kRing) close_rings();
}

template <bool kFp8, bool kRing>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ RxRecursion r, const __grid_constant__ RxGridPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  if constexpr (kRing)  // no plan asks for it there
    asm volatile("trap;");
  else
#endif
    recur<kFp8, kRing>(r, plan);
}

}  // namespace grid_sm80
