// Chooses the engine for this machine, and deals samples out to threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pool.hpp"
#include "types.hpp"

namespace rx::cpu {

// What this processor, its operating system and this build have, slowest first:
// portable, avx2, avx512, avx512_bf16, amx, amx_split; on aarch64 portable, neon, neon_bf16,
// neon_bfmmla.
std::vector<std::string> usable_isas();

// The best usable one, or the one that RECURX_CPU_ISA names; throws std::runtime_error if that is
// unknown or cannot run here.
std::string chosen_isa();

// The best of `names`, slowest first, whose last ones, one for each of `gains`, are measured: cores
// of pairs of bf16 (AVX512_BF16, BFDOT, BFMMLA), or amx_split's fp32, with products so many times
// as fast as those by FMA. Each core of pairs has an instruction of twice the work of the one
// before: processors that start as many of them are at 2, those with half as many ports for them at
// 1. The limit is half way, beyond the reach of a noisy measurement, since the same machine must
// always answer the same.
constexpr double kLeastGain = 1.4;
std::string best_isa(const std::vector<std::string>& names, const std::vector<double>& gains);

// Those gains, measured once in a process (a millisecond); none where the best one is none of them.
const std::vector<double>& isa_gains();

// Whether products of int8 run by an instruction (vpdpbusd, tdpbusd) with the engine of that name;
// else by plain code, slower than those of bf16.
bool has_int8(const std::string& isa);

// The engine of fp32 of that name.
const Engine& fp32_engine(const std::string& isa);

// One step of AdamATan2 on many tensors, by up to `threads` threads where there is enough to do;
// bits do not depend on their number. Weights that share memory move one after the other.
void adam_atan2(const Engine& engine, const AdamRates& by, const std::vector<AdamTensor>& tensors,
                int threads);

// A net packed for one instruction set and one state type; with weights of int8, for products of
// int8.
class Packed {
 public:
  // `weights` holds weights_per_block for each shape; not kept.
  Packed(const std::vector<BlockShape>& shapes, const std::vector<RawWeight>& weights, Dtype state,
         const std::string& isa);
  // `weights` of a block each, of a variant too.
  Packed(const std::vector<BlockShape>& shapes, const std::vector<RawBlock>& weights, Dtype state,
         const std::string& isa);
  PackedNet view() const { return {blocks_.data(), (int)blocks_.size()}; }
  const Engine& engine() const { return *engine_; }
  size_t bytes() const { return bytes_; }
  // Where each weight of `BlockSpec.slots` is among slots_per_block of each block.
  std::vector<int> slots;

 private:
  const Engine* engine_;
  size_t bytes_ = 0;
  std::unique_ptr<void, void (*)(void*)> memory_;
  std::vector<PackedBlock> blocks_;
  std::vector<std::vector<float>> vectors_;
};

// A vector of a variant as its engine reads it: fp32, padded with zeros, a bias of pairs and a
// convolution of them in halves, residual scales with their constant, taps before channels.
std::vector<float> pack_vector(const BlockShape& shape, int which, const RawWeight& raw);

constexpr int kMostThreads = 1024;

// Throw std::invalid_argument for what no engine runs: sizes of zero, or too large, or that do not
// belong together, and steps that name what is not there.
void check(const BlockShape& shape, bool int8 = false);
void check(const BlockShape& shape, const RawBlock& weights);
void check(const Engine& engine, const Recursion& recursion, int threads);

// Runs the whole recursion on `threads` threads. Bit-equal for any number of threads. The calling
// thread asks `wanted` every 50 ms whether to stop; if so all leave within a block and it returns
// false, with nothing of use in the outputs. `wanted` may itself run recursions.
bool run(const Engine& engine, const Recursion& recursion, int threads, bool (*wanted)() = nullptr);

// Rows of a queue, each refined until it halts; see solve.cpp.
struct Solving {
  int rows, max_steps;
  // Halting: by q_halt > (q_continue or 0) + above, by an answer that stays the same, or neither.
  bool by_q, against_continue, by_answer;
  float above;
  int patience;
  float sigma;  // of the noise on state `output` before each step
  uint64_t seed;
  const int64_t* numbers;    // [rows]: each one's place in the stream of noise
  const void* x;             // [rows, T, D]
  const void* const* start;  // [num_states], [0] unused: of [T, D], or [rows, T, D] if `start_each`
  bool start_each;
  int output, prefix, vocab;     // the state that the heads read, tokens before the answer
  const void *lm_head, *q_head;  // [vocab, D]; [2, D]: q_halt, q_continue
  float q_bias[2];
  // Out; A = T - prefix.
  int64_t* steps;    // [rows]
  bool* halted;      // [rows]
  void* final;       // [rows, T, D]: state `output` after a row's last step
  int64_t* answers;  // [rows, A]: of the last step; read if `by_answer` or `trace`
  int64_t* trace;    // [max_steps, rows, A] or null; a step after the row's last is left as it is
  std::atomic<int>* done;  // rows that ended so far
};

// Every thread keeps a group of rows and takes the next one of the queue when a row ends. `step` is
// one supervision step; its batch and its states are not read. Each row's answer is that of `run`
// called once a step, whoever had it, bit for bit. False if `wanted` said to stop.
bool solve(const Engine& engine, const Recursion& step, const Solving& how, int threads,
           bool (*wanted)() = nullptr);

// Runs a window forward or backward, all threads as one team. Bit-equal for any number of them;
// false as `run`.
bool run_window(const Engine& engine, const Window& window, bool backward, int threads,
                bool (*wanted)() = nullptr);

// What a window keeps of one sample for one call of a block, beside the call's result.
KeptSize kept_of_block(const BlockShape& shape, int tokens, Save save);

// Asks for huge pages inside memory that somebody else allocated and nobody touched yet: the first
// touch of small ones took a quarter of a window's forward. Seconds that the first byte took.
double on_huge_pages(void* data, size_t bytes);

void* allocate(size_t bytes);  // zeroed, aligned; release with std::free

// Seconds that all threads together spent in each phase since the last reset; measured while on.
void set_profiling(bool on);
std::vector<double> phase_seconds();

// Bytes of scratch that the engine holds on to between calls.
size_t scratch_held();

// `parallel`, when no recursion and no other caller has the threads; at once for a single one.
void alone(int threads, Work work, void* context);

}  // namespace rx::cpu
