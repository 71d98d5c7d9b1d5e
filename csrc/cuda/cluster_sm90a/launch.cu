// launch.cu - host side of the cluster recursion: what fits, and the launch.
#include "kernel.cuh"

#include <string>

#include "../rx/launch.cuh"

// The values of hidden that are compiled; a test may ask for fewer.
#ifndef RX_CLUSTER_WIDTHS
#define RX_CLUSTER_WIDTHS(X) X(128) X(256) X(384) X(512)
#endif
#define RX_NAME(hidden) " " #hidden

namespace cluster_sm90a {

static int refuse(const std::string& what) {
  return rx::fail(kRxInvalidShape, "cluster_sm90a: " + what);
}

static int check(const RxRecursion& r, int cluster) {
  auto text = [](int x) { return std::to_string(x); };
  if (cluster != 2 && cluster != 4 && cluster != 8)
    return refuse("cluster is " + text(cluster) + "; 2, 4 or 8 CTAs are possible");
  if (r.tokens < 1 || r.tokens > kMaxTokens)
    return refuse("tokens is " + text(r.tokens) + "; two CTAs hold 1 to " + text(kMaxTokens));
  if (r.num_calls > 65535) return refuse("num_calls is " + text(r.num_calls) + "; at most 65535");
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++) {
      const RxBlock& block = r.nets[n].blocks[b];
      if (!block.token_mlp && block.heads * kHeadDim != r.hidden)
        return refuse("heads is " + text(block.heads) + " at hidden " + text(r.hidden) +
                      "; a head is 64 wide");
    }
  return 0;
}

template <int kHidden>
static rx::LaunchShape shape(int clusters, int cluster) {
  using P = Plan<kHidden>;
  return {"cluster_sm90a", dim3(unsigned(clusters * cluster)), dim3(P::kThreads), P::kShared,
          unsigned(cluster)};
}

template <int kHidden>
static int launch(const RxRecursion& r, int cluster, void* stream) {
  using P = Plan<kHidden>;
  Params p{r, {}, cluster};
  for (int n = 0; n < r.num_nets; n++)
    for (int b = 0; b < r.nets[n].num_blocks; b++)
      p.stages[n] += P::tape().block(r.nets[n].blocks[b]);
  const int clusters = (2 * r.batch + cluster - 1) / cluster;
  return rx::launch(shape<kHidden>(clusters, cluster), stream, kernel<kHidden>, p);
}

}  // namespace cluster_sm90a

extern "C" int64_t rx_cluster_sm90a_scratch_bytes(const RxRecursion*, const RxClusterPlan*) {
  return 0;
}

extern "C" int rx_cluster_sm90a_run(const RxRecursion* r, const RxClusterPlan* plan, void* stream) {
  namespace c = cluster_sm90a;
  if (int e = c::check(*r, plan->cluster)) return e;
#define RX_CASE(hidden) \
  case hidden:          \
    return c::launch<hidden>(*r, plan->cluster, stream);
  switch (r->hidden) {
    RX_CLUSTER_WIDTHS(RX_CASE)
    default:
      return c::refuse("hidden is " + std::to_string(r->hidden) + "; compiled are" +
                       RX_CLUSTER_WIDTHS(RX_NAME));
  }
}

extern "C" int rx_cluster_sm90a_places(int32_t hidden, int32_t cluster, int32_t* count) {
  namespace c = cluster_sm90a;
#undef RX_CASE
#define RX_CASE(width) \
  case width:          \
    return rx::cluster_places(c::shape<width>(1, cluster), c::kernel<width>, count);
  switch (hidden) {
    RX_CLUSTER_WIDTHS(RX_CASE)
    default:
      return c::refuse("hidden is " + std::to_string(hidden) + "; compiled are" +
                       RX_CLUSTER_WIDTHS(RX_NAME));
  }
}
