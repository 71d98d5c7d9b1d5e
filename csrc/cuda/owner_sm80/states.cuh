// states.cuh - from the states in global memory to h and back: what surrounds a net call.
//
// A thread always handles the same vectors of h, so these passes need no barrier between them.
#pragma once
#include "../recursion.cuh"
#include "place.cuh"

namespace owner_sm80 {

// f(row, byte offset in h, column) for each 16-byte vector of h that is this thread's. Eight lanes
// take the eight rows of one matrix, 128 consecutive bytes; a warp takes 64 bytes of eight rows of
// a state in global memory, whole sectors.
template <class P, class F>
RX_DEVICE void for_each_vector(Owner<P>& o, F f) {
  constexpr int kGroups = P::kColumnBlocks / 4;
  o.forget_addresses();
  for (int v = o.warp; v < row_blocks(o) * kGroups; v += kWarps) {
    const int row_block = v / kGroups, column_block = v % kGroups * 4 + (o.lane >> 3);
    const int row = o.lane & 7;
    const uint32_t at =
        uint32_t(row_block * P::kColumnBlocks + column_block) * kMatrix + uint32_t(row) * 16;
    f(row_block * 8 + row, at, column_block * 8);
  }
}

// All rows of h are as they are from here on; a barrier before and after.
template <class P>
RX_DEVICE void reset_scales(Owner<P>& o) {
  __syncthreads();
  if (int(threadIdx.x) < P::kRows) o.scales()[threadIdx.x] = 1.f;
  __syncthreads();
}

// Index of a 16-byte vector in a state, or -1 in padding rows. 32 bits are enough for 32 GB.
template <class P>
RX_DEVICE int state_vector(const Owner<P>& o, int first_sample, int row, int column) {
  const int sample_rows = o.p.at.sample_tiles * 16;
  const int sample = row / sample_rows, token = row % sample_rows;
  if (token >= o.p.r.tokens || sample >= o.p.at.samples || first_sample + sample >= o.p.r.batch)
    return -1;
  return ((first_sample + sample) * o.p.r.tokens + token) * P::kColumnBlocks + column / 8;
}

// h = input of call k; padding rows become 0.
template <class P>
RX_DEVICE void form_input(Owner<P>& o, int first_sample, uint32_t written, int k) {
  const RxRecursion& r = o.p.r;
  const RxCall& call = r.calls[k];
  const bool resident = k > 0 && r.calls[k - 1].write == call.state[0];
  const bool was_kept = call.sum == kRxSumKept, keep = call.sum == kRxSumFormed;
  for_each_vector(o, [&](int row, uint32_t at, int column) {
    const int vector = state_vector(o, first_sample, row, column);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (vector >= 0) {
      const size_t offset = size_t(vector) * 8;
      if (resident)
        x = rx::scale_rounded(load_vector(o, row, at, column), o.scales()[row]);
      else
        x = rx::sum_states(r, written, call.state, 1, offset);
      for (int i = 1; i < call.num_state; i++)
        x = rx::add_rounded(x, rx::sum_states(r, written, call.state + i, 1, offset));
      if (call.scale != 1.f) x = rx::scale_rounded(x, call.scale);
      if (call.num_inject) {
        uint4* kept_g = o.inject_g() + at / 16;
        const uint4 inject =
            was_kept ? *kept_g : rx::sum_states(r, written, call.inject, call.num_inject, offset);
        if (keep) *kept_g = inject;
        x = rx::add_rounded(x, inject);
      }
    }
    store_vector(o, row, at, column, x);
  });
  reset_scales(o);
}

// h = what call k writes, of what its net left: damped, with noise. What it damps is in global
// memory, for no call leaves its result on chip alone (RxCall.stays) for a damped one.
template <class P>
RX_DEVICE void finish_call(Owner<P>& o, int first_sample, uint32_t written, int k) {
  const RxRecursion& r = o.p.r;
  const RxCall& call = r.calls[k];
  const uint4* old_g = reinterpret_cast<const uint4*>(rx::state_source(r, written, call.write));
  for_each_vector(o, [&](int row, uint32_t at, int column) {
    const int vector = state_vector(o, first_sample, row, column);
    if (vector < 0) return;
    uint4 x = rx::scale_rounded(load_vector(o, row, at, column), o.scales()[row]);
    const uint4 old = call.keep != 0.f ? old_g[vector] : make_uint4(0, 0, 0, 0);
    const uint32_t vectors = uint32_t(r.tokens * P::kColumnBlocks);
    const uint32_t entry = uint32_t(vector) / vectors, pair = (uint32_t(vector) % vectors) * 4;
    x = rx::finish_vector(r, call, x, old, entry, pair);
    store_vector(o, row, at, column, x);
  });
  reset_scales(o);
}

// states_out[state] = h.
template <class P>
RX_DEVICE void store_state(Owner<P>& o, int first_sample, int state) {
  uint4* out_g = static_cast<uint4*>(o.p.r.states_out[state]);
  for_each_vector(o, [&](int row, uint32_t at, int column) {
    const int vector = state_vector(o, first_sample, row, column);
    if (vector < 0) return;
    const uint4 x = load_vector(o, row, at, column);
    out_g[vector] = rx::scale_rounded(x, o.scales()[row]);
  });
}

// states_out[state] = states_in[state], for a state that no call wrote.
template <class P>
RX_DEVICE void copy_state(Owner<P>& o, int first_sample, int state) {
  const uint4* in_g = static_cast<const uint4*>(o.p.r.states_in[state]);
  uint4* out_g = static_cast<uint4*>(o.p.r.states_out[state]);
  for_each_vector(o, [&](int row, uint32_t, int column) {
    const int vector = state_vector(o, first_sample, row, column);
    if (vector >= 0) out_g[vector] = in_g[vector];
  });
}

}  // namespace owner_sm80
