// x86 with AVX512_VNNI: int8 products on the AVX-512 core, for processors without AVX512_BF16.
#define RX_ISA avx512_vnni
#define RX_VECTOR_WIDTH 16
#define RX_ROW_TILE 14
#define RX_L2_CHUNK_BYTES (256 << 10)
#define RX_GROUP_ROWS 390

#include "engines.hpp"
#include "gemm.hpp"
#include "gemm_int8.hpp"
#include "schedule.hpp"

namespace rx::cpu {
const Engine vnni_int8_f32 =
    avx512_vnni::engine_without_window<avx512_vnni::Int8Core<avx512_vnni::VectorCore<float>>>();
const Engine vnni_int8_bf16 = avx512_vnni::engine_without_window<
    avx512_vnni::Int8Core<avx512_vnni::VectorCore<avx512_vnni::bf16>>>();
}  // namespace rx::cpu
