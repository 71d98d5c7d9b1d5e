// sm90.cu - clusters, distributed shared memory, mbarriers, bulk and tensor copies, stmatrix.
#include "wrappers.h"

namespace wrappers {

RX_DEVICE void cluster_sync() {
  rx::cluster_arrive();
  rx::cluster_wait();
}

// Each CTA reads its neighbour's box with ld, and writes into the box after that with st.
__global__ void dsmem_kernel(uint32_t* out_g, uint32_t ctas) {
  RX_DYN_SMEM(smem);
  uint4* box = reinterpret_cast<uint4*>(smem);
  float* mail = reinterpret_cast<float*>(smem + 32 * 16);
  uint4* mail4 = reinterpret_cast<uint4*>(smem + 32 * 20);
  const uint32_t rank = rx::cluster_rank(), t = threadIdx.x;
  box[t] = make_uint4(rank * 1000 + t, t, rank, t * t);
  cluster_sync();
  const uint4 v = rx::ld_cluster_v4(rx::mapa(rx::smem_u32(box + t), (rank + 1) % ctas));
  const float f = rx::ld_cluster_f32(rx::mapa(rx::smem_u32(box + (31 - t)), (rank + 1) % ctas));
  rx::st_cluster_f32(rx::mapa(rx::smem_u32(mail + t), (rank + 2) % ctas), float(rank * 100 + t));
  rx::st_cluster_v4(rx::mapa(rx::smem_u32(mail4 + t), (rank + 3) % ctas),
                    make_uint4(rank, t, v.x, v.w));
  cluster_sync();
  uint32_t* o = out_g + (rank * 32 + t) * 10;
  const uint4 m = mail4[t];
  o[0] = v.x, o[1] = v.y, o[2] = v.z, o[3] = v.w, o[4] = bits(f), o[5] = bits(mail[t]);
  o[6] = m.x, o[7] = m.y, o[8] = m.z, o[9] = m.w;
}
template <uint32_t kCtas>
int run_dsmem(uint32_t* out_g, void* stream) {
  return rx::launch({"dsmem", dim3(kCtas), dim3(32), 32 * 36, kCtas}, stream, dsmem_kernel, out_g,
                    kCtas);
}

// The CTAs pass a number round by remote arrivals; CTA r goes on when r - 1 has arrived. Both
// parities are waited for, and a barrier with a count of two takes one local and one remote
// arrival.
__global__ void mbarrier_kernel(uint32_t* out_g, uint32_t ctas, uint32_t rounds) {
  RX_DYN_SMEM(smem);
  const uint32_t turn = rx::smem_u32(smem), both = turn + 8, rank = rx::cluster_rank();
  float* number = reinterpret_cast<float*>(smem + 16);
  if (threadIdx.x == 0) {
    rx::mbar_init(turn, 1);
    rx::mbar_init(both, 2);
    rx::fence_mbarrier_init();
    number[0] = 0.f;
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    for (uint32_t round = 0; round < rounds; round++) {
      if (rank || round) rx::mbar_wait(turn, (rank ? round : round - 1) & 1);
      const float next = number[0] * 2.f + float(rank);
      if (rank == ctas - 1 && round == rounds - 1) break;
      rx::st_cluster_f32(rx::mapa(turn + 16, (rank + 1) % ctas), next);
      rx::mbar_arrive_remote(rx::mapa(turn, (rank + 1) % ctas));
    }
    rx::mbar_arrive(both);
    rx::mbar_arrive_remote(rx::mapa(both, rank ^ 1));
    rx::mbar_wait(both, 0);
    out_g[rank] = bits(number[0]);
  }
  __syncwarp();
  cluster_sync();
  if (threadIdx.x == 0) rx::mbar_inval(turn);
}
template <uint32_t kCtas, uint32_t kRounds>
int run_mbarrier(uint32_t* out_g, void* stream) {
  return rx::launch({"mbarrier", dim3(kCtas), dim3(32), 32, kCtas}, stream, mbarrier_kernel, out_g,
                    kCtas, kRounds);
}

// ---- bulk copies: the first kWords words of the output are the source
constexpr int kWords = 256;
__global__ void fill_kernel(uint32_t* out_g) {
  out_g[threadIdx.x] = 0x01000193u * (threadIdx.x + 1);
}

RX_DEVICE void init_barrier(uint32_t bar, uint32_t bytes) {
  if (threadIdx.x == 0) {
    rx::mbar_init(bar, 1);
    rx::fence_mbarrier_init();
    rx::mbar_expect_tx(bar, bytes);  // its own way to say what arrive_expect_tx says in one
    rx::mbar_arrive(bar);
  }
  cluster_sync();
}

enum Route { kLoad, kMulticast, kToCluster };
__global__ void bulk_kernel(uint32_t* out_g, int route, uint32_t ctas) {
  RX_DYN_SMEM(smem);
  const uint32_t data = rx::smem_u32(smem), bar = data + kWords * 4, rank = rx::cluster_rank();
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  init_barrier(bar, kWords * 4);
  if (route == kLoad && threadIdx.x == 0) rx::bulk_load(data, out_g, kWords * 4, bar);
  if (route == kMulticast && threadIdx.x == 0)  // each CTA sends its share to all
    rx::bulk_load_multicast(data + rank * kWords * 4 / ctas, out_g + rank * kWords / ctas,
                            kWords * 4 / ctas, bar, uint16_t((1u << ctas) - 1));
  if (route == kToCluster) {  // from a second buffer to the peer's first
    uint32_t* mine = words + kWords + 4;
    for (int i = threadIdx.x; i < kWords; i += 32) mine[i] = out_g[i] + rank;
    rx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0)
      rx::bulk_to_cluster(rx::mapa(data, (rank + 1) % ctas), rx::smem_u32(mine), kWords * 4,
                          rx::mapa(bar, (rank + 1) % ctas));
  }
  rx::mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < kWords; i += 32) out_g[(1 + rank) * kWords + i] = words[i];
  __syncwarp();
  cluster_sync();
}
template <Route kRoute, uint32_t kCtas>
int run_bulk(uint32_t* out_g, void* stream) {
  if (int e = rx::launch({"fill", dim3(1), dim3(kWords)}, stream, fill_kernel, out_g)) return e;
  return rx::launch({"bulk", dim3(kCtas), dim3(32), kWords * 8 + 32, kCtas}, stream, bulk_kernel,
                    out_g, int(kRoute), kCtas);
}

// CTA 0 sends four rounds into one buffer of every other CTA, each after all have handed theirs
// back.
constexpr int kRounds = 4;
__global__ void bulk_hand_back_kernel(uint32_t* out_g, uint32_t ctas) {
  RX_DYN_SMEM(smem);
  const uint32_t data = rx::smem_u32(smem), full = data + kWords * 4, empty = full + 8;
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  if (threadIdx.x == 0) {
    rx::mbar_init(full, 1);
    rx::mbar_init(empty, ctas - 1);
    rx::fence_mbarrier_init();
  }
  cluster_sync();
  const uint32_t rank = rx::cluster_rank();
  for (uint32_t round = 0; round < kRounds; round++) {
    if (rank == 0) {
      if (round) rx::mbar_wait_copies(empty, (round - 1) & 1);  // the copy has read its source, too
      for (int i = threadIdx.x; i < kWords; i += 32) words[i] = round * 1000 + i;
      rx::fence_proxy_async_shared();
      __syncwarp();
      if (threadIdx.x == 0)
        for (uint32_t to = 1; to < ctas; to++)
          rx::bulk_to_cluster(rx::mapa(data, to), data, kWords * 4, rx::mapa(full, to));
    } else {
      if (threadIdx.x == 0) rx::mbar_arrive_expect_tx(full, kWords * 4);
      rx::mbar_wait_copies(full, round & 1);
      for (int i = threadIdx.x; i < kWords; i += 32)
        out_g[((rank - 1) * kRounds + round) * kWords + i] = words[i];
      __syncwarp();
      if (threadIdx.x == 0) rx::mbar_arrive_remote_reads(rx::mapa(empty, 0));
    }
  }
  __syncwarp();
  cluster_sync();
}
template <uint32_t kCtas>
int run_bulk_hand_back(uint32_t* out_g, void* stream) {
  return rx::launch({"bulk_hand_back", dim3(kCtas), dim3(32), kWords * 4 + 16, kCtas}, stream,
                    bulk_hand_back_kernel, out_g, kCtas);
}

// A bulk copy reads what the threads of the CTA have just written to global memory.
__global__ void bulk_scratch_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  const uint32_t data = rx::smem_u32(smem), bar = data + kWords * 4;
  for (int i = threadIdx.x; i < kWords; i += 32) out_g[i] = 7 * i;
  rx::fence_proxy_async_global();
  init_barrier(bar, kWords * 4);  // also a barrier for the CTA
  if (threadIdx.x == 0) rx::bulk_load(data, out_g, kWords * 4, bar);
  rx::mbar_wait(bar, 0);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(smem);
  for (int i = threadIdx.x; i < kWords; i += 32) out_g[kWords + i] = words[kWords - 1 - i];
}
int run_bulk_scratch(uint32_t* out_g, void* stream) {
  return rx::launch({"bulk_scratch", dim3(1), dim3(32), kWords * 4 + 16}, stream,
                    bulk_scratch_kernel, out_g);
}

__global__ void bulk_store_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  for (int i = threadIdx.x; i < kWords; i += 32) words[i] = i * i;
  rx::fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    rx::bulk_store(out_g, rx::smem_u32(words), kWords * 2);
    rx::bulk_commit();
    rx::bulk_store(out_g + kWords / 2, rx::smem_u32(words + kWords / 2), kWords * 2);
    rx::bulk_commit();
    rx::bulk_wait_read<1>();  // the first source is free again
    words[0] = 12345;
    rx::bulk_wait<0>();
  }
}
int run_bulk_store(uint32_t* out_g, void* stream) {
  return rx::launch({"bulk_store", dim3(1), dim3(32), kWords * 4}, stream, bulk_store_kernel,
                    out_g);
}

// ---- tensor copies: a matrix of 40 rows x 72 columns; boxes of 16 x 64 that overlap its edges
constexpr int kRows = 40, kColumns = 72, kMatrixWords = kRows * kColumns / 2,
              kBoxWords = 16 * 64 / 2;
__global__ void fill_matrix_kernel(uint32_t* out_g) {
  for (int i = threadIdx.x; i < kMatrixWords; i += 256) out_g[i] = uint32_t(i + 1) * 0x00030001u;
}
__global__ void tensor_kernel(const __grid_constant__ rx::TensorMap map, uint32_t* out_g,
                              int multicast) {
  RX_DYN_SMEM(smem);
  const uint32_t data = rx::smem_u32(smem), bar = data + 2 * kBoxWords * 4,
                 rank = rx::cluster_rank();
  init_barrier(bar, multicast ? 2 * kBoxWords * 4 : kBoxWords * 4);
  if (threadIdx.x == 0) {
    const int x = rank ? 16 : -8, y = rank ? 32 : -4;
    if (multicast)
      rx::tensor_load_2d_multicast(data + rank * kBoxWords * 4, &map, x, y, bar, 3);
    else
      rx::tensor_load_2d(data, &map, x, y, bar);
  }
  rx::mbar_wait(bar, 0);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(smem);
  const int count = multicast ? 2 * kBoxWords : kBoxWords;
  for (int i = threadIdx.x; i < count; i += 32)
    out_g[kMatrixWords + rank * 2 * kBoxWords + i] = words[i];
  __syncwarp();
  cluster_sync();
}
template <int kMulticast>
int run_tensor(uint32_t* out_g, void* stream) {
  if (int e = rx::launch({"fill", dim3(1), dim3(256)}, stream, fill_matrix_kernel, out_g)) return e;
  rx::TensorMap map;
  if (int e = rx::make_tensor_map(&map, out_g, kRows, kColumns, 16)) return e;
  return rx::launch({"tensor", dim3(2), dim3(32), 2 * kBoxWords * 4 + 16, 2}, stream, tensor_kernel,
                    map, out_g, kMulticast);
}

template <bool kTransposed>
__global__ void stmatrix_kernel(uint32_t* out_g) {
  RX_DYN_SMEM(smem);
  const uint32_t lane = threadIdx.x;
  uint32_t r[4];
  for (uint32_t i = 0; i < 4; i++) r[i] = (lane * 4 + i) * 0x00020001u;
  const uint32_t at = rx::smem_u32(smem) + (lane & 15) * 48 + (lane >> 4) * 16;
  if constexpr (kTransposed)
    rx::stmatrix_x4_trans(at, r);
  else
    rx::stmatrix_x4(at, r);
  __syncwarp();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(smem);
  for (uint32_t i = lane; i < 128; i += 32) out_g[i] = words[i / 8 * 12 + i % 8];
}
template <bool kTransposed>
int run_stmatrix(uint32_t* out_g, void* stream) {
  return rx::launch({"stmatrix", dim3(1), dim3(32), 16 * 48}, stream, stmatrix_kernel<kTransposed>,
                    out_g);
}

constexpr Entry kTable[] = {
    {"dsmem", 4 * 32 * 10, run_dsmem<4>},
    {"dsmem_8", 8 * 32 * 10, run_dsmem<8>},
    {"mbarrier", 4, run_mbarrier<4, 3>},
    {"mbarrier_8", 8, run_mbarrier<8, 2>},
    {"bulk_load", 3 * kWords, run_bulk<kLoad, 2>},
    {"bulk_load_multicast", 3 * kWords, run_bulk<kMulticast, 2>},
    {"bulk_load_multicast_4", 5 * kWords, run_bulk<kMulticast, 4>},
    {"bulk_load_multicast_8", 9 * kWords, run_bulk<kMulticast, 8>},
    {"bulk_to_cluster", 3 * kWords, run_bulk<kToCluster, 2>},
    {"bulk_to_cluster_4", 5 * kWords, run_bulk<kToCluster, 4>},
    {"bulk_to_cluster_8", 9 * kWords, run_bulk<kToCluster, 8>},
    {"bulk_hand_back", kRounds * kWords, run_bulk_hand_back<2>},
    {"bulk_hand_back_4", 3 * kRounds * kWords, run_bulk_hand_back<4>},
    {"bulk_hand_back_8", 7 * kRounds * kWords, run_bulk_hand_back<8>},
    {"bulk_store", kWords, run_bulk_store},
    {"bulk_scratch", 2 * kWords, run_bulk_scratch},
    {"tensor_load_2d", kMatrixWords + 4 * kBoxWords, run_tensor<0>},
    {"tensor_load_2d_multicast", kMatrixWords + 4 * kBoxWords, run_tensor<1>},
    {"stmatrix_x4", 128, run_stmatrix<false>},
    {"stmatrix_x4_trans", 128, run_stmatrix<true>},
};

}  // namespace wrappers

RX_WRAPPER_TABLE(wrappers::kTable)
