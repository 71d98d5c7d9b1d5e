// micro.cu - what the cost model assumes of a Hopper, measured: a barrier over the grid, the L2 read
// by all multiprocessors at once, the same bytes multicast to a cluster, clusters that fit.
//
// Each kernel leaves sums that its caller can tell beforehand, in the emulator too.
#include "rx/launch.cuh"
#include "rx/rx.cuh"

namespace micro {

constexpr int kThreads = 256;
constexpr uint32_t kStage = 16384;  // bytes of a ring's stage, as in cluster_sm90a
constexpr int kStages = 4, kReaders = kThreads - 32;

// The barrier of grid_sm80, `rounds` times.
__global__ void barrier_kernel(uint32_t* arrived_g, int rounds) {
  for (int i = 1; i <= rounds; i++) {
    __syncthreads();
    if (threadIdx.x == 0) {
      rx::red_add_release(arrived_g, 1);
      while (rx::ld_acquire(arrived_g) < uint32_t(i) * gridDim.x) {
      }
    }
    __syncthreads();
  }
}

// Every CTA reads all of the data, as every CTA reads the tape of weights.
__global__ void sweep_kernel(const uint4* data_g, int count, int sweeps, uint32_t* sums_g) {
  uint32_t sum = 0;
  for (int sweep = 0; sweep < sweeps; sweep++)
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint4 v = RX_EITHER(data_g[i], __ldcg(data_g + i));
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  sums_g[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// A ring of stages: each CTA of the cluster fetches its share of a stage for all of them. Readers
// look at every byte if `whole`, else at one word a stage, so that the copies set the pace.
__global__ void multicast_kernel(const unsigned char* tape_g, int stages, int sweeps, int cluster,
                                 int whole, uint32_t* sums_g) {
  RX_DYN_SMEM(smem);
  const uint32_t at = rx::smem_u32(smem), full = at + kStages * kStage, empty = full + 8 * kStages;
  const uint32_t rank = rx::cluster_rank(), share = kStage / cluster;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      rx::mbar_init(full + 8 * s, 1);
      rx::mbar_init(empty + 8 * s, uint32_t(cluster) * kReaders / 32);
    }
    rx::fence_mbarrier_init();
  }
  rx::cluster_arrive();
  rx::cluster_wait();
  const int total = stages * sweeps;
  if (threadIdx.x == 0) {
    for (int i = 0; i < total; i++) {
      const int s = i % kStages, turn = i / kStages;
      if (turn) rx::mbar_wait_copies(empty + 8 * s, uint32_t(turn - 1) & 1);
      rx::mbar_arrive_expect_tx(full + 8 * s, kStage);
      rx::bulk_load_multicast(at + s * kStage + rank * share,
                              tape_g + size_t(i % stages) * kStage + rank * share, share,
                              full + 8 * s, uint16_t((1 << cluster) - 1));
    }
  } else if (threadIdx.x >= 32) {
    uint32_t sum = 0;
    for (int i = 0; i < total; i++) {
      const int s = i % kStages;
      rx::mbar_wait_copies(full + 8 * s, uint32_t(i / kStages) & 1);
      const uint32_t* words = reinterpret_cast<const uint32_t*>(smem + s * kStage);
      for (int w = threadIdx.x - 32; w < (whole ? int(kStage / 4) : kReaders); w += kReaders)
        sum += words[w];
      __syncwarp();
      if (threadIdx.x % 32 < uint32_t(cluster))
        rx::mbar_arrive_remote_reads(rx::mapa(empty + 8 * s, threadIdx.x % 32));
    }
    sums_g[blockIdx.x * kReaders + threadIdx.x - 32] = sum;
  }
  __syncwarp();
  rx::cluster_arrive();
  rx::cluster_wait();
}

constexpr uint32_t kRing = kStages * kStage + 16 * kStages;

}  // namespace micro

extern "C" const char* rx_cuda_last_error(void) { return rx::last_error().c_str(); }

extern "C" int rx_micro_barrier(int ctas, int rounds, uint32_t* arrived_g, void* stream) {
  rx::LaunchShape shape{"micro_barrier", dim3(ctas), dim3(micro::kThreads)};
  shape.cooperative = true;
  return rx::launch(shape, stream, micro::barrier_kernel, arrived_g, rounds);
}

extern "C" int rx_micro_sweep(int ctas, const void* data_g, int count, int sweeps, uint32_t* sums_g,
                              void* stream) {
  return rx::launch({"micro_sweep", dim3(ctas), dim3(micro::kThreads)}, stream, micro::sweep_kernel,
                    static_cast<const uint4*>(data_g), count, sweeps, sums_g);
}

extern "C" int rx_micro_multicast(int clusters, int size, const void* tape_g, int stages,
                                  int sweeps, int whole, uint32_t* sums_g, void* stream) {
  return rx::launch({"micro_multicast", dim3(clusters * size), dim3(micro::kThreads), micro::kRing,
                     unsigned(size)},
                    stream, micro::multicast_kernel, static_cast<const unsigned char*>(tape_g),
                    stages, sweeps, size, whole, sums_g);
}

// How many clusters of `size` CTAs, each with so many threads and bytes, run at once.
extern "C" int rx_micro_max_clusters(int size, int threads, int shared, int* found) {
#ifdef RX_EMU
  (void)size, (void)threads, (void)shared, (void)found;
  return rx::fail(kRxEmulatorError, "micro_max_clusters: the emulator has no occupancy");
#else
  auto* kernel = micro::multicast_kernel;
  cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (!e) e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t c{};
  c.gridDim = dim3(size), c.blockDim = dim3(threads), c.dynamicSmemBytes = size_t(shared);
  c.attrs = &attribute, c.numAttrs = 1;
  if (!e) e = cudaOccupancyMaxActiveClusters(found, kernel, &c);
  return e ? rx::fail("micro_max_clusters", e) : 0;
#endif
}
