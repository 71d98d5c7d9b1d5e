// solve.cuh - the queue in the owner kernel: a CTA deals with its own slots.
#pragma once
#include "../solve.cuh"
#include "layout.cuh"

namespace owner_sm80 {

// In the owner's scratch; thread 0 alone writes them.
RX_DEVICE rx::Slot* slots_of(const Params& p) {
  char* own = static_cast<char*>(p.r.scratch) + int64_t(blockIdx.x) * p.at.scratch_bytes;
  return reinterpret_cast<rx::Slot*>(own + p.at.slots);
}

// Thread 0 fills the slots. Before the first step.
RX_DEVICE void fill_slots(const Params& p) {
  if (threadIdx.x) return;
  rx::Slot* slots_g = slots_of(p);
  for (int i = 0; i < p.at.samples; i++) slots_g[i] = rx::fresh_slot(p.solve);
}

// Before a step: false when no slot has an entry.
RX_DEVICE bool begin_step(const Params& p) {
  __syncthreads();  // thread 0 has dealt with the slots
  const rx::Slot* slots_g = slots_of(p);
  bool any = false;
  for (int i = 0; i < p.at.samples; i++) {
    const rx::Slot at = slots_g[i];
    if (at.entry < 0) continue;
    any = true;
    for (int v = int(threadIdx.x); v < p.r.tokens * p.r.hidden / 8; v += kThreads)
      rx::enter_step(p.r, p.solve, int(blockIdx.x) * p.at.samples + i, at, v);
  }
  __syncthreads();
  return any;
}

// After a step: read the heads, write answers, and let the queue refill the slots.
RX_DEVICE void end_step(const Params& p) {
  __syncthreads();  // the states are written
  const RxSolve& s = p.solve;
  rx::Slot* slots_g = slots_of(p);
  const int warp = int(threadIdx.x) >> 5;
  for (int i = 0; i < p.at.samples; i++) {
    rx::Slot at = slots_g[i];
    if (at.entry < 0) continue;
    const uint32_t* rows_g = rx::answer_rows(p.r, s, int(blockIdx.x) * p.at.samples + i);
    for (int token = s.prefix + warp; token < p.r.tokens; token += kWarps)
      rx::answer_token(p.r, s, rows_g, at, token);
    if (warp) continue;
    rx::read_q(p.r, s, rows_g, at);
    if (threadIdx.x == 0) slots_g[i].q_halt = at.q_halt, slots_g[i].q_continue = at.q_continue;
  }
  __syncthreads();  // all have read the slots
  if (threadIdx.x) return;
  for (int i = 0; i < p.at.samples; i++)
    if (slots_g[i].entry >= 0) rx::leave_step(s, slots_g[i]);
}

}  // namespace owner_sm80
