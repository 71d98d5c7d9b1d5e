// Nets and steps as Python spells them: sizes, the fields of variants and their weights by name,
// which throw where they are not known.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.hpp"

namespace rx::cpu {

namespace py = pybind11;

[[noreturn]] inline void unknown(const std::string& what, const std::string& got) {
  throw std::invalid_argument("recurx cpu engine: does not know " + what + " '" + got + "'");
}

// The number of `value` in a list of names.
template <class Choice>
Choice chosen(const std::string& field, const py::handle& value,
              const std::vector<std::string>& names) {
  const std::string name = value.cast<std::string>();
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return (Choice)i;
  unknown(field, name);
}

// Fields in which a block differs from those of TRM and HRM (`BlockSpec.changed`), by name.
inline void set_fields(BlockShape& shape, const py::dict& fields) {
  Variant& v = shape.variant;
  v.on = fields.size() > 0;
  if (v.on && shape.token_mlp) v.kind = Kind::token_mlp;
  const std::vector<std::string> norms = {"", "rms", "layer"};
  for (const auto& [key, value] : fields) {
    const std::string name = key.cast<std::string>();
    const auto whole = [&, &value = value] { return value.cast<int>(); };
    const auto truth = [&, &value = value] { return value.cast<bool>(); };
    const auto text = [&, &value = value] { return value.cast<std::string>(); };
    if (name == "kind") {
      v.kind = chosen<Kind>(name, value, {"attention", "token_mlp", "none", "norm"});
    } else if (name == "norm") {
      v.norm = chosen<Norm>(name, value, norms);
    } else if (name == "norm_weight" || name == "norm_bias" || name == "biases" ||
               name == "qk_norm_weight" || name == "attn_norm_weight" ||
               name == "inner_norm_weight" || name == "head_size") {
      // These say which weights there are, or what head_dim is.
    } else if (name == "placement") {
      v.placement = chosen<Placement>(name, value, {"post", "pre", "sandwich"});
    } else if (name == "token_norm") {
      v.token_norm_hidden = chosen<int>(name, value, {"tokens", "hidden"}) == 1;
    } else if (name == "residual_scale") {
      v.residual_scale = value.cast<float>();
    } else if (name == "learned_scale") {
      v.scale_each = chosen<int>(name, value, {"", "scalar", "channel"}) == 2;
    } else if (name == "skip_scale") {
      v.skip_scale = value.cast<float>();
    } else if (name == "learned_skip") {
      v.skip_each = chosen<int>(name, value, {"", "scalar", "channel"}) == 2;
    } else if (name == "kv_heads") {
      v.kv_heads = whole();
    } else if (name == "mask") {
      v.causal = chosen<int>(name, value, {"", "causal", "prefix"}) > 0;
    } else if (name == "prefix") {
      v.prefix = whole();
    } else if (name == "window") {
      v.window = whole();
    } else if (name == "qk_norm") {
      v.qk_norm = chosen<Norm>(name, value, norms);
    } else if (name == "attn_gate") {
      v.attn_gate = truth();
    } else if (name == "attn_norm") {
      v.attn_norm = chosen<Norm>(name, value, norms);
    } else if (name == "axial") {
      const auto grid = value.cast<std::vector<int>>();
      for (size_t i = 0; i < grid.size() && i < 3; ++i) v.axial[i] = grid[i];
    } else if (name == "activation") {
      v.activation = chosen<Activation>(name, value,
                                        {"silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"});
    } else if (name == "gated") {
      v.gated = truth();
    } else if (name == "inner_norm") {
      v.inner_norm = chosen<Norm>(name, value, norms);
    } else if (name == "inner_norm_tokens") {
      v.inner_norm_tokens = truth();
    } else if (name == "inner_norm_of") {
      v.norm_of_product = chosen<int>(name, value, {"middle", "product"}) == 1;
    } else if (name == "conv") {
      v.conv = whole();
    } else if (name == "conv_of") {
      v.conv_of_gate_up = chosen<int>(name, value, {"middle", "gate_up"}) == 1;
    } else if (name == "dropout") {
      v.dropout = value.cast<float>();
    } else if (name == "drop_path") {
      v.drop_path = value.cast<float>();
    } else if (name == "key_padding") {
      v.key_padding = truth();
    } else if (name == "conv_dtype") {
      text();  // that of the states, as recurx/backends/cpu.py checks
    } else {
      unknown("the field of a block", name);
    }
  }
  if (v.on) shape.token_mlp = v.kind == Kind::token_mlp;
  if (v.on && v.prefix && !v.causal) unknown("a prefix without a mask", std::to_string(v.prefix));
}

inline const std::map<std::string, int> matrices = {
    {"qkv", mixer_in},    {"t_gate_up", mixer_in}, {"o", mixer_out},        {"t_down", mixer_out},
    {"gate_up", gate_up}, {"down", down},          {"attn_gate", attn_gate}};
inline const std::map<std::string, int> vectors = {{"norm1", norm1},
                                                   {"norm1_bias", norm1_bias},
                                                   {"out_norm1", out_norm1},
                                                   {"out_norm1_bias", out_norm1_bias},
                                                   {"scale1", scale1},
                                                   {"skip1", skip1},
                                                   {"norm2", norm2},
                                                   {"norm2_bias", norm2_bias},
                                                   {"out_norm2", out_norm2},
                                                   {"out_norm2_bias", out_norm2_bias},
                                                   {"scale2", scale2},
                                                   {"skip2", skip2},
                                                   {"q_norm", q_norm},
                                                   {"k_norm", k_norm},
                                                   {"attn_norm", attn_norm},
                                                   {"inner_norm", inner_norm},
                                                   {"t_inner_norm", t_inner_norm},
                                                   {"conv", conv},
                                                   {"conv_bias", conv_bias}};

// Where the weight of that name in `BlockSpec.slots` belongs among slots_per_block.
inline int slot_of(const std::string& name) {
  const auto matrix = matrices.find(name), vector = vectors.find(name);
  if (matrix != matrices.end()) return matrix->second;
  if (vector != vectors.end()) return matrices_per_block + vector->second;
  const size_t stem = name.rfind("_bias");
  const auto biased = matrices.find(name.substr(0, stem));
  if (stem == std::string::npos || biased == matrices.end()) unknown("the weight", name);
  return matrices_per_block + biased->second;
}

// (token_mlp, hidden, inner, heads, head_dim, tokens, token_inner, eps)
using BlockTuple = std::tuple<bool, int, int, int, int, int, int, float>;
using WeightTuple = std::tuple<uintptr_t, bool>;  // pointer, is bf16
inline BlockShape shape_of(const BlockTuple& block) {
  const auto [token_mlp, hidden, inner, heads, head_dim, tokens, token_inner, eps] = block;
  return {token_mlp, hidden, inner, heads, head_dim, tokens, token_inner, eps};
}

// Values and floats that a window keeps of a sample for each call of a block.
inline std::tuple<size_t, size_t> kept_of(const BlockTuple& block, const py::dict& fields,
                                          int tokens, int save) {
  BlockShape shape = shape_of(block);
  set_fields(shape, fields);
  check(shape);
  const KeptSize size = kept_of_block(shape, tokens, (Save)save);
  return {size.values, size.floats};
}

using VariantTuple = std::tuple<py::dict, std::vector<std::string>>;

inline Dtype dtype_of(bool is_bf16) { return is_bf16 ? Dtype::bf16 : Dtype::f32; }

inline std::unique_ptr<Packed> pack(const std::vector<BlockTuple>& blocks,
                                    const std::vector<WeightTuple>& weights, bool bf16_states,
                                    const std::string& isa, const std::vector<uintptr_t>& scales,
                                    const std::vector<VariantTuple>& variants) {
  std::vector<BlockShape> shapes;
  for (const BlockTuple& block : blocks) shapes.push_back(shape_of(block));
  std::vector<RawWeight> raw;
  for (const auto& [pointer, is_bf16] : weights)
    raw.push_back({(const void*)pointer, dtype_of(is_bf16)});
  const size_t count = blocks.size() * weights_per_block;
  if ((variants.empty() && raw.size() != count) || (!scales.empty() && scales.size() != count))
    throw std::invalid_argument("cpu_pack: expected four weights a block, and scales for all");
  for (size_t i = 0; i < scales.size(); ++i)
    raw[i].dtype = Dtype::int8, raw[i].scales = (const float*)scales[i];
  std::vector<RawBlock> in_blocks(shapes.size());
  std::vector<int> slots;
  size_t at = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const int first = (int)i * slots_per_block;
    if (variants.empty()) {
      for (int which = 0; which < weights_per_block; ++which) {
        in_blocks[i].matrix[which] = raw[at++];
        slots.push_back(first + which);
      }
      continue;
    }
    if (variants.size() != shapes.size())
      throw std::invalid_argument("cpu_pack: expected a variant for each block or for none");
    const auto& [fields, names] = variants[i];
    set_fields(shapes[i], fields);
    for (const std::string& name : names) {
      if (at == raw.size()) throw std::invalid_argument("cpu_pack: expected a weight a name");
      const int slot = slot_of(name), vector = slot - matrices_per_block;
      (vector < 0 ? in_blocks[i].matrix[slot] : in_blocks[i].vector[vector]) = raw[at++];
      slots.push_back(first + slot);
    }
  }
  py::gil_scoped_release release;
  auto packed = std::make_unique<Packed>(shapes, in_blocks, dtype_of(bf16_states), isa);
  packed->slots = std::move(slots);
  return packed;
}

// The weights of packed nets and where their gradients go, slots_per_block a block; null where a
// block has none.
struct Gradients {
  std::vector<RawWeight> weights;
  std::vector<float*> gradients;

  Gradients(const std::vector<const Packed*>& nets, const std::vector<WeightTuple>& given,
            const std::vector<uintptr_t>& into) {
    size_t at = 0, first = 0;
    for (const Packed* net : nets) at += net->slots.size(), first += net->view().num_blocks;
    if (given.size() != at || into.size() != at)
      throw std::invalid_argument("cpu_window_backward: expected the weights of all blocks");
    weights.resize(first * slots_per_block);
    gradients.resize(first * slots_per_block);
    at = first = 0;
    for (const Packed* net : nets) {
      for (const int slot : net->slots) {
        const auto [pointer, is_bf16] = given[at];
        weights[first + slot] = {(const void*)pointer, dtype_of(is_bf16)};
        gradients[first + slot] = (float*)into[at++];
      }
      first += net->view().num_blocks * slots_per_block;
    }
  }
};

using StepTuple = std::tuple<int, int, std::vector<int>, std::vector<int>, int>;
using FactorTuple = std::tuple<float, float, float, float, int>;

// The steps of a recursion, translated once. The steps point into `reads`.
struct Program {
  std::vector<int> reads;
  std::vector<Step> steps;

  Program(const std::vector<StepTuple>& given, const std::vector<FactorTuple>& factors) {
    if (!factors.empty() && factors.size() != given.size())
      throw std::invalid_argument("Program: expected factors for each step or for none");
    size_t total = 0;
    for (const auto& [net, write, state, inject, sum] : given)
      total += state.size() + inject.size();
    reads.reserve(total);
    for (const auto& [net, write, state, inject, sum] : given) {
      const int* at = reads.data() + reads.size();
      reads.insert(reads.end(), state.begin(), state.end());
      reads.insert(reads.end(), inject.begin(), inject.end());
      steps.push_back(
          {net, write, (int)state.size(), (int)inject.size(), at, at + state.size(), (Sum)sum});
    }
    for (size_t i = 0; i < factors.size(); ++i) {
      Step& step = steps[i];
      std::tie(step.keep, step.share, step.scale, step.noise, step.number) = factors[i];
    }
  }
  Program(const Program&) = delete;
};

// What is read beside the states: the seed of noise and dropout and the number of the first sample,
// a mask of keys [B, T] or 0, learned factors.
// The step, whether its scale, [D] floats, and [D] more that a window adds the gradient to, or 0.
using LearnedTuple = std::tuple<int, bool, uintptr_t, uintptr_t>;
using BesideTuple = std::tuple<uint64_t, long, uintptr_t, std::vector<LearnedTuple>>;

}  // namespace rx::cpu
