// What an engine can run at all. The Python side refuses more kindly; these keep a caller that it
// let through, or that came without it, from a division by zero or a product that overflows.
#include <algorithm>
#include <stdexcept>

#include "dispatch.hpp"

namespace rx::cpu {
namespace {

constexpr int kMostWidth = 1 << 20;             // of D, F, heads x head_dim and the token MLP
constexpr int kMostHeadDim = 128;               // scores of the engines' attention
constexpr long long kMostElements = 1ll << 30;  // of one group's rows in its widest matrix

void require(bool holds, const std::string& expected) {
  if (!holds) throw std::invalid_argument("recurx cpu engine: expected " + expected);
}

void within(const char* name, long long value, long long least, long long most) {
  require(least <= value && value <= most, std::string(name) + " from " + std::to_string(least) +
                                               " to " + std::to_string(most) + ", got " +
                                               std::to_string(value));
}

void check_states(const int* states, int count, int num_states) {
  for (int i = 0; i < count; ++i) within("a state that is read", states[i], 0, num_states - 1);
}

void check_variant(const BlockShape& s) {
  const Variant& v = s.variant;
  require(s.token_mlp == (v.kind == Kind::token_mlp), "a variant's kind twice the same");
  within("K/V heads", v.kv_heads, 0, kMostWidth);
  require(!v.kv_heads || s.heads % v.kv_heads == 0, "K/V heads that divide the heads");
  within("a prefix", v.prefix, 0, INT32_MAX / 2);
  within("a window", v.window, 0, INT32_MAX / 2);
  within("the width of a convolution", v.conv, 0, kMostWidth);
  within("the rows of a grid", v.axial[0], 0, kMostWidth);
  within("the columns of a grid", v.axial[1], v.axial[0] ? 1 : 0, kMostWidth);
  within("the axis of a grid", v.axial[2], 0, 1);
  for (float share : {v.dropout, v.drop_path})
    require(share >= 0.f && share < 1.f, "a share that is dropped, from 0 to below 1");
  require(!(v.scale_each || v.skip_each) || v.kind != Kind::token_mlp || v.token_norm_hidden,
          "one residual scale where a sublayer runs over the tokens");
}

}  // namespace

void check(const BlockShape& s, bool int8) {
  const Variant& v = s.variant;
  within("D", s.hidden, 32, kMostWidth);
  require(s.hidden % 32 == 0, "D a multiple of 32, got " + std::to_string(s.hidden));
  if (!v.on || v.kind != Kind::norm) within("F", s.inner, 1, kMostWidth);
  require(s.eps >= 0, "eps >= 0");
  if (int8) {
    require(!v.on, "a block of TRM or HRM for products of int8");
    const int mixed = s.token_mlp ? std::max(s.tokens, s.token_inner) : 0;
    within("the depth of an int8 product, whose sum is an int32",
           std::max({s.hidden, s.inner, mixed}), 1, kMostInt8Depth);
  }
  if (v.on) check_variant(s);
  if (v.on && v.kind >= Kind::none) return;
  if (s.token_mlp) {
    within("T of a token MLP", s.tokens, 1, kMostWidth);
    within("the inner width of a token MLP", s.token_inner, 1, kMostWidth);
  } else {
    within("head_dim", s.head_dim, 16, kMostHeadDim);
    require(s.head_dim % 16 == 0, "head_dim a multiple of 16, got " + std::to_string(s.head_dim));
    within("heads", s.heads, 1, kMostWidth);
    const long long wide = (long long)s.heads * s.head_dim;
    require(v.on ? wide <= kMostWidth : wide == s.hidden, "heads * head_dim = D");
  }
}

void check(const BlockShape& s, const RawBlock& weights) {
  const Variant& v = s.variant;
  const bool mixes = !v.on || v.kind < Kind::none, has_mlp = !v.on || v.kind != Kind::norm;
  for (int i = 0; i < matrices_per_block; ++i) {
    const bool wanted = i == attn_gate ? v.on && v.attn_gate : i < gate_up ? mixes : has_mlp;
    require(wanted == (weights.matrix[i].data != nullptr), "the matrices that a block has");
  }
  for (int i : {conv, conv_bias})
    require((v.on && v.conv) == (weights.vector[i].data != nullptr),
            "the weights of a convolution");
}

void check(const Engine& engine, const Recursion& r, int threads) {
  within("threads", threads, 1, kMostThreads);
  within("B", r.batch, 0, INT32_MAX);
  within("T", r.tokens, 1, kMostWidth);
  within("D", r.hidden, 32, kMostWidth);
  long long widest = r.hidden;
  for (int n = 0; n < r.num_nets; ++n) {
    require(r.nets[n].num_blocks > 0, "a block or more in every net");
    for (int i = 0; i < r.nets[n].num_blocks; ++i) {
      const BlockShape& s = r.nets[n].blocks[i].shape;
      require(s.hidden == r.hidden, "nets of the states' D");
      require(!s.token_mlp || s.tokens == r.tokens, "token MLPs of the states' T");
      require(!s.variant.key_padding || r.key_mask || !r.batch,
              "a mask of the keys that are padding");
      const int* grid = s.variant.axial;
      require(!grid[0] || (long long)grid[0] * grid[1] == r.tokens, "a grid of the states' T");
      widest = std::max({widest, (long long)s.inner, (long long)(s.token_mlp ? s.token_inner : 0),
                         (long long)s.heads * s.head_dim});
    }
  }
  // Groups have engine.group_rows rows, or those of one sample; 256 more cover the tiles' ends.
  within("elements a group", widest * (std::max(engine.group_rows, r.tokens) + 256), 1,
         kMostElements);
  within("bytes a state", (long long)r.batch * r.tokens, 0, INT64_MAX / 8 / r.hidden);
  for (int i = 0; i < r.num_steps; ++i) {
    const Step& step = r.steps[i];
    within("the net of a step", step.net, 0, r.num_nets - 1);
    within("the state that a step writes", step.write, 1, r.num_states - 1);
    within("the states that a step sums", step.num_state, 1, INT32_MAX);
    check_states(step.state, step.num_state, r.num_states);
    check_states(step.inject, step.num_inject, r.num_states);
  }
}

}  // namespace rx::cpu
