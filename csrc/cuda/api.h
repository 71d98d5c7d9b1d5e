/* api.h - the GPU kernels as plain C, so that bindings need no CUDA header and nvcc sees no Python.
 *
 * Every entry returns 0, or a cudaError_t (kRxEmulatorError when the emulator reports a fault);
 * rx_cuda_last_error() says what happened. Pointers are device pointers; `stream` is a cudaStream_t
 * as an integer-sized handle. Shapes and alignment are checked by the caller (see each struct).
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kRxEmulatorError = 100001, kRxInvalidShape = 100002 };

const char* rx_cuda_last_error(void);     /* of this thread; "" after a success */
const char* rx_cuda_error_name(int code); /* "cudaErrorNoDevice", ... */
/* Devices that can run a kernel of this library; 0 and a reason in last_error without a driver. */
int rx_cuda_device_count(int* count, int* driver_version, int* runtime_version);

/* out = rms(residual + a * w^T), each row over its n columns: x * rsqrt(mean(x^2) + eps).
 * a [m, k], residual and out [m, n], all bf16 and contiguous, 16-byte aligned; out may be residual.
 * w: see the two entries. m >= 1; n = 64 or a multiple of 128 up to 512; k a multiple of 64. */
typedef struct {
  const void* a;
  const void* w;
  const void* residual;
  void* out;
  int m, n, k;
  float eps;
} RxGemmResidualRms;

/* sm_80 and later; w is [n, k] bf16, row-major. */
int rx_gemm_residual_rms_sm80(const RxGemmResidualRms* p, void* stream);

/* sm_90a; w is the tape made by rx_pack_tape_sm90a; n is 128, 256, 384 or 512.
 * cluster_rows: CTAs along m that share one multicast tape, 1 or 2. */
int rx_gemm_residual_rms_sm90a(const RxGemmResidualRms* p, int cluster_rows, void* stream);

/* Writes w [n, k] as tape [k / 64][n][64] bf16: the tiles in the order of use, each row's 16-byte
 * chunks swizzled as wgmma reads them. tape has as many bytes as w, 1024-byte aligned. */
int rx_pack_tape_sm90a(const void* w, void* tape, int n, int k, void* stream);

#ifdef __cplusplus
}
#endif
