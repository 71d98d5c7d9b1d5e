// recursion.cuh - what every recursion kernel does around a net call: its input and its states.
//
//   input(call) = scale * sum(state) + (sum(inject)), each sum left to right, every partial sum and
//                 product in bf16
//   written     = keep * state[write] + damping * net(input) + noise, likewise
//
// A state lives in states_in until a call of this launch wrote it, then in states_out; the running
// state may be resident on chip and its copy in global memory stale (RxCall.stays).
#pragma once
#include "api.h"
#include "rx/common.cuh"
#include "rx/random.cuh"

namespace rx {

// Eight bf16 sums, each rounded.
RX_DEVICE uint4 add_rounded(uint4 a, uint4 b) {
  return make_uint4(add_bf16(a.x, b.x), add_bf16(a.y, b.y), add_bf16(a.z, b.z), add_bf16(a.w, b.w));
}

// Bf16 values times a factor, rounded.
RX_DEVICE uint32_t scale_bf16(uint32_t a, float factor) {
  const float2 x = unpack_bf16(a);
  return pack_bf16(x.x * factor, x.y * factor);
}
RX_DEVICE uint4 scale_rounded(uint4 a, float factor) {
  return make_uint4(scale_bf16(a.x, factor), scale_bf16(a.y, factor), scale_bf16(a.z, factor),
                    scale_bf16(a.w, factor));
}

// Whether what the net leaves is not yet what the call writes.
RX_DEVICE bool finishes(const RxCall& call) { return call.keep != 0.f || call.noise != 0.f; }

// Two neighbours of what a call writes, of the net's result and of what the state was; they are
// number `pair` of sample `entry`.
RX_DEVICE uint32_t finish_pair(const RxRecursion& r, const RxCall& call, uint32_t value,
                               uint32_t old, uint32_t entry, uint32_t pair) {
  if (call.keep != 0.f)
    value = add_bf16(scale_bf16(old, call.keep), scale_bf16(value, call.damping));
  if (call.noise == 0.f) return value;
  const uint2 key = make_uint2(uint32_t(*r.seed), uint32_t(*r.seed >> 32));
  const float2 drawn = call_normals(pair, entry + uint32_t(r.seed[1]), uint32_t(call.number), key);
  return add_bf16(value, pack_bf16(call.noise * drawn.x, call.noise * drawn.y));
}

// Eight neighbours, `pair` the first two. Words take turns in the first place: the noise is long.
RX_DEVICE uint4 finish_vector(const RxRecursion& r, const RxCall& call, uint4 x, uint4 old,
                              uint32_t entry, uint32_t pair) {
#pragma unroll 1
  for (uint32_t i = 0; i < 4; i++) {
    const uint32_t word = finish_pair(r, call, x.x, old.x, entry, pair + i);
    x = make_uint4(x.y, x.z, x.w, word);
    old = make_uint4(old.y, old.z, old.w, old.x);
  }
  return x;
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
