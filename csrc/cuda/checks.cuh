// checks.cuh - what every recursion kernel asks of a recursion before it is launched: host code.
//
// Python has checked shapes and alignment (recurx/backends/cuda_launch.py); this is what would hang
// a kernel or make it overrun a table, whoever calls the C interface.
#pragma once
#include <string>

#include "rx/launch.cuh"

namespace rx {

inline std::string count_of(int64_t n, const char* what, int64_t most) {
  return std::to_string(n) + " " + what + "; 1 to " + std::to_string(most) + " are supported";
}

// Why no kernel runs a block; "" if one may.
inline std::string why_not(const RxBlock& b, int hidden) {
  if (b.inner < 1) return "a block has inner width " + std::to_string(b.inner);
  if (b.token_mlp)
    return b.token_inner < 1 ? "a token-MLP has inner width " + std::to_string(b.token_inner) : "";
  if (b.heads < 1 || hidden % b.heads)
    return std::to_string(b.heads) + " heads of D=" + std::to_string(hidden) +
           "; it must be a multiple of them";
  return "";
}

// Calls visit(block) for every block of every net until it gives a reason.
template <class Visit>
std::string first_reason(const RxRecursion& r, Visit visit) {
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const std::string why = visit(r.nets[n].blocks[b]);
      if (!why.empty()) return why;
    }
  return "";
}

// Why no kernel runs a recursion; "" if one may.
inline std::string why_not(const RxRecursion& r) {
  if (r.batch < 1) return "batch is " + std::to_string(r.batch);
  if (r.tokens < 1) return "T=" + std::to_string(r.tokens);
  if (r.num_calls < 0) return std::to_string(r.num_calls) + " calls";
  if (r.num_nets < 1 || r.num_nets > kRxMaxNets) return count_of(r.num_nets, "nets", kRxMaxNets);
  if (r.num_states < 1 || r.num_states > kRxMaxStates)
    return count_of(r.num_states, "states", kRxMaxStates);
  for (int n = 0; n < r.num_nets; n++)
    if (r.nets[n].num_blocks < 1 || r.nets[n].num_blocks > kRxMaxBlocks)
      return count_of(r.nets[n].num_blocks, "blocks in a net", kRxMaxBlocks);
  return first_reason(r, [&](const RxBlock& b) { return why_not(b, r.hidden); });
}

// Reports why `family` does not run something.
inline int refuse(const char* family, const std::string& why) {
  return fail(kRxInvalidShape, std::string(family) + ": " + why);
}

// 0, or a refusal that says which scratch is needed.
inline int check_scratch(const char* family, const RxRecursion& r, int64_t need) {
  if (r.scratch_bytes >= need) return 0;
  return refuse(family, "scratch has " + std::to_string(r.scratch_bytes) + " bytes, needs " +
                            std::to_string(need));
}

}  // namespace rx
