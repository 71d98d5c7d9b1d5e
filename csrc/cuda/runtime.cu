// runtime.cu - errors and devices, as the C interface shows them.
#include "rx/launch.cuh"

extern "C" const char* rx_cuda_last_error(void) { return rx::last_error().c_str(); }

extern "C" const char* rx_cuda_error_name(int code) {
  if (code == kRxEmulatorError) return "emulator fault";
  if (code == kRxInvalidShape) return "invalid shape";
#ifdef RX_EMU
  return code ? "unknown" : "cudaSuccess";
#else
  return cudaGetErrorName(static_cast<cudaError_t>(code));
#endif
}

extern "C" int rx_cuda_device_count(int* count, int* driver_version, int* runtime_version) {
  *count = *driver_version = *runtime_version = 0;
#ifdef RX_EMU
  return 0;
#else
  rx::last_error().clear();
  cudaRuntimeGetVersion(runtime_version);
  cudaDriverGetVersion(driver_version);  // 0 without a driver
  if (cudaError_t e = cudaGetDeviceCount(count)) {
    *count = 0;
    return rx::fail("cudaGetDeviceCount", e);
  }
  return 0;
#endif
}

extern "C" void rx_struct_sizes(int32_t sizes[kRxStructs]) {
  const size_t all[kRxStructs] = {sizeof(RxCall),       sizeof(RxBlock),     sizeof(RxNet),
                                  sizeof(RxEvent),      sizeof(RxRecursion), sizeof(RxPack),
                                  sizeof(RxSolve),      sizeof(RxOwnerPlan), sizeof(RxGridPlan),
                                  sizeof(RxClusterPlan)};
  for (int i = 0; i < kRxStructs; i++) sizes[i] = int32_t(all[i]);
}

extern "C" int rx_timeline_compiled(void) {
#ifdef RX_TIMELINE
  return 1;
#else
  return 0;
#endif
}
