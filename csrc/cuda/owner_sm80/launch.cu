// launch.cu - host side of the owner kernel: what fits, where things lie, and the launch.
#include "kernel.cuh"

#include "../rx/launch.cuh"

// Each triple (hidden, row tiles, place of h) is a kernel of its own; recurx/plan/cuda_owner.py
// knows the same list.
#if defined(RX_LARGEST)  // the kernels that need most registers stand for all (tests/aot)
#define RX_OWNER_PLANS(X) X(512, 8, kShared) X(512, 7, kScratch) X(512, 8, kScratch)
#elif !defined(RX_OWNER_PLANS)
#define RX_OWNER_PLANS(X) \
  X(64, 2, kShared)       \
  X(64, 8, kShared)       \
  X(128, 8, kShared)      \
  X(256, 8, kShared)      \
  X(384, 8, kShared)      \
  X(512, 6, kShared)      \
  X(512, 7, kShared)      \
  X(512, 8, kShared)      \
  X(512, 6, kScratch)     \
  X(512, 7, kScratch)     \
  X(512, 8, kScratch)
#endif

namespace owner_sm80 {

static int refuse(const std::string& why) {
  return rx::fail(kRxInvalidShape, "owner_sm80: " + why);
}

static std::string number(int64_t n) { return std::to_string(n); }

static int check_block(const RxBlock& b, int hidden) {
  if (b.inner < 1) return refuse("inner is " + number(b.inner) + "; it must be positive");
  if (b.token_mlp) {
    if (b.token_inner < 1)
      return refuse("token_inner is " + number(b.token_inner) + "; it must be positive");
    return 0;
  }
  const int head_dim = b.heads > 0 && hidden % b.heads == 0 ? hidden / b.heads : 0;
  if (head_dim == 32 || head_dim == 64 || (head_dim == 128 && hidden % 128 == 0)) return 0;
  return refuse(number(b.heads) + " heads at hidden " + number(hidden) +
                "; head_dim must be 32, 64 or 128");
}

static int check(const RxRecursion& r, const RxOwnerPlan& plan) {
  if (r.batch < 1 || r.tokens < 1) return refuse("batch and tokens must be positive");
  if (r.num_states < 1 || r.num_states > kRxMaxStates || r.num_nets < 1 ||
      r.num_nets > kRxMaxNets || r.num_calls < 1)
    return refuse("needs 1.." + number(kRxMaxStates) + " states, 1.." + number(kRxMaxNets) +
                  " nets and a call");
  if (plan.owners < 1 || plan.samples < 1) return refuse("owners and samples must be positive");
  if (plan.samples * ceil_div(r.tokens, 16) > plan.tiles)
    return refuse(number(plan.samples) + " samples of " + number(r.tokens) +
                  " tokens need more than " + number(plan.tiles) + " row tiles");
  for (int n = 0; n < r.num_nets; n++) {
    const RxNet& net = r.nets[n];
    if (net.num_blocks < 1 || net.num_blocks > kRxMaxBlocks)
      return refuse("a net has " + number(net.num_blocks) + " blocks; 1.." + number(kRxMaxBlocks) +
                    " are possible");
    for (int i = 0; i < net.num_blocks; i++)
      if (int e = check_block(net.blocks[i], r.hidden)) return e;
  }
  return 0;
}

static void list_segments(const RxNet& net, const RxRecursion& r, const RxOwnerPlan& plan,
                          Segment* out) {
  const int token_repeats = plan.samples * token_passes(r.hidden, plan.tiles);
  for (int i = 0; i < net.num_blocks; i++)
    out += block_segments(net.blocks[i], r.hidden, r.tokens, token_repeats, out);
  out[-1].ends_net = 1;
}

template <int kHidden, int kTiles, int kPlace>
static int launch(const Params& params, const RxOwnerPlan& plan, void* stream) {
  const int groups = ceil_div(params.r.batch, plan.samples);
  const rx::LaunchShape shape{"owner_sm80",
                              dim3(unsigned(groups < plan.owners ? groups : plan.owners)),
                              dim3(kThreads), params.at.shared_bytes};
  return rx::launch(shape, stream, kernel<kHidden, kTiles, kPlace>, params);
}

}  // namespace owner_sm80

extern "C" int64_t rx_owner_sm80_scratch_bytes(const RxRecursion* r, const RxOwnerPlan* plan) {
  return owner_sm80::geometry(*r, *plan).scratch_bytes * plan->owners;
}

extern "C" int64_t rx_owner_sm80_shared_bytes(const RxRecursion* r, const RxOwnerPlan* plan) {
  return owner_sm80::geometry(*r, *plan).shared_bytes;
}

namespace owner_sm80 {

static int launch_any(const RxRecursion& r, const RxOwnerPlan& plan, const RxSolve& solve,
                      void* stream) {
  if (int e = check(r, plan)) return e;
  Params params{r, solve, geometry(r, plan), {}};
  if (r.scratch_bytes < params.at.scratch_bytes * plan.owners)
    return refuse("scratch has " + number(r.scratch_bytes) + " bytes, " +
                  number(params.at.scratch_bytes * plan.owners) + " are needed");
  for (int n = 0; n < r.num_nets; n++)
    list_segments(r.nets[n], r, plan, params.segments + n * kMaxSegments);
#define RX_OWNER_LAUNCH(hidden_, tiles_, place_)                                \
  if (r.hidden == hidden_ && plan.tiles == tiles_ && plan.in_scratch == place_) \
    return launch<hidden_, tiles_, place_>(params, plan, stream);
  RX_OWNER_PLANS(RX_OWNER_LAUNCH)
#undef RX_OWNER_LAUNCH
  return refuse("no kernel is compiled for hidden " + number(r.hidden) + " and " +
                number(plan.tiles) + " row tiles" + (plan.in_scratch ? " with h in scratch" : ""));
}

static int check_solve(const RxRecursion& r, const RxOwnerPlan& plan, const RxSolve& s) {
  if (s.entries < 1 || s.rollouts < 1 || s.max_steps < 1 || s.vocab < 1)
    return refuse("entries, rollouts, max_steps and vocab must be positive");
  if (s.prefix < 0 || s.prefix >= r.tokens)
    return refuse("a prefix of " + number(s.prefix) + " leaves no answer in " + number(r.tokens) +
                  " tokens");
  if (s.output < 0 || s.output >= r.num_states) return refuse("output is no state");
  if (s.halt < 0 || s.halt > 2) return refuse("halt is " + number(s.halt) + "; 0, 1 or 2");
  if (r.batch != plan.owners * plan.samples)
    return refuse("batch is " + number(r.batch) + "; it must be the number of slots, " +
                  number(plan.owners * plan.samples));
  return 0;
}

}  // namespace owner_sm80

extern "C" int rx_owner_sm80_run(const RxRecursion* r, const RxOwnerPlan* plan, void* stream) {
  return owner_sm80::launch_any(*r, *plan, RxSolve{}, stream);
}

extern "C" int rx_owner_sm80_solve(const RxRecursion* r, const RxOwnerPlan* plan,
                                   const RxSolve* solve, void* stream) {
  if (int e = owner_sm80::check_solve(*r, *plan, *solve)) return e;
  return owner_sm80::launch_any(*r, *plan, *solve, stream);
}
