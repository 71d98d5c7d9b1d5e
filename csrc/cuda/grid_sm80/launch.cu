// launch.cu - host side: check what would hang or overrun, clear the flags, launch.
#include "kernel.cuh"

#include "../checks.cuh"

namespace grid_sm80 {

static int refuse(const std::string& why) { return rx::refuse("grid_sm80", why); }

static std::string why_not(const RxRecursion& r) {
  if (r.tokens > kMaxKeyTiles * 16)
    return "T=" + std::to_string(r.tokens) + "; 1 to 128 tokens are supported";
  if (r.hidden < 32 || r.hidden % 32 || r.hidden > kWarps * kRowWarpTiles * 16)
    return "D=" + std::to_string(r.hidden) + "; multiples of 32 up to 512 are supported";
  return rx::first_reason(r, [&](const RxBlock& b) -> std::string {
    if (b.token_mlp || (r.hidden / b.heads % 16 == 0 && r.hidden / b.heads <= kMaxHeadDim))
      return "";
    return std::to_string(b.heads) + " heads of D=" + std::to_string(r.hidden) +
           "; the width of a head must be 16, 32, 48, .. or 128";
  });
}

static std::string why_not(const RxGridPlan& plan, const RxRecursion& r) {
  if (plan.cluster != 1 && plan.cluster != 2 && plan.cluster != 4 && plan.cluster != 8)
    return "cluster is " + std::to_string(plan.cluster) + "; 1, 2, 4 and 8 are supported";
  if (plan.ctas < 1 || plan.ctas % plan.cluster)
    return "the plan has " + std::to_string(plan.ctas) + " CTAs" +
           (plan.cluster > 1 ? " in clusters of " + std::to_string(plan.cluster) : "");
  for (int slot = 0; slot < kSlots; slot++) {
    const int groups = plan.row_groups[slot], splits = plan.k_splits[slot];
    if (groups < 1 || groups > plan.ctas / plan.cluster)
      return std::to_string(groups) + " row groups for " + std::to_string(plan.ctas) + " CTAs";
    if (splits != 1 && splits != 2 && splits != 4 && splits != 8)
      return "k_splits is " + std::to_string(splits) + "; 1, 2, 4 and 8 are supported";
  }
  const uint32_t least = shared_of<true>(r, plan, 0).weights;
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
  return grid_sm80::shared_of<true>(*r, *plan, 0).weights;
}

extern "C" int rx_grid_sm80_run(const RxRecursion* r, const RxGridPlan* plan, void* stream) {
  namespace g = grid_sm80;
  std::string why = rx::why_not(*r);
  if (why.empty()) why = g::why_not(*r);
  if (why.empty()) why = g::why_not(*plan, *r);
  if (!why.empty()) return g::refuse(why);
  const g::Sizes sizes = g::sizes_of(*r);
  if (int e = rx::check_scratch("grid_sm80", *r, sizes.end)) return e;
  if (int e = rx::clear(r->scratch, size_t(sizes.flags()) * g::kFlagStride * 4, stream)) return e;
  rx::LaunchShape s{"grid_sm80", dim3(unsigned(plan->ctas)), dim3(g::kThreads),
                    uint32_t(plan->shared_bytes)};
  s.cooperative = true, s.cluster = unsigned(plan->cluster);
  // A build that is only looked at (RX_LARGEST) holds the FP8 kernel, which has all that the other
  // has; the build of planted bugs (RX_NO_FP8) holds the other.
  auto run = [&](auto kernel) { return rx::launch(s, stream, kernel, *r, *plan); };
#ifndef RX_LARGEST
  if (!plan->fp8) return run(plan->cluster > 1 ? g::kernel<false, true> : g::kernel<false, false>);
#endif
#ifdef RX_NO_FP8
  return g::refuse("this build has no FP8 kernel");
#else
  return run(plan->cluster > 1 ? g::kernel<true, true> : g::kernel<true, false>);
#endif
}
