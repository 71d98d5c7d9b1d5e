// x86 with AMX-BF16: fp32 states, whose products AMX forms from three parts of each operand.
#define RX_ISA amx_split
#define RX_VECTOR_WIDTH 16
#define RX_ROW_TILE 14  // of attention, which stays with fp32
#define RX_L2_CHUNK_BYTES (640 << 10)
#define RX_GROUP_ROWS 390

#include "engines.hpp"
#include "gemm_split.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine amx_f32 = amx_split::engine_of<amx_split::SplitCore>();
}  // namespace rx::cpu
