// The vectors of variants, packed the same for every instruction set.
#include <cstring>

#include "dispatch.hpp"

namespace rx::cpu {
namespace {

constexpr int kAlign = 32;  // that of layout.hpp

int padded(int n) { return (n + kAlign - 1) / kAlign * kAlign; }

float value(const RawWeight& raw, size_t at) {
  if (raw.dtype == Dtype::f32) return ((const float*)raw.data)[at];
  const uint32_t bits = (uint32_t)((const uint16_t*)raw.data)[at] << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

}  // namespace

VectorSize size_of_vector(const BlockShape& s, int which) {
  const Variant& v = s.variant;
  const int heads = s.heads * s.head_dim, kv = (v.kv_heads ? v.kv_heads : s.heads) * s.head_dim;
  const int over_tokens = s.token_mlp && !v.token_norm_hidden ? s.tokens : s.hidden;
  const int pairs = v.gated ? 2 : 1;
  switch (which) {
    case mixer_in:
      return s.token_mlp ? VectorSize{s.token_inner, pairs} : VectorSize{heads + 2 * kv};
    case mixer_out:
      return {s.token_mlp ? s.tokens : s.hidden};
    case gate_up:
      return {s.inner, pairs};
    case attn_gate:
    case attn_norm:
      return {heads};
    case norm1:
    case norm1_bias:
    case out_norm1:
    case out_norm1_bias:
      return {over_tokens};
    case scale1:
    case scale2:
      return {v.scale_each ? s.hidden : 1};
    case skip1:
    case skip2:
      return {v.skip_each ? s.hidden : 1};
    case q_norm:
    case k_norm:
      return {s.head_dim};
    case t_inner_norm:
      return {s.token_inner};
    case inner_norm:
      return {s.inner};
    case conv:
    case conv_bias:
      return {s.inner, v.conv_of_gate_up ? pairs : 1, which == conv ? v.conv : 1};
    default:
      return {s.hidden};
  }
}

std::vector<float> pack_vector(const BlockShape& s, int which, const RawWeight& raw) {
  const Variant& v = s.variant;
  const auto [width, halves, taps] = size_of_vector(s, which);
  const bool skips = which == skip1 || which == skip2;
  if (skips || which == scale1 || which == scale2) {
    const bool first = which == scale1 || which == skip1, each = skips ? v.skip_each : v.scale_each;
    const bool tokens = first && s.token_mlp && !v.token_norm_hidden;
    std::vector<float> scales(padded(tokens ? s.tokens : s.hidden));
    for (size_t i = 0; i < scales.size(); ++i)
      scales[i] = (skips ? v.skip_scale : v.residual_scale) * value(raw, each ? i : 0);
    return scales;
  }
  std::vector<float> out((size_t)taps * halves * padded(width));
  for (int tap = 0; tap < taps; ++tap)
    for (int half = 0; half < halves; ++half)
      for (int i = 0; i < width; ++i)
        out[((size_t)tap * halves + half) * padded(width) + i] =
            value(raw, ((size_t)half * width + i) * taps + tap);
  return out;
}

}  // namespace rx::cpu
