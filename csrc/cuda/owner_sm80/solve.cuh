// solve.cuh - supervision steps and halting inside the owner kernel: a queue feeds the owners.
//
// A slot is a place for one sample: x and the states of batch entry `slot`. An owner runs the
// recursion on its slots, reads the heads, and each sample that halts or has used up its steps
// hands its slot to the next entry of the queue. Entry e is rollout e % rollouts of puzzle
// e / rollouts; rollouts differ by noise that follows from (seed, entry, step, element) alone, so
// an answer does not depend on which owner found it, or when.
//
// The heads are a few hundred dot products against a net call's gigaflop: plain multiply-adds, one
// warp a token. No tensor of logits is written unless it is asked for.
#pragma once
#include "../recursion.cuh"
#include "../rx/random.cuh"
#include "layout.cuh"

namespace owner_sm80 {

// What thread 0 keeps of a slot, in the owner's scratch.
struct Slot {
  int32_t entry;  // -1: the queue is empty and the slot idle
  int32_t steps;  // taken for this entry
  float q_halt, q_continue;
};

RX_DEVICE Slot* slots_of(const Params& p) {
  char* own = static_cast<char*>(p.r.scratch) + int64_t(blockIdx.x) * p.at.scratch_bytes;
  return reinterpret_cast<Slot*>(own + p.at.slots);
}

RX_DEVICE int take_entry(const RxSolve& s) {
  const uint32_t entry = atomicAdd(s.next, 1u);
  return entry < uint32_t(s.entries) ? int(entry) : -1;
}

// Thread 0 fills the slots. Before the first step.
RX_DEVICE void fill_slots(const Params& p) {
  if (threadIdx.x) return;
  Slot* slots_g = slots_of(p);
  for (int i = 0; i < p.at.samples; i++) slots_g[i] = Slot{take_entry(p.solve), 0, 0.f, 0.f};
}

// x and the start states of a fresh entry, and noise on the state that the heads read. A thread
// handles the same vectors in all of it.
RX_DEVICE void enter_step(const Params& p, int slot, const Slot& at) {
  const RxSolve& s = p.solve;
  const int vectors = p.r.tokens * p.r.hidden / 8;
  const size_t base = size_t(slot) * vectors;
  const uint4* x_g = static_cast<const uint4*>(s.x) + size_t(at.entry / s.rollouts) * vectors;
  uint4* answer_g = static_cast<uint4*>(p.r.states_out[s.output]) + base;
  for (int v = int(threadIdx.x); v < vectors; v += kThreads) {
    if (at.steps == 0) {
      static_cast<uint4*>(s.slot_x)[base + v] = x_g[v];
      for (int i = 0; i < p.r.num_states; i++)
        static_cast<uint4*>(p.r.states_out[i])[base + v] = static_cast<const uint4*>(s.start[i])[v];
    }
    if (s.sigma <= 0.f) continue;
    const uint2 key = make_uint2(uint32_t(s.seed), uint32_t(s.seed >> 32));
    const uint4 counter{uint32_t(2 * v), uint32_t(at.entry), uint32_t(at.steps), 0};
    const uint4 further{counter.x + 1, counter.y, counter.z, 0};
    const float4 a = rx::normals(counter, key), b = rx::normals(further, key);
    const uint4 noise = make_uint4(
        rx::pack_bf16(s.sigma * a.x, s.sigma * a.y), rx::pack_bf16(s.sigma * a.z, s.sigma * a.w),
        rx::pack_bf16(s.sigma * b.x, s.sigma * b.y), rx::pack_bf16(s.sigma * b.z, s.sigma * b.w));
    answer_g[v] = rx::add_rounded(answer_g[v], noise);
  }
}

// Before a step: false when no slot has an entry.
RX_DEVICE bool begin_step(const Params& p) {
  __syncthreads();  // thread 0 has dealt with the slots
  const Slot* slots_g = slots_of(p);
  bool any = false;
  for (int i = 0; i < p.at.samples; i++) {
    const Slot at = slots_g[i];
    if (at.entry < 0) continue;
    any = true;
    enter_step(p, int(blockIdx.x) * p.at.samples + i, at);
  }
  __syncthreads();
  return any;
}

// The product of two rows of bf16, rounded to bf16; in every lane.
RX_DEVICE float rounded_dot(const uint32_t* a_g, const uint32_t* b_g, int pairs, float bias) {
  float sum = 0.f;
  for (int i = int(threadIdx.x) & 31; i < pairs; i += 32) {
    const float2 a = rx::unpack_bf16(a_g[i]), b = rx::unpack_bf16(b_g[i]);
    sum += a.x * b.x + a.y * b.y;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(rx::kFullWarp, sum, lane);
  return rx::unpack_bf16(rx::pack_bf16(sum + bias, 0.f)).x;
}

// The answer of one token: the first of the largest logits, as PyTorch's argmax on a CPU.
RX_DEVICE void answer_token(const Params& p, const uint32_t* row_g, const Slot& at, int token) {
  const RxSolve& s = p.solve;
  const int pairs = p.r.hidden / 2, answers = p.r.tokens - s.prefix;
  const size_t to = size_t(at.entry) * answers + (token - s.prefix);
  float best = 0.f;
  int chosen = -1;
  for (int v = 0; v < s.vocab; v++) {
    const uint32_t* weight_g = static_cast<const uint32_t*>(s.lm_head) + size_t(v) * pairs;
    const float logit = rounded_dot(row_g, weight_g, pairs, 0.f);
    if (s.logits && (threadIdx.x & 31) == 0)
      static_cast<rx::bf16*>(s.logits)[to * s.vocab + v] = rx::bf16(rx::pack_bf16(logit, 0.f));
    if (chosen >= 0 && !(logit > best)) continue;
    best = logit;
    chosen = v;
  }
  if (threadIdx.x & 31) return;
  s.predictions[to] = chosen;
  if (s.trace) s.trace[size_t(at.steps) * s.entries * answers + to] = chosen;
}

// Thread 0: what a step made of a slot, and what comes next in it.
RX_DEVICE void leave_step(const RxSolve& s, Slot& at) {
  at.steps++;
  const float limit = (s.halt == 2 ? at.q_continue : 0.f) + s.halt_above;
  const bool halts = s.halt != 0 && at.q_halt > limit;
  if (!halts && at.steps < s.max_steps) return;
  s.steps[at.entry] = at.steps;
  s.q[at.entry] = at.q_halt;
  s.halted[at.entry] = halts;
  at = Slot{take_entry(s), 0, 0.f, 0.f};
}

// After a step: read the heads, write answers, and let the queue refill the slots.
RX_DEVICE void end_step(const Params& p) {
  __syncthreads();  // the states are written
  const RxSolve& s = p.solve;
  Slot* slots_g = slots_of(p);
  const int warp = int(threadIdx.x) >> 5, pairs = p.r.hidden / 2;
  for (int i = 0; i < p.at.samples; i++) {
    const Slot at = slots_g[i];
    if (at.entry < 0) continue;
    const size_t row = (size_t(blockIdx.x) * p.at.samples + i) * p.r.tokens;
    const uint32_t* answer_g = static_cast<const uint32_t*>(p.r.states_out[s.output]) + row * pairs;
    for (int token = s.prefix + warp; token < p.r.tokens; token += kWarps)
      answer_token(p, answer_g + size_t(token) * pairs, at, token);
    if (warp) continue;
    float q[2];
#pragma unroll
    for (int n = 0; n < 2; n++)
      q[n] = rounded_dot(answer_g, static_cast<const uint32_t*>(s.q_head) + n * pairs, pairs,
                         rx::unpack_bf16(static_cast<const rx::bf16*>(s.q_bias)[n]).x);
    if (threadIdx.x == 0) slots_g[i].q_halt = q[0], slots_g[i].q_continue = q[1];
  }
  __syncthreads();  // all have read the slots
  if (threadIdx.x) return;
  for (int i = 0; i < p.at.samples; i++)
    if (slots_g[i].entry >= 0) leave_step(s, slots_g[i]);
}

}  // namespace owner_sm80
