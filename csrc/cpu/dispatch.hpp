// Chooses the engine for this machine, and deals samples out to threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pool.hpp"
#include "types.hpp"

namespace rx::cpu {

// What this processor, its operating system and this build have, slowest first:
// portable, avx2, avx512, avx512_bf16, amx; on aarch64 portable, neon, neon_bf16.
std::vector<std::string> usable_isas();

// The best usable one, or the one that RECURX_CPU_ISA names; throws std::runtime_error if that is
// unknown or cannot run here.
std::string chosen_isa();

// The best of `names` where products of pairs of bf16 (AVX512_BF16, BFDOT) run `gain` times as fast
// as those by FMA. An instruction does twice the work: processors that start as many of them are at
// 2, those with half as many ports for them at 1. The limit is half way, beyond the reach of a
// noisy measurement, since the same machine must always answer the same.
constexpr double kLeastDotGain = 1.4;
std::string best_isa(const std::vector<std::string>& names, double gain);

// That gain, measured once in a process (a millisecond); 0 where the best one is no such core.
double dot_gain();

// A net packed for one instruction set and one state type.
class Packed {
 public:
  // `weights` holds weights_per_block for each shape; not kept.
  Packed(const std::vector<BlockShape>& shapes, const std::vector<RawWeight>& weights, Dtype state,
         const std::string& isa);
  PackedNet view() const { return {blocks_.data(), (int)blocks_.size()}; }
  const Engine& engine() const { return *engine_; }
  size_t bytes() const { return bytes_; }

 private:
  const Engine* engine_;
  size_t bytes_ = 0;
  std::unique_ptr<void, void (*)(void*)> memory_;
  std::vector<PackedBlock> blocks_;
};

// Runs the whole recursion on `threads` threads. Bit-equal for any number of threads.
void run(const Engine& engine, const Recursion& recursion, int threads);

void* allocate(size_t bytes);  // zeroed, aligned; release with std::free

// Seconds that all threads together spent in each phase since the last reset; measured while on.
void set_profiling(bool on);
std::vector<double> phase_seconds();

// Bytes of scratch that the engine holds on to between calls.
size_t scratch_held();

// A hash of a few hundred elements of each tensor, to notice weights that changed unannounced.
struct Span {
  const void* data;
  size_t bytes;
};
uint64_t fingerprint(const std::vector<Span>& tensors);

}  // namespace rx::cpu
