// gemm_residual_rms_sm80.cu - host side: pick the ring depth for the device and launch.
#include "gemm_residual_rms_sm80.cuh"

#include "rx/launch.cuh"

namespace gemm_residual_rms_sm80 {

// Dynamic shared memory a CTA may have on the current device.
static int max_shared(int* bytes) {
#ifdef RX_EMU
  *bytes = rx::kMaxSharedSm80;
  return 0;
#else
  int device;
  cudaError_t e = cudaGetDevice(&device);
  if (!e) e = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return e ? rx::fail("gemm_residual_rms_sm80", e) : 0;
#endif
}

template <int N, int kStages>
static int launch(const Params& p, void* stream) {
  using P = Plan<N, kStages>;
  rx::LaunchShape s{"gemm_residual_rms_sm80", dim3(unsigned(p.m + P::kRows - 1) / P::kRows),
                    dim3(P::kThreads), P::kShared};
  return rx::launch(s, stream, kernel<N, kStages>, p);
}

template <int N>
static int launch_deepest(const Params& p, void* stream) {
  int available = 0;
  if (int e = max_shared(&available)) return e;
  if (uint32_t(available) >= Plan<N, 4>::kShared) return launch<N, 4>(p, stream);
  return launch<N, 2>(p, stream);
}

}  // namespace gemm_residual_rms_sm80

extern "C" int rx_gemm_residual_rms_sm80(const RxGemmResidualRms* p, void* stream) {
  namespace g = gemm_residual_rms_sm80;
  auto in = [](const void* x) { return static_cast<const rx::bf16*>(x); };
  const g::Params params{in(p->a), in(p->w), in(p->residual), static_cast<rx::bf16*>(p->out),
                         p->m,     p->k,     p->eps};
  switch (p->n) {
    case 64:
      return g::launch_deepest<64>(params, stream);
    case 128:
      return g::launch_deepest<128>(params, stream);
    case 256:
      return g::launch_deepest<256>(params, stream);
    case 384:
      return g::launch_deepest<384>(params, stream);
    case 512:
      return g::launch_deepest<512>(params, stream);
    default:
      return rx::fail(kRxInvalidShape, "gemm_residual_rms_sm80: n is " + std::to_string(p->n) +
                                           "; 64, 128, 256, 384 and 512 are compiled");
  }
}
