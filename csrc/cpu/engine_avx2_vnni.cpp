// x86 with AVX-VNNI: int8 products on the AVX2 core.
#define RX_ISA avx2_vnni
#define RX_VECTOR_WIDTH 8
#define RX_ROW_TILE 6
#define RX_L2_CHUNK_BYTES (192 << 10)
#define RX_GROUP_ROWS 200

#include "engines.hpp"
#include "gemm.hpp"
#include "gemm_int8.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine avx2_vnni_int8_f32 =
    avx2_vnni::engine_without_window<avx2_vnni::Int8Core<avx2_vnni::VectorCore<float>>>();
const Engine avx2_vnni_int8_bf16 =
    avx2_vnni::engine_without_window<avx2_vnni::Int8Core<avx2_vnni::VectorCore<avx2_vnni::bf16>>>();
}  // namespace rx::cpu
