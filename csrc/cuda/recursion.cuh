// recursion.cuh - what every recursion kernel does around a net call: its input and its states.
//
//   input(call) = sum(state) + (sum(inject)), each sum left to right, every partial sum in bf16.
//
// A state lives in states_in until a call of this launch wrote it, then in states_out; the running
// state may be resident on chip and its copy in global memory stale (RxCall.stays).
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
