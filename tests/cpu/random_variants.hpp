// Blocks with the fields of later systems, drawn for random_check.cpp: every field of
// csrc/cpu/variant.hpp, in every combination that recurx/specs.py admits.
#pragma once

#include <cstdio>
#include <string>

#include "cpu/dispatch.hpp"

namespace rx::cpu {

// Rows and columns of a matrix; none of either where a block has no such matrix.
struct MatrixSize {
  int out = 0, in = 0;
};

inline MatrixSize size_of_matrix(const BlockShape& s, int which) {
  const Variant& v = s.variant;
  const int pairs = v.on && !v.gated ? 1 : 2, wide = s.heads * s.head_dim;
  const int kv = (v.kv_heads ? v.kv_heads : s.heads) * s.head_dim;
  const bool mixes = !v.on || v.kind < Kind::none, has_mlp = !v.on || v.kind != Kind::norm;
  if (which == gate_up && has_mlp) return {pairs * s.inner, s.hidden};
  if (which == down && has_mlp) return {s.hidden, s.inner};
  if (which == attn_gate && v.on && v.attn_gate) return {wide, s.hidden};
  if (!mixes || which > mixer_out) return {};
  if (s.token_mlp)
    return which == mixer_in ? MatrixSize{pairs * s.token_inner, s.tokens}
                             : MatrixSize{s.tokens, s.token_inner};
  return which == mixer_in ? MatrixSize{wide + 2 * kv, s.hidden} : MatrixSize{s.hidden, wide};
}

// Whether a block may have a vector, those of norms, scales and biases, or must: a convolution's.
inline bool may_have(const BlockShape& s, int which) {
  const Variant& v = s.variant;
  const bool mixes = v.kind < Kind::none, has_mlp = v.kind != Kind::norm;
  if (which < matrices_per_block) return size_of_matrix(s, which).out > 0;  // its bias
  switch (which) {
    case norm1:
    case norm1_bias:
      return mixes || !has_mlp;
    case scale1:
      return mixes;
    case out_norm1:
    case out_norm1_bias:
      return mixes && v.placement == Placement::sandwich;
    case norm2:
    case norm2_bias:
    case scale2:
      return has_mlp;
    case out_norm2:
    case out_norm2_bias:
      return has_mlp && v.placement == Placement::sandwich;
    case q_norm:
    case k_norm:
      return v.qk_norm != Norm::none;
    case attn_norm:
      return v.attn_norm != Norm::none;
    case inner_norm:
      return v.inner_norm != Norm::none;
    case t_inner_norm:
      return v.inner_norm_tokens;
    default:
      return v.conv > 0;
  }
}

// Draws the fields of a block whose kind and sizes are given; `grid` is (rows, columns, axis).
template <class Random>
void draw_variant(Random& r, BlockShape& s, int tokens, const int* grid) {
  Variant& v = s.variant;
  const auto some_norm = [&] { return r.one_in(2) ? Norm::none : (Norm)r.from(1, 2); };
  v.on = true;
  v.kind = s.token_mlp ? Kind::token_mlp : Kind::attention;
  if (!grid[0] && r.one_in(5)) {
    v.kind = r.one_in(2) ? Kind::none : Kind::norm;
    s.token_mlp = false, s.heads = s.head_dim = s.tokens = s.token_inner = 0;
  }
  v.norm = (Norm)r.from(1, 2);
  v.placement = (Placement)r.from(0, 2);
  v.residual_scale = r.one_in(2) ? 1.f : 0.75f;
  if (v.kind == Kind::norm) {
    s.inner = 0;
    return;
  }
  Random apart = r;  // what came later leaves the draws of the older fields as they were
  if (apart.one_in(4)) v.dropout = 0.25f;
  if (apart.one_in(4)) v.drop_path = 0.5f;
  v.key_padding = v.kind == Kind::attention && apart.one_in(3);
  v.activation = (Activation)r.from(0, 5);
  v.gated = !r.one_in(3);
  v.inner_norm = some_norm();
  if (v.inner_norm != Norm::none && r.one_in(2)) {
    v.norm_of_product = v.gated = true;
    v.activation = Activation::silu;
  }
  if (r.one_in(2)) v.conv = r.one_in(6) ? tokens + r.from(1, 3) : r.from(1, 5);
  v.conv_of_gate_up = v.conv && r.one_in(2);
  if (v.kind == Kind::token_mlp) {
    v.token_norm_hidden = r.one_in(2);
    v.inner_norm_tokens = v.inner_norm != Norm::none && r.one_in(2);
  }
  v.scale_each = (v.kind != Kind::token_mlp || v.token_norm_hidden) && r.one_in(2);
  if (v.kind != Kind::attention) return;
  s.heads = r.from(1, 4);
  if (r.one_in(2)) v.kv_heads = s.heads % 2 ? 1 : s.heads / 2;
  v.causal = r.one_in(2);
  if (v.causal && r.one_in(2)) v.prefix = r.from(1, tokens + 1);
  if (r.one_in(3)) v.window = r.from(1, tokens + 1);
  v.qk_norm = some_norm();
  v.attn_norm = some_norm();
  v.attn_gate = r.one_in(2);
  for (int i = 0; i < 3; ++i) v.axial[i] = grid[i];
}

// For a report: the fields as numbers, in the order of their declaration.
inline std::string said(const Variant& v) {
  char all[200];
  std::snprintf(all, sizeof all,
                "%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%.1f,%.1f",
                (int)v.kind, (int)v.norm, (int)v.placement, v.token_norm_hidden, v.kv_heads,
                v.causal, v.prefix, v.window, (int)v.qk_norm, (int)v.attn_norm, (int)v.inner_norm,
                v.attn_gate, v.axial[0], v.axial[1], v.axial[2], (int)v.activation, v.gated,
                v.inner_norm_tokens, v.norm_of_product, v.conv, v.conv_of_gate_up, v.key_padding,
                v.dropout, v.drop_path);
  return std::string(" variant ") + all;
}

}  // namespace rx::cpu
