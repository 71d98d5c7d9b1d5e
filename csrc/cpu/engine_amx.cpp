// x86 with AMX-BF16 (and AVX-512 for the rest). bf16 states only.
#define RX_ISA amx
#define RX_VECTOR_WIDTH 16
#define RX_ROW_TILE 14  // of the window's attention, which has no tiles
#define RX_L2_CHUNK_BYTES (384 << 10)
#define RX_GROUP_ROWS 390

#include "engines.hpp"
#include "gemm_int8_amx.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine amx_bf16 = amx::engine_of<amx::AmxCore>();
const Engine amx_int8 = amx::engine_without_window<amx::AmxInt8Core>();
}  // namespace rx::cpu
