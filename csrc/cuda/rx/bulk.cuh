// bulk.cuh - sm_90: copies that one thread issues and an mbarrier or a bulk group completes.
//
// Sizes and addresses are multiples of 16. A multicast copy writes the same shared offset in every
// CTA of the mask and completes on the barrier at the same offset there.
#pragma once
#include "common.cuh"
#ifndef RX_EMU
#include <cuda.h>
#endif

namespace rx {

#ifdef RX_EMU
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// ---- one dimension
RX_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  RX_EITHER(emu::bulk_load(dst, src, bytes, bar, 0),
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                         "[%0], [%1], %2, [%3];" ::"r"(dst),
                         "l"(src), "r"(bytes), "r"(bar) : "memory"));
}
RX_DEVICE void bulk_load_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar,
                                   uint16_t cta_mask) {
  RX_EITHER(emu::bulk_load(dst, src, bytes, bar, cta_mask),
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                         ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(dst),
                         "l"(src), "r"(bytes), "r"(bar), "h"(cta_mask) : "memory"));
}
// From my shared memory to that of a CTA of the cluster; dst and bar come from mapa().
RX_DEVICE void bulk_to_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  RX_EITHER(emu::bulk_to_cluster(dst, src, bytes, bar),
            asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
                         "[%0], [%1], %2, [%3];" ::"r"(dst),
                         "r"(src), "r"(bytes), "r"(bar) : "memory"));
}
RX_DEVICE void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  RX_EITHER(emu::bulk_store(dst, src, bytes),
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
                         "r"(src), "r"(bytes) : "memory"));
}
RX_DEVICE void bulk_commit() {
  RX_EITHER(emu::bulk_commit(), asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}
template <int GroupsLeft>
RX_DEVICE void bulk_wait() {
  RX_EITHER(emu::bulk_wait(GroupsLeft),
            asm volatile("cp.async.bulk.wait_group %0;" ::"n"(GroupsLeft) : "memory"));
}
template <int GroupsLeft>
RX_DEVICE void bulk_wait_read() {  // the sources may be written again
  RX_EITHER(emu::bulk_wait(GroupsLeft, true),
            asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GroupsLeft) : "memory"));
}

// ---- two dimensions: a box of a row-major matrix, x along the row
RX_DEVICE void tensor_load_2d(uint32_t dst, const TensorMap* map, int x, int y, uint32_t bar) {
  RX_EITHER(
      emu::tensor_load(dst, map, x, y, 0, bar, 0),
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                   "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
                   "l"(map), "r"(x), "r"(y), "r"(bar) : "memory"));
}
RX_DEVICE void tensor_load_2d_multicast(uint32_t dst, const TensorMap* map, int x, int y,
                                        uint32_t bar, uint16_t cta_mask) {
  RX_EITHER(
      emu::tensor_load(dst, map, x, y, 0, bar, cta_mask),
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                   ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
                   "l"(map), "r"(x), "r"(y), "r"(bar), "h"(cta_mask) : "memory"));
}

}  // namespace rx
