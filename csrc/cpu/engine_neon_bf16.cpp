// aarch64 with BFDOT (Graviton 3, Grace). bf16 states only. Never timed: see engine_neon.cpp.
#define RX_ISA bfdot
#define RX_VECTOR_WIDTH 4
#define RX_ROW_TILE 12
#define RX_L2_CHUNK_BYTES (192 << 10)
#define RX_GROUP_ROWS 200

#include "engines.hpp"
#include "gemm_dot.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine bfdot_bf16 = bfdot::engine_of<bfdot::DotCore>();
}  // namespace rx::cpu
