// In what a block differs from those of TRM and HRM, as recurx/specs.py spells it: plain data that
// variant_block.hpp reads at run time.
#pragma once

namespace rx::cpu {

enum class Kind : int { attention, token_mlp, none, norm };
enum class Norm : int { none, rms, layer };
enum class Placement : int { post, pre, sandwich };
enum class Activation : int { silu, gelu, gelu_tanh, relu, relu2, sigmoid };

struct Variant {
  bool on = false;  // else a block of TRM or HRM, and the rest is not read
  Kind kind = Kind::attention;
  Norm norm = Norm::rms;
  Placement placement = Placement::post;
  bool token_norm_hidden = false;  // else over the tokens
  float residual_scale = 1.f, skip_scale = 1.f;
  bool scale_each = false, skip_each = false;  // a learned one has D values, else one
  int kv_heads = 0;                            // 0: as many as heads
  bool causal = false;
  int prefix = 0, window = 0;  // of the mask; window 0: all
  Norm qk_norm = Norm::none, attn_norm = Norm::none, inner_norm = Norm::none;
  bool attn_gate = false;
  int axial[3] = {0, 0, 0};  // rows, columns, axis
  Activation activation = Activation::silu;
  bool gated = true;
  bool inner_norm_tokens = false;  // the inner norm is in the MLP over T too
  bool norm_of_product = false;    // the inner norm: sigmoid(g) norm(g u)
  int conv = 0;                    // width
  bool conv_of_gate_up = false;    // else of the middle
  float dropout = 0.f, drop_path = 0.f;
  bool key_padding = false;  // keys of Recursion::key_mask are not seen

  bool pre_normed() const { return placement != Placement::post; }
  // Tokens of a line that attention runs over.
  int line(int tokens) const { return axial[0] ? axial[axial[2]] : tokens; }
};

// The matrices of a block; those of TRM and HRM have the first four.
enum BlockWeight { mixer_in, mixer_out, gate_up, down, attn_gate, matrices_per_block };
constexpr int weights_per_block = 4;  // of TRM and HRM

// Its vectors, fp32, padded with zeros: the bias of each matrix, then these.
enum BlockVector {
  norm1 = matrices_per_block,
  norm1_bias,
  out_norm1,
  out_norm1_bias,
  scale1,
  skip1,
  norm2,
  norm2_bias,
  out_norm2,
  out_norm2_bias,
  scale2,
  skip2,
  q_norm,
  k_norm,
  attn_norm,
  inner_norm,
  t_inner_norm,
  conv,
  conv_bias,
  vectors_per_block
};

// Both in one list, as the gradients of a window are: matrices, then vectors.
constexpr int slots_per_block = matrices_per_block + vectors_per_block;

// What a vector holds: `halves` of `width` channels, `taps` values each.
struct VectorSize {
  int width, halves = 1, taps = 1;
  int count() const { return width * halves * taps; }
};

}  // namespace rx::cpu
