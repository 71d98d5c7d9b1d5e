// recursion.cuh - what every recursion kernel does around a net call: its input and its states.
//
//   input(call) = sum(state) + (sum(inject)), each sum left to right, every partial sum in bf16.
//
// A state lives in states_in until a call of this launch wrote it, then in states_out; the running
// state may be resident on chip and its copy in global memory stale. The rules here read the call
// table alone, so all threads, and all CTAs of a sample, decide alike.
#pragma once
#include "api.h"
#include "rx/common.cuh"

namespace rx {

// Eight bf16 sums, each rounded.
RX_DEVICE uint4 add_rounded(uint4 a, uint4 b) {
  auto add = [](uint32_t x, uint32_t y) {
    const float2 u = unpack_bf16(x), v = unpack_bf16(y);
    return pack_bf16(u.x + v.x, u.y + v.y);
  };
  return make_uint4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
}

// Eight bf16 values times a factor, rounded.
RX_DEVICE uint4 scale_rounded(uint4 a, float factor) {
  auto scale = [factor](uint32_t x) {
    const float2 u = unpack_bf16(x);
    return pack_bf16(u.x * factor, u.y * factor);
  };
  return make_uint4(scale(a.x), scale(a.y), scale(a.z), scale(a.w));
}

RX_DEVICE bool reads(const int32_t* list, int count, int state) {
  for (int i = 0; i < count; i++)
    if (list[i] == state) return true;
  return false;
}

RX_DEVICE bool same_inject(const RxCall& a, const RxCall& b) {
  if (a.num_inject != b.num_inject) return false;
  for (int i = 0; i < a.num_inject; i++)
    if (a.inject[i] != b.inject[i]) return false;
  return true;
}

// After call k the running state holds what it wrote. True if the next call overwrites that state
// and reads it nowhere but as its first operand: then nobody needs a copy in global memory.
RX_DEVICE bool stays_resident(const RxCall* calls, int k, int num_calls) {
  if (k + 1 >= num_calls) return false;
  const RxCall &now = calls[k], &next = calls[k + 1];
  return next.write == now.write && next.state[0] == now.write &&
         !reads(next.state + 1, next.num_state - 1, now.write) &&
         !reads(next.inject, next.num_inject, now.write);
}

// True if the sum over call k's inject is wanted again: worth keeping (z_H + x of a TRM cycle).
RX_DEVICE bool inject_is_reused(const RxCall* calls, int k, int num_calls) {
  return k + 1 < num_calls && calls[k].num_inject > 1 && same_inject(calls[k], calls[k + 1]) &&
         !reads(calls[k].inject, calls[k].num_inject, calls[k].write);
}

// True if call k - 1 kept the sum that call k needs.
RX_DEVICE bool inject_was_kept(const RxCall* calls, int k, int first) {
  return k > first && inject_is_reused(calls, k - 1, k + 1);
}

// Where the value of state `i` is: x, what came in, or what a call of this launch wrote.
RX_DEVICE const bf16* state_source(const RxRecursion& p, uint32_t written, int i) {
  if (i == p.num_states) return static_cast<const bf16*>(p.x);
  return static_cast<const bf16*>(written >> i & 1 ? p.states_out[i] : p.states_in[i]);
}

// The sum over a list of states at one 16-byte vector; `offset` counts elements.
RX_DEVICE uint4 sum_states(const RxRecursion& p, uint32_t written, const int32_t* list, int count,
                           size_t offset) {
  auto load = [&](int i) {
    return *reinterpret_cast<const uint4*>(state_source(p, written, list[i]) + offset);
  };
  uint4 sum = load(0);
  for (int i = 1; i < count; i++) sum = add_rounded(sum, load(i));
  return sum;
}

}  // namespace rx
