// What the Python side hands to an engine: plain data, the same for every instruction set.
//
// Letters: B batch, T tokens, D hidden, H heads, F inner width of the SwiGLU over D.
#pragma once

#include <cstddef>
#include <cstdint>

#include "variant.hpp"

namespace rx::cpu {

enum class Dtype { f32, bf16, int8 };

struct BlockShape {
  bool token_mlp;   // else attention
  int hidden;       // D, a multiple of 32
  int inner;        // F
  int heads;        // attention only
  int head_dim;     // attention only, a multiple of 16
  int tokens;       // token MLP only: the T it is built for
  int token_inner;  // token MLP only: inner width of the SwiGLU over T
  float eps;
  Variant variant{};
};

// One weight as PyTorch holds it: row-major [out, in].
struct RawWeight {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  const float* scales = nullptr;  // [out], of int8: the weight is data * scales
};

// The weights of a block; data is null where it has none.
struct RawBlock {
  RawWeight matrix[matrices_per_block];
  RawWeight vector[vectors_per_block];
};

struct PackedBlock {
  BlockShape shape;
  const void* weight[matrices_per_block] = {};  // panels, in the layout of one engine, or null
  const float* vector[vectors_per_block] = {};  // of a variant, or null
};

VectorSize size_of_vector(const BlockShape& shape, int which);  // as PyTorch holds it

struct PackedNet {
  const PackedBlock* blocks;
  int num_blocks;
};

// What becomes of the sum over the injected states: recurx/program.py decides which are shared.
enum class Sum : int { own, formed, kept };  // of this step alone; formed and kept; kept earlier

// write <- keep * write + share * N_net( scale * sum(state) + (sum(inject)) ) + noise * normals;
// state 0 is x, which no step writes.
struct Step {
  int net, write;
  int num_state, num_inject;
  const int* state;
  const int* inject;
  Sum sum = Sum::own;
  float keep = 0.f, share = 1.f, scale = 1.f, noise = 0.f;
  int number = 0;  // of the call in the whole schedule, which noise and dropout count
  const float *share_each = nullptr, *scale_each = nullptr;  // [D] instead, where it is learned
  float *d_share = nullptr, *d_scale = nullptr;  // [D]: what a window adds their gradients to
};

struct Recursion {
  int batch, tokens, hidden;
  int num_states;         // x included
  const void* const* in;  // [num_states] of [B, T, D] in the engine's state type
  void* const* out;       // [num_states], out[0] unused
  int num_steps;
  const Step* steps;
  int num_nets;
  const PackedNet* nets;
  const float* cos;  // [T, head_dim] or null; T of a line, where attention is axial
  const float* sin;
  uint64_t seed = 0;  // of noise and dropout, which sample i of the batch has as entry first + i
  long first = 0;
  const uint8_t* key_mask = nullptr;  // [B, T]: not 0 for keys that key_padding blocks do not see
};

// What a window keeps for its backward, see backward/kept.hpp.
enum class Save : int { all, block, states };

// The differentiable calls of a recursion. Lists of states have x first, those of weights are flat,
// net after net, block after block, slots_per_block each.
struct Window {
  Recursion rec;  // `in` is what entered; `out` what leaves, of the forward only
  Save save;
  void* kept;  // values of the states' type
  float* kept_floats;
  // of the backward
  const RawWeight* weights;
  const void* const* d_out;  // null for zero
  void* const* d_in;         // null where not wanted, like d_weights
  float* const* d_weights;
};

struct KeptSize {  // of one sample
  size_t values = 0, floats = 0;
};

struct Team;  // threads that share the samples of a group; see pool.hpp

// The window of an engine; its functions are called by every thread of one team.
struct WindowEngine {
  KeptSize (*kept_size)(const Recursion&, Save);
  size_t (*scratch_bytes)(const Window&, int threads, bool backward);
  void (*forward)(const Window&, const Team&, void* scratch);
  void (*backward)(const Window&, const Team&, void* scratch);
};

// A tensor of an AdamATan2 step: its gradient, its means, and 1 - beta^steps of either.
struct AdamTensor {
  float* weight;
  const float* gradient;
  float *mean, *square;
  long count;
  float mean_by, square_by;
};

// w <- keep w - lr atan2(m / mean_by, sqrt(v / square_by)), after m moved to the gradient by
// mean_share, and v <- square_keep v + square_share g^2.
struct AdamRates {
  float lr, keep, mean_share, square_keep, square_share;
};

// One instruction set and one state type. The functions live in engine_<isa>.cpp.
struct Engine {
  int group_rows;   // rows (samples x T) that one thread takes at once, if it can have so many
  int state_bytes;  // of one value of a state
  size_t (*packed_bytes)(const BlockShape&);
  void (*pack)(const BlockShape&, const RawWeight* weights, void* out, PackedBlock* packed);
  size_t (*scratch_bytes)(const Recursion&, int samples, int team_size);
  // Called by every thread of a team. `scratch` is 64-byte aligned and was zero when allocated.
  void (*run_group)(const Recursion&, const Team&, int first_sample, int samples, void* scratch);
  // row . weight + bias of `width` values of the state's type, rounded to that type.
  float (*head)(const void* row, const void* weight, int width, float bias);
  // state <- state + (sigma * noise), both rounded to the state's type.
  void (*add_noise)(void* state, const float* noise, float sigma, long count);
  void (*adam_atan2)(const AdamRates&, const AdamTensor&, long begin, long end);
  // A small product, to compare engines by; `scratch` of kSampleBytes, aligned and zero.
  void (*sample_product)(void* scratch, int columns);
  WindowEngine window;  // null for int8
};

// A sum of this many products of codes in [-127, 127] fits an int32, whatever the codes are.
// (Partial sums with the 128 of csrc/cpu/gemm_int8.hpp may wrap, which changes nothing: none
// saturates.)
constexpr int kMostInt8Depth = 0x7fffffff / (127 * 127);

constexpr size_t kSampleBytes = 2 << 20;  // for 256 columns

}  // namespace rx::cpu
