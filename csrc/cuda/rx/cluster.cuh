// cluster.cuh - sm_90: clusters, distributed shared memory, mbarriers, fences.
#pragma once
#include "common.cuh"

namespace rx {

// ---- the cluster
RX_DEVICE uint32_t cluster_rank() {
#ifdef RX_EMU
  return emu::cur->cta_rank;
#else
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#endif
}
RX_DEVICE void cluster_arrive() {
  RX_EITHER(emu::cluster_arrive(),
            asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}
RX_DEVICE void cluster_wait() {
  RX_EITHER(emu::cluster_wait(),
            asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

// ---- distributed shared memory
RX_DEVICE uint32_t mapa(uint32_t addr, uint32_t rank) {
#ifdef RX_EMU
  return emu::mapa(addr, rank);
#else
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
#endif
}
#ifdef RX_EMU
template <class T>
inline T load_cluster(uint32_t addr) {
  T v;
  const uint8_t* p = emu::shared_ptr(addr);
  if (addr % sizeof(T)) emu::die("ld.shared::cluster: 0x%x is misaligned", addr);
  emu::access(p, sizeof v, false, "ld.shared::cluster");
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_cluster(uint32_t addr, T v) {
  uint8_t* p = emu::shared_ptr(addr);
  if (addr % sizeof(T)) emu::die("st.shared::cluster: 0x%x is misaligned", addr);
  emu::access(p, sizeof v, true, "st.shared::cluster");
  memcpy(p, &v, sizeof v);
}
#endif
RX_DEVICE float ld_cluster_f32(uint32_t addr) {
#ifdef RX_EMU
  return load_cluster<float>(addr);
#else
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(addr) : "memory");
  return v;
#endif
}
RX_DEVICE uint4 ld_cluster_v4(uint32_t addr) {
#ifdef RX_EMU
  return load_cluster<uint4>(addr);
#else
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(addr)
               : "memory");
  return v;
#endif
}
RX_DEVICE void st_cluster_f32(uint32_t addr, float v) {
  RX_EITHER(store_cluster(addr, v),
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(addr), "f"(v) : "memory"));
}
RX_DEVICE void st_cluster_v4(uint32_t addr, uint4 v) {
  RX_EITHER(store_cluster(addr, v),
            asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x),
                         "r"(v.y), "r"(v.z), "r"(v.w) : "memory"));
}

// ---- mbarriers: eight bytes of shared memory that count arrivals and bytes
RX_DEVICE void mbar_init(uint32_t bar, uint32_t arrivals) {
  RX_EITHER(
      emu::mbar_init(bar, arrivals),
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory"));
}
RX_DEVICE void mbar_inval(uint32_t bar) {
  RX_EITHER(emu::mbar_inval(bar),
            asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory"));
}
RX_DEVICE void mbar_arrive(uint32_t bar) {
  RX_EITHER(emu::mbar_arrive(bar),
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"));
}
// On the barrier of any CTA of the cluster; `bar` comes from mapa().
RX_DEVICE void mbar_arrive_remote(uint32_t bar) {
  RX_EITHER(emu::mbar_arrive(bar),
            asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                bar) : "memory"));
}
// The same with a release at CTA scope alone: for barriers that hand back memory which this thread
// has read, or that wgmma has. The release at cluster scope is a MEMBAR.ALL.GPU, a stop of hundreds
// of cycles at every stage of a ring; nothing that the other CTA reads waits for it here.
RX_DEVICE void mbar_arrive_remote_reads(uint32_t bar) {
  RX_EITHER(emu::mbar_arrive(bar),
            asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"));
}
RX_DEVICE void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  RX_EITHER(emu::mbar_arrive_expect_tx(bar, bytes),
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                         "r"(bytes) : "memory"));
}
RX_DEVICE void mbar_expect_tx(uint32_t bar, uint32_t bytes) {
  RX_EITHER(emu::mbar_expect_tx(bar, bytes),
            asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar),
                         "r"(bytes) : "memory"));
}
// Waits for the end of the phase with this parity (the first phase has parity 0). Acquires at
// cluster scope, so that what a remote arrival released may be read.
RX_DEVICE void mbar_wait(uint32_t bar, uint32_t parity) {
  RX_EITHER(
      emu::mbar_wait(bar, parity),
      asm volatile("{\n.reg .pred done;\nwait_%=:\n"
                   "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra wait_%=;\n}" ::"r"(bar),
                   "r"(parity) : "memory"));
}
// The same, acquiring at CTA scope alone: for what bulk copies bring, whose bytes the barrier
// itself counts, and for memory handed back. At cluster scope every wait also empties L1
// (CCTL.IVALL).
RX_DEVICE void mbar_wait_copies(uint32_t bar, uint32_t parity) {
  RX_EITHER(emu::mbar_wait(bar, parity),
            asm volatile("{\n.reg .pred done;\nwait_%=:\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                         "@!done bra wait_%=;\n}" ::"r"(bar),
                         "r"(parity) : "memory"));
}

// ---- fences
// Generic writes (st, cp.async) of this thread become visible to wgmma and bulk copies.
RX_DEVICE void fence_proxy_async() {
  RX_EITHER(emu::proxy_fence(), asm volatile("fence.proxy.async;" :: : "memory"));
}
// The same for this CTA's shared memory alone, without the MEMBAR.ALL.GPU that the other brings.
RX_DEVICE void fence_proxy_async_shared() {
  RX_EITHER(emu::proxy_fence(), asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}
// Initialised mbarriers become visible to the cluster, bulk copies included; then synchronise.
RX_DEVICE void fence_mbarrier_init() {
  RX_EITHER(emu::mbar_init_fence(),
            asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
RX_DEVICE void fence_cluster() {
  RX_EITHER(emu::fence(), asm volatile("fence.acq_rel.cluster;" :: : "memory"));
}

}  // namespace rx
