// What a window keeps from its forward to its backward, and where it lies.
//
// A slice of samples has one stretch of the kept values (of the states' type) and one of the kept
// floats; in it lie, call after call, the block inputs, the call's result, and what `save` adds.
// R = samples x T rows, D hidden, F and G the inner widths over D and over T, padded to kAlign:
//
//   block   h [R, D]; the call's out [R, D]; scale_out [R]
//   all     and  mid [R, D], gate and up [R, 2F], scale_mid
//           attention: q, k, v as projected [R, 3D], mixed [R, D], lse [R, H], scale_mid [R]
//           token MLP: gate and up over T [samples x D, 2G], scale_mid [samples x D]
//   states  nothing
//
// A step of learned factors keeps what they multiply too, behind the call's out: the sum of its
// states, and the value that it damps, [R, D] each.
//
// A variant keeps no scales (norms go back from what they read), and with `all` mid, what its
// products made (up alone if there is no gate), with their biases: y1 and y2, the results of its
// sublayers before norms, scales and sums, [R, D] or [samples x D, T]; of attention the gate, mixed
// and lse too, and where K/V heads are shared, normed or in lines of a grid, `heads`, each head's
// own q, k, v as attention reads them.
#pragma once

#include "../layout.hpp"

namespace rx::cpu::RX_ISA {

// Samples of one pass: enough rows that the sums over them (dW) are long, and so few that what is
// computed again stays small. NOTE: not by the number of threads, which may change between forward
// and backward.
constexpr int kSliceRows = 800;

struct Slices {
  int batch, count;
  explicit Slices(const Recursion& rec)
      : batch(rec.batch), count(ceil_div(batch, imax(1, kSliceRows / imax(1, rec.tokens)))) {}
  Range of(int i) const {
    return {(int)((long)batch * i / count), (int)((long)batch * (i + 1) / count)};
  }
  int largest() const { return count ? ceil_div(batch, count) : 0; }
};

template <class T>
struct Kept {
  T *h, *out, *mid, *gate_up;
  T *qkv, *mixed, *token_gate_up;
  T *y1, *y2, *heads, *gate;  // of a variant
  T *scaled, *before;         // of a step, in the first of its call's blocks
  float *scale_out, *scale_mid, *lse;
};

// Whether attention reads other rows of heads than the product wrote.
RX_INLINE bool own_heads(const BlockShape& s) {
  const Variant& v = s.variant;
  return kv_heads(s) != s.heads || v.qk_norm != Norm::none || (v.axial[0] && v.axial[2] == 0);
}

// Takes pieces of the two stretches in turn; with null pointers it only counts.
template <class T>
struct KeptCarver {
  T* values;
  float* floats;
  KeptSize used{};
  T* take(size_t count) {
    T* p = values ? values + used.values : nullptr;
    used.values += count;
    return p;
  }
  float* take_floats(size_t count) {
    float* p = floats ? floats + used.floats : nullptr;
    used.floats += count;
    return p;
  }

  void block(Kept<T>& k, const BlockShape& s, int samples, int tokens) {
    k.h = take((size_t)samples * tokens * s.hidden);
    if (!s.variant.on) k.scale_out = take_floats((size_t)samples * tokens);
  }
  // What save="all" adds, or what is computed again.
  void rest(Kept<T>& k, const BlockShape& s, int samples, int tokens) {
    const size_t rows = (size_t)samples * tokens, columns = (size_t)samples * s.hidden;
    if (s.variant.on) {
      rest_of_variant(k, s, rows, columns, tokens);
      return;
    }
    k.mid = take(rows * s.hidden);
    k.gate_up = take(rows * 2 * round_up(s.inner, kAlign));
    k.qkv = k.mixed = k.token_gate_up = nullptr;
    k.lse = nullptr;
    if (s.token_mlp) {
      k.token_gate_up = take(columns * 2 * round_up(s.token_inner, kAlign));
      k.scale_mid = take_floats(columns);
    } else {
      k.qkv = take(rows * 3 * s.hidden);
      k.mixed = take(rows * s.hidden);
      k.lse = take_floats(rows * s.heads);
      k.scale_mid = take_floats(rows);
    }
  }
  void rest_of_variant(Kept<T>& k, const BlockShape& s, size_t rows, size_t columns, int tokens) {
    const Variant& v = s.variant;
    const int halves = v.gated ? 2 : 1, wide = s.heads * s.head_dim;
    k.mid = k.h;
    if (v.kind == Kind::norm) return;
    k.gate_up = take(rows * halves * round_up(s.inner, kAlign));
    k.y2 = take(rows * s.hidden);
    if (v.kind == Kind::none) return;
    k.mid = take(rows * s.hidden);
    const bool over_tokens = s.token_mlp && !v.token_norm_hidden;
    k.y1 = take(over_tokens ? columns * round_up(tokens, kAlign) : rows * s.hidden);
    if (s.token_mlp) {
      k.token_gate_up = take(columns * halves * round_up(s.token_inner, kAlign));
      return;
    }
    k.qkv = take(rows * linear_of(s, mixer_in).out);
    k.heads = own_heads(s) ? take(rows * 3 * wide) : k.qkv;
    k.mixed = take(rows * wide);
    k.gate = v.attn_gate ? take(rows * wide) : nullptr;
    k.lse = take_floats(rows * s.heads);
  }
};

// Places of the blocks of call `number` (all of them carved before): blocks[i], i < num_blocks.
template <class T>
KeptSize kept_of_call(const Recursion& rec, Save save, int samples, T* values, float* floats,
                      int number, Kept<T>* blocks) {
  KeptCarver<T> carver{values, floats};
  const int last = number < 0 ? rec.num_steps : number + 1;
  for (int call = 0; call < last; ++call) {
    const PackedNet& net = rec.nets[rec.steps[call].net];
    Kept<T> skipped;
    for (int i = 0; i < net.num_blocks; ++i) {
      Kept<T>& k = call == number ? blocks[i] : skipped;
      carver.block(k, net.blocks[i].shape, samples, rec.tokens);
      if (save == Save::all) carver.rest(k, net.blocks[i].shape, samples, rec.tokens);
      if (call == number && i > 0) blocks[i - 1].out = k.h;
    }
    const size_t count = (size_t)samples * rec.tokens * rec.hidden;
    T* const out = carver.take(count);
    T* const scaled = rec.steps[call].scale_each ? carver.take(count) : nullptr;
    T* const before = rec.steps[call].share_each ? carver.take(count) : nullptr;
    if (call != number) continue;
    blocks[net.num_blocks - 1].out = out;
    blocks[0].scaled = scaled, blocks[0].before = before;
  }
  return carver.used;
}

// Of one sample, which is what all slices have a multiple of.
template <class T>
KeptSize kept_size(const Recursion& rec, Save save) {
  if (save == Save::states) return {};
  return kept_of_call<T>(rec, save, 1, nullptr, nullptr, -1, nullptr);
}

}  // namespace rx::cpu::RX_ISA
