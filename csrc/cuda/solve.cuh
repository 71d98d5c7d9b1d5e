// solve.cuh - supervision steps and halting inside a recursion kernel: a queue feeds its slots.
//
// A slot is a place for one sample: x and the states of batch entry `slot`. A kernel runs the
// recursion on its slots, reads the heads, and each sample that halts or has used up its steps
// hands its slot to the next entry of the queue. Entry e is rollout e % rollouts of puzzle
// e / rollouts; rollouts differ by noise that follows from (seed, entry, step, element) alone, so
// an answer does not depend on which slot found it, or when.
//
// The heads are a few hundred dot products against a net call's gigaflop: plain multiply-adds, one
// warp a token. No tensor of logits is written unless it is asked for. What waits for whom is each
// family's own: owner_sm80/solve.cuh, cluster_sm90a/solve.cuh.
#pragma once
#include "checks.cuh"
#include "recursion.cuh"
#include "rx/random.cuh"

namespace rx {

// What the thread that deals with a slot keeps of it.
struct alignas(16) Slot {
  int32_t entry;  // -1: the queue is empty and the slot idle
  int32_t steps;  // taken for this entry
  float q_halt, q_continue;
};

RX_DEVICE int take_entry(const RxSolve& s) {
  const uint32_t entry = atomicAdd(s.next, 1u);
  return entry < uint32_t(s.entries) ? int(entry) : -1;
}
RX_DEVICE Slot fresh_slot(const RxSolve& s) { return Slot{take_entry(s), 0, 0.f, 0.f}; }

// Before a step, vector v of a slot's sample: x and the start states of a fresh entry, and noise on
// the state that the heads read. One thread handles the same vectors in all of it.
RX_DEVICE void enter_step(const RxRecursion& r, const RxSolve& s, int slot, const Slot& at, int v) {
  const int vectors = r.tokens * r.hidden / 8;
  const size_t to = size_t(slot) * vectors + v;
  if (at.steps == 0) {
    const size_t from = size_t(at.entry / s.rollouts) * vectors + v;
    static_cast<uint4*>(s.slot_x)[to] = static_cast<const uint4*>(s.x)[from];
    for (int i = 0; i < r.num_states; i++)
      static_cast<uint4*>(r.states_out[i])[to] = static_cast<const uint4*>(s.start[i])[v];
  }
  if (s.sigma <= 0.f) return;
  const uint2 key = make_uint2(uint32_t(s.seed), uint32_t(s.seed >> 32));
  const uint4 counter{uint32_t(2 * v), uint32_t(at.entry), uint32_t(at.steps), 0};
  const uint4 further{counter.x + 1, counter.y, counter.z, 0};
  const float4 a = normals(counter, key), b = normals(further, key);
  const uint4 noise =
      make_uint4(pack_bf16(s.sigma * a.x, s.sigma * a.y), pack_bf16(s.sigma * a.z, s.sigma * a.w),
                 pack_bf16(s.sigma * b.x, s.sigma * b.y), pack_bf16(s.sigma * b.z, s.sigma * b.w));
  uint4* answer_g = static_cast<uint4*>(r.states_out[s.output]) + to;
  *answer_g = add_rounded(*answer_g, noise);
}

// The rows of a slot's sample in the state that the heads read.
RX_DEVICE const uint32_t* answer_rows(const RxRecursion& r, const RxSolve& s, int slot) {
  return static_cast<const uint32_t*>(r.states_out[s.output]) +
         size_t(slot) * opaque(r.tokens) * (r.hidden / 2);
}

// The product of two rows of bf16, rounded to bf16; in every lane.
RX_DEVICE float rounded_dot(const uint32_t* a_g, const uint32_t* b_g, int pairs, float bias) {
  float sum = 0.f;
#pragma unroll 4
  for (int i = int(opaque(threadIdx.x)) & 31; i < pairs; i += 32) {
    const float2 a = unpack_bf16(a_g[i]), b = unpack_bf16(b_g[i]);
    sum += a.x * b.x + a.y * b.y;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
  return unpack_bf16(pack_bf16(sum + bias, 0.f)).x;
}

// The answer of one token: the first of the largest logits, as PyTorch's argmax on a CPU.
RX_DEVICE void answer_token(const RxRecursion& r, const RxSolve& s, const uint32_t* rows_g,
                            const Slot& at, int token) {
  // Opaque here and below: else what follows from the sizes is formed before the first step, kept
  // through all calls, and spilled.
  const int pairs = opaque(r.hidden) / 2, answers = opaque(r.tokens) - s.prefix;
  const uint32_t* row_g = rows_g + size_t(token) * pairs;
  const size_t to = size_t(at.entry) * answers + (token - s.prefix);
  float best = 0.f;
  int chosen = -1;
#pragma unroll 1
  for (int v = 0; v < s.vocab; v++) {
    const uint32_t* weight_g = static_cast<const uint32_t*>(s.lm_head) + size_t(v) * pairs;
    const float logit = rounded_dot(row_g, weight_g, pairs, 0.f);
    if (s.logits && (threadIdx.x & 31) == 0)
      static_cast<bf16*>(s.logits)[to * s.vocab + v] = bf16(pack_bf16(logit, 0.f));
    if (chosen >= 0 && !(logit > best)) continue;
    best = logit;
    chosen = v;
  }
  if (threadIdx.x & 31) return;
  s.predictions[to] = chosen;
  if (s.trace) s.trace[size_t(at.steps) * s.entries * answers + to] = chosen;
}

// q_halt and q_continue of a slot's sample; a whole warp.
RX_DEVICE void read_q(const RxRecursion& r, const RxSolve& s, const uint32_t* rows_g, Slot& at) {
  const int pairs = opaque(r.hidden) / 2;
  float q[2];
#pragma unroll
  for (int n = 0; n < 2; n++)
    q[n] = rounded_dot(rows_g, static_cast<const uint32_t*>(s.q_head) + n * pairs, pairs,
                       unpack_bf16(static_cast<const bf16*>(s.q_bias)[n]).x);
  at.q_halt = q[0], at.q_continue = q[1];
}

// One thread: what a step made of a slot, and what comes next in it.
RX_DEVICE void leave_step(const RxSolve& s, Slot& at) {
  at.steps++;
  const float limit = (s.halt == 2 ? at.q_continue : 0.f) + s.halt_above;
  const bool halts = s.halt != 0 && at.q_halt > limit;
  if (!halts && at.steps < s.max_steps) return;
  s.steps[at.entry] = at.steps;
  s.q[at.entry] = at.q_halt;
  s.halted[at.entry] = halts;
  at = fresh_slot(s);
}

// ---- host
inline int check_solve(const RxRecursion& r, const RxSolve& s, int slots, const char* family) {
  auto refuse = [&](const std::string& why) { return rx::refuse(family, why); };
  auto text = [](int64_t x) { return std::to_string(x); };
  if (s.entries < 1 || s.rollouts < 1 || s.max_steps < 1 || s.vocab < 1)
    return refuse("entries, rollouts, max_steps and vocab must be positive");
  if (s.prefix < 0 || s.prefix >= r.tokens)
    return refuse("a prefix of " + text(s.prefix) + " leaves no answer in " + text(r.tokens) +
                  " tokens");
  if (s.output < 0 || s.output >= r.num_states) return refuse("output is no state");
  if (s.halt < 0 || s.halt > 2) return refuse("halt is " + text(s.halt) + "; 0, 1 or 2");
  if (r.batch == slots && slots > 0) return 0;
  return refuse("batch is " + text(r.batch) + "; it must be the number of slots, " + text(slots));
}

}  // namespace rx
