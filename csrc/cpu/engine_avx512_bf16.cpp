// x86 with AVX512_BF16 (and AVX-512 for the rest): 14 rows x 32 columns fill 28 of the 32
// registers. bf16 states only. 512 KB of panels and their prefetch overflow an L2 of 1 MB.
#define RX_ISA avx512_dot
#define RX_VECTOR_WIDTH 16
#define RX_ROW_TILE 14
#define RX_L2_CHUNK_BYTES (256 << 10)
#define RX_GROUP_ROWS 390

#include "engines.hpp"
#include "gemm_dot.hpp"
#include "gemm_int8.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine dot_bf16 = avx512_dot::engine_of<avx512_dot::DotCore>();
const Engine dot_int8 =
    avx512_dot::engine_without_window<avx512_dot::Int8Core<avx512_dot::DotCore>>();
}  // namespace rx::cpu
