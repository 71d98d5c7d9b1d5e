// gemm_residual_rms_sm90a.cu - host side: the tensor map of A and the launch.
#include "gemm_residual_rms_sm90a.cuh"

#include "rx/launch.cuh"

namespace gemm_residual_rms_sm90a {

template <int kColumns, int kRowGroups>
static int launch(const RxGemmResidualRms& g, void* stream) {
  using P = Plan<kColumns, kRowGroups>;
  rx::TensorMap a_map;
  if (int e = rx::make_tensor_map(&a_map, g.a, uint64_t(g.m), uint64_t(g.k), P::kRows / 2))
    return e;
  auto in = [](const void* x) { return static_cast<const rx::bf16*>(x); };
  const Params p{in(g.w), in(g.residual), static_cast<rx::bf16*>(g.out), g.m, g.k, g.eps};
  const int cluster_rows = P::kRows * P::kRowGroups;
  rx::LaunchShape s{"gemm_residual_rms_sm90a",
                    dim3(unsigned(g.m + cluster_rows - 1) / cluster_rows * P::kCluster),
                    dim3(P::kThreads), P::kShared, P::kCluster};
  return rx::launch(s, stream, kernel<kColumns, kRowGroups>, a_map, p);
}

template <int kRowGroups>
static int launch_for_width(const RxGemmResidualRms& g, void* stream) {
  switch (g.n) {
    case 128:
      return launch<64, kRowGroups>(g, stream);
    case 256:
      return launch<128, kRowGroups>(g, stream);
    case 384:
      return launch<192, kRowGroups>(g, stream);
    case 512:
      return launch<256, kRowGroups>(g, stream);
    default:
      return rx::fail(kRxInvalidShape, "gemm_residual_rms_sm90a: n is " + std::to_string(g.n) +
                                           "; 128, 256, 384 and 512 are compiled");
  }
}

}  // namespace gemm_residual_rms_sm90a

extern "C" int rx_gemm_residual_rms_sm90a(const RxGemmResidualRms* p, int cluster_rows,
                                          void* stream) {
  namespace g = gemm_residual_rms_sm90a;
  if (cluster_rows == 1) return g::launch_for_width<1>(*p, stream);
  if (cluster_rows == 2) return g::launch_for_width<2>(*p, stream);
  return rx::fail(kRxInvalidShape, "gemm_residual_rms_sm90a: cluster_rows is " +
                                       std::to_string(cluster_rows) + "; 1 or 2 is possible");
}
