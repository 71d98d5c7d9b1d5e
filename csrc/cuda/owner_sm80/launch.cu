// launch.cu - host side of the owner kernel: what fits, where things lie, and the launch.
#include "kernel.cuh"

#include "../checks.cuh"

// Each triple (hidden, row tiles, place of h) is a kernel of its own; recurx/plan/cuda_owner.py
// knows the same list. Tests may ask for fewer.
#ifndef RX_OWNER_PLANS
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

static int refuse(const std::string& why) { return rx::refuse("owner_sm80", why); }

static std::string number(int64_t n) { return std::to_string(n); }

static int check(const RxRecursion& r, const RxOwnerPlan& plan) {
  std::string why = rx::why_not(r);
  if (why.empty() && r.num_calls < 1) why = "needs a call";
  if (why.empty() && (plan.owners < 1 || plan.samples < 1))
    why = "owners and samples must be positive";
  if (why.empty() && plan.samples * ceil_div(r.tokens, 16) > plan.tiles)
    why = number(plan.samples) + " samples of " + number(r.tokens) + " tokens need more than " +
          number(plan.tiles) + " row tiles";
  if (why.empty())
    why = rx::first_reason(r, [&](const RxBlock& b) -> std::string {
      if (b.activation < 0 || b.activation >= kRxActivations)
        return "activation " + number(b.activation);
      if (b.kv_heads < 0 || (b.kv_heads && b.heads % b.kv_heads))
        return number(b.heads) + " heads of " + number(b.kv_heads) + " K/V heads";
      const int head_dim = b.token_mlp ? 64 : r.hidden / b.heads;
      if (head_dim == 32 || head_dim == 64 || (head_dim == 128 && r.hidden % 128 == 0)) return "";
      return number(b.heads) + " heads of D=" + number(r.hidden) +
             "; the width of a head must be 32, 64 or 128";
    });
  return why.empty() ? 0 : refuse(why);
}

static void list_segments(const RxNet& net, const RxRecursion& r, const RxOwnerPlan& plan,
                          Segment* out) {
  const int token_repeats = plan.samples * token_passes(r.hidden, plan.tiles);
  for (int i = 0; i < net.num_blocks; i++)
    out += block_segments(net.blocks[i], r.hidden, r.tokens, token_repeats, out);
  out[-1].ends_net = 1;
}

static void list_biases(const RxNet& net, const RxRecursion& r, const float** out) {
  const float* at = reinterpret_cast<const float*>(
      static_cast<const char*>(net.tape) +
      tape_bytes(net.blocks, net.num_blocks, r.hidden, r.tokens, false));
  for (int i = 0; i < net.num_blocks; i++) {
    BiasTable tables[4];
    bias_tables(net.blocks[i], r.hidden, r.tokens, tables);
    for (const BiasTable& table : tables) {
      *out++ = bias_values(table) ? at : nullptr;
      at += bias_values(table);
    }
  }
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
  Params params{r, solve, geometry(r, plan), {}, {}};
  if (int e = rx::check_scratch("owner_sm80", r, params.at.scratch_bytes * plan.owners)) return e;
  for (int n = 0; n < r.num_nets; n++) {
    list_segments(r.nets[n], r, plan, params.segments + n * kMaxSegments);
    list_biases(r.nets[n], r, params.biases + n * kMaxBiases);
  }
#define RX_OWNER_LAUNCH(hidden_, tiles_, place_)                                \
  if (r.hidden == hidden_ && plan.tiles == tiles_ && plan.in_scratch == place_) \
    return launch<hidden_, tiles_, place_>(params, plan, stream);
  RX_OWNER_PLANS(RX_OWNER_LAUNCH)
#undef RX_OWNER_LAUNCH
  return refuse("no kernel is compiled for hidden " + number(r.hidden) + " and " +
                number(plan.tiles) + " row tiles" + (plan.in_scratch ? " with h in scratch" : ""));
}

}  // namespace owner_sm80

extern "C" int rx_owner_sm80_run(const RxRecursion* r, const RxOwnerPlan* plan, void* stream) {
  return owner_sm80::launch_any(*r, *plan, RxSolve{}, stream);
}

extern "C" int rx_owner_sm80_solve(const RxRecursion* r, const RxOwnerPlan* plan,
                                   const RxSolve* solve, void* stream) {
  if (int e = rx::check_solve(*r, *solve, plan->owners * plan->samples, "owner_sm80")) return e;
  return owner_sm80::launch_any(*r, *plan, *solve, stream);
}
