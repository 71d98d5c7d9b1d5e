// launch.cu - host side: check what would hang or overrun, clear the barrier, launch.
#include "kernel.cuh"

#include "../rx/launch.cuh"

namespace grid_sm80 {

static int refuse(const std::string& why) { return rx::fail(kRxInvalidShape, "grid_sm80: " + why); }

static std::string why_not(const RxBlock& b, const RxRecursion& r) {
  if (b.inner < 1) return "a block has inner width " + std::to_string(b.inner);
  if (b.token_mlp)
    return b.token_inner < 1 ? "a token-MLP has inner width " + std::to_string(b.token_inner) : "";
  const bool divides = b.heads > 0 && r.hidden % b.heads == 0;
  if (!divides || r.hidden / b.heads % 16 || r.hidden / b.heads > kMaxHeadDim)
    return std::to_string(b.heads) + " heads of D=" + std::to_string(r.hidden) +
           "; the width of a head must be 16, 32, 48, .. or 128";
  return "";
}

static std::string why_not(const RxRecursion& r) {
  if (r.batch < 1) return "batch is " + std::to_string(r.batch);
  if (r.tokens < 1 || r.tokens > kMaxKeyTiles * 16)
    return "T=" + std::to_string(r.tokens) + "; 1 to 128 tokens are supported";
  if (r.hidden < 32 || r.hidden % 32 || r.hidden > kWarps * kRowWarpTiles * 16)
    return "D=" + std::to_string(r.hidden) + "; multiples of 32 up to 512 are supported";
  if (r.num_nets < 1 || r.num_nets > kRxMaxNets) return std::to_string(r.num_nets) + " nets";
  if (r.num_states < 1 || r.num_states > kRxMaxStates)
    return std::to_string(r.num_states) + " states; 1 to 8 are supported";
  for (int n = 0; n < r.num_nets; n++) {
    if (r.nets[n].num_blocks < 1 || r.nets[n].num_blocks > kRxMaxBlocks)
      return std::to_string(r.nets[n].num_blocks) + " blocks in a net; 1 to 8 are supported";
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const std::string why = why_not(r.nets[n].blocks[b], r);
      if (!why.empty()) return why;
    }
  }
  return "";
}

static std::string why_not(const RxGridPlan& plan, const RxRecursion& r) {
  if (plan.ctas < 1) return "the plan has " + std::to_string(plan.ctas) + " CTAs";
  for (int slot = 0; slot < kSlots; slot++) {
    const int groups = plan.row_groups[slot], splits = plan.k_splits[slot];
    if (groups < 1 || groups > plan.ctas)
      return std::to_string(groups) + " row groups for " + std::to_string(plan.ctas) + " CTAs";
    if (splits != 1 && splits != 2 && splits != 4 && splits != 8)
      return "k_splits is " + std::to_string(splits) + "; 1, 2, 4 and 8 are supported";
  }
  const uint32_t least = shared_of(r, plan).weights;
  if (plan.shared_bytes < int(least) || plan.shared_bytes > int(rx::kMaxSharedSm90))
    return "the plan has " + std::to_string(plan.shared_bytes) + " bytes of shared memory; " +
           std::to_string(least) + " to " + std::to_string(rx::kMaxSharedSm90) + " are possible";
  return "";
}

}  // namespace grid_sm80

extern "C" int64_t rx_grid_sm80_scratch_bytes(const RxRecursion* r, const RxGridPlan*) {
  return grid_sm80::sizes_of(*r).end;
}

extern "C" int64_t rx_grid_sm80_fixed_shared_bytes(const RxRecursion* r, const RxGridPlan* plan) {
  return grid_sm80::shared_of(*r, *plan).weights;
}

extern "C" int rx_grid_sm80_run(const RxRecursion* r, const RxGridPlan* plan, void* stream) {
  namespace g = grid_sm80;
  std::string why = g::why_not(*r);
  if (why.empty()) why = g::why_not(*plan, *r);
  if (!why.empty()) return g::refuse(why);
  const int64_t need = g::sizes_of(*r).end;
  if (r->scratch_bytes < need)
    return g::refuse("scratch has " + std::to_string(r->scratch_bytes) + " bytes, needs " +
                     std::to_string(need));
  if (int e = rx::clear(r->scratch, g::kBarrierBytes, stream)) return e;
  rx::LaunchShape s{"grid_sm80", dim3(unsigned(plan->ctas)), dim3(g::kThreads),
                    uint32_t(plan->shared_bytes)};
  s.cooperative = true;
  // A build that is only looked at (RX_LARGEST) holds the FP8 kernel, which has all that the other
  // has; the build of planted bugs (RX_NO_FP8) holds the other.
#ifndef RX_LARGEST
  if (!plan->fp8) return rx::launch(s, stream, g::kernel<false>, *r, *plan);
#endif
#ifdef RX_NO_FP8
  return g::refuse("this build has no FP8 kernel");
#else
  return rx::launch(s, stream, g::kernel<true>, *r, *plan);
#endif
}
