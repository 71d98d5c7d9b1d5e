// launch.cu - host side of the cluster recursion: what fits, and the launch.
#include "kernel.cuh"

#include "../checks.cuh"

// The values of hidden that are compiled; a test may ask for fewer.
#ifndef RX_CLUSTER_WIDTHS
#define RX_CLUSTER_WIDTHS(X) X(128) X(256) X(384) X(512)
#endif
#define RX_NAME(hidden) " " #hidden

namespace cluster_sm90a {

static int refuse(const std::string& why) { return rx::refuse("cluster_sm90a", why); }

static std::string why_not(const RxRecursion& r, int cluster) {
  if (cluster != 2 && cluster != 4 && cluster != 8)
    return "cluster is " + std::to_string(cluster) + "; 2, 4 or 8 CTAs are possible";
  if (r.tokens > kMaxTokens)
    return "tokens is " + std::to_string(r.tokens) + "; two CTAs hold 1 to " +
           std::to_string(kMaxTokens);
  if (r.num_calls > 65535) return "num_calls is " + std::to_string(r.num_calls) + "; at most 65535";
  return rx::first_reason(r, [&](const RxBlock& b) -> std::string {
    if (b.token_mlp || b.heads * kHeadDim == r.hidden) return "";
    return "heads is " + std::to_string(b.heads) + " at hidden " + std::to_string(r.hidden) +
           "; a head is 64 wide";
  });
}

static int check(const RxRecursion& r, int cluster) {
  std::string why = rx::why_not(r);
  if (why.empty()) why = why_not(r, cluster);
  return why.empty() ? 0 : refuse(why);
}

template <class P>
static rx::LaunchShape shape(int clusters, int cluster) {
  return {"cluster_sm90a", dim3(unsigned(clusters * cluster)), dim3(P::kThreads), P::kShared,
          unsigned(cluster)};
}

static void list_parts(const RxNet& net, int hidden, int token_passes, Part* part) {
  const Tape tape{hidden};
  uint32_t offset = 0;
  for (int i = 0; i < net.num_blocks; i++) {
    const RxBlock& b = net.blocks[i];
    const int token = b.token_mlp ? tape.mixer(b) : 0, rest = tape.block(b) - token;
    for (int pass = 0; token && pass < token_passes; pass++) *part++ = {offset, 2 * token, 1};
    offset += uint32_t(token) * kStage;
    *part++ = {offset, rest, 0};
    offset += uint32_t(rest) * kStage;
  }
  *part = {0, 0, 0};
}

template <class P>
static int launch(const RxRecursion& r, int cluster, const RxSolve& solve, void* stream) {
  const int samples = packed_samples(r), pairs = rx::ceil_div(r.batch, samples);
  Params p{r, solve, cluster, samples, {}};
  for (int n = 0; n < r.num_nets; n++)
    list_parts(r.nets[n], P::kHidden, P::kTokenPasses, p.parts + n * kMaxParts);
  return rx::launch(shape<P>(rx::ceil_div(2 * pairs, cluster), cluster), stream, kernel<P>, p);
}

// 512 wide, 112 rows leave room for a stage more, which 128 do not.
template <int kHidden>
static int launch_width(const RxRecursion& r, int cluster, const RxSolve& solve, void* stream) {
  if constexpr (kHidden == 512)
    if ((packed_samples(r) - 1) * kRows + r.tokens <= 112)
      return launch<Plan<kHidden, 112>>(r, cluster, solve, stream);
  return launch<Plan<kHidden, 128>>(r, cluster, solve, stream);
}

}  // namespace cluster_sm90a

extern "C" int64_t rx_cluster_sm90a_scratch_bytes(const RxRecursion*, const RxClusterPlan*) {
  return 0;
}

namespace cluster_sm90a {

static int launch_any(const RxRecursion& r, int cluster, const RxSolve& solve, void* stream) {
  if (int e = check(r, cluster)) return e;
#define RX_CASE(hidden) \
  case hidden:          \
    return launch_width<hidden>(r, cluster, solve, stream);
  switch (r.hidden) {
    RX_CLUSTER_WIDTHS(RX_CASE)
    default:
      return refuse("hidden is " + std::to_string(r.hidden) + "; compiled are" +
                    RX_CLUSTER_WIDTHS(RX_NAME));
  }
}

}  // namespace cluster_sm90a

extern "C" int rx_cluster_sm90a_run(const RxRecursion* r, const RxClusterPlan* plan, void* stream) {
  return cluster_sm90a::launch_any(*r, plan->cluster, RxSolve{}, stream);
}

extern "C" int rx_cluster_sm90a_solve(const RxRecursion* r, const RxClusterPlan* plan,
                                      const RxSolve* solve, void* stream) {
  namespace c = cluster_sm90a;
  if (int e = c::check(*r, plan->cluster)) return e;
  const int each = plan->cluster / 2 * c::packed_samples(*r);  // samples of a cluster
  if (int e = rx::check_solve(*r, *solve, rx::round_up(r->batch, each), "cluster_sm90a")) return e;
  return c::launch_any(*r, plan->cluster, *solve, stream);
}

extern "C" int rx_cluster_sm90a_places(int32_t hidden, int32_t cluster, int32_t* count) {
  namespace c = cluster_sm90a;
#undef RX_CASE
#define RX_CASE(width)                                                   \
  case width:                                                            \
    return rx::cluster_places(c::shape<c::Plan<width, 128>>(1, cluster), \
                              c::kernel<c::Plan<width, 128>>, count);
  switch (hidden) {
    RX_CLUSTER_WIDTHS(RX_CASE)
    default:
      return c::refuse("hidden is " + std::to_string(hidden) + "; compiled are" +
                       RX_CLUSTER_WIDTHS(RX_NAME));
  }
}
