// launch.cuh - the one way to start a kernel: host code.
//
// Kernels are launched through rx::launch instead of <<<>>>: clusters need cudaLaunchKernelEx, more
// than 48 KB of shared memory needs an attribute, and the emulator needs to be the one who calls.
#pragma once
#include <string>

#include "../api.h"
#include "common.cuh"

namespace rx {

// What rx_cuda_last_error() returns for the calling thread.
inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}
inline int fail(int code, const std::string& text) {
  last_error() = text;
  return code;
}

struct LaunchShape {
  const char* name;  // for error messages
  dim3 grid, block;
  uint32_t smem = 0;         // dynamic shared memory, bytes
  unsigned cluster = 1;      // CTAs a cluster, along x
  bool cooperative = false;  // all CTAs run at once and may wait for each other
};

#ifdef RX_EMU

// The constant bank of a kernel: its parameters one after another, each aligned as its type.
template <class... Params>
struct ParameterBank {
  alignas(64) uint8_t bytes[4096];
  size_t end = 0;
  explicit ParameterBank(const Params&... values) { (add(values), ...); }
  template <class T>
  void add(const T& value) {
    end = (end + alignof(T) - 1) / alignof(T) * alignof(T);
    memcpy(bytes + end, &value, sizeof value);
    end += sizeof value;
  }
};

template <class... Params, class... Args>
int launch(const LaunchShape& s, void*, void (*kernel)(Params...), const Args&... args) {
  emu::Launch l;
  emu::PtxEntry ptx = nullptr;
  const ParameterBank<Params...> bank{Params(args)...};
  l.grid = s.grid, l.block = s.block, l.cluster = s.cluster, l.smem = s.smem;
  l.cooperative = s.cooperative, l.name = s.name;
  last_error().clear();
  try {
    if (emu::find_ptx) ptx = emu::find_ptx(reinterpret_cast<const void*>(kernel), &l.static_smem);
    emu::launch(l, [&] { ptx ? ptx(bank.bytes) : kernel(args...); });
  } catch (const emu::Error& e) {
    return fail(kRxEmulatorError, std::string(s.name) + ": " + e.what());
  }
  return 0;
}

// Nobody knows of how many clusters an emulated GPU has place for.
template <class... Params>
int cluster_places(const LaunchShape&, void (*)(Params...), int* count) {
  *count = 0;
  return 0;
}

// Zeros in device memory, in the order of the stream.
inline int clear(void* p, size_t bytes, void*) {
  memset(p, 0, bytes);
  return 0;
}

#else

inline int fail(const char* what, cudaError_t e) {
  return fail(int(e),
              std::string(what) + ": " + cudaGetErrorName(e) + ": " + cudaGetErrorString(e));
}

inline int clear(void* p, size_t bytes, void* stream) {
  cudaError_t e = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
  return e ? fail("cudaMemsetAsync", e) : 0;
}

// What a launch needs to be told: attributes of the kernel, and the configuration that points to
// `attributes`.
template <class... Params>
int configure(const LaunchShape& s, void (*kernel)(Params...), cudaLaunchAttribute attributes[2],
              cudaLaunchConfig_t* c) {
  auto set = [&](cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(kernel, attribute, value);
  };
  last_error().clear();
  if (s.smem > 48 * 1024)  // more than every device gives unasked
    if (cudaError_t e = set(cudaFuncAttributeMaxDynamicSharedMemorySize, int(s.smem)))
      return fail((s.name + (": " + std::to_string(s.smem)) + " bytes of shared memory").c_str(),
                  e);
  if (s.cluster > 8)  // 8 is what every device of the architecture supports
    if (cudaError_t e = set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
      return fail(s.name, e);
  c->gridDim = s.grid, c->blockDim = s.block, c->dynamicSmemBytes = s.smem, c->attrs = attributes;
  if (s.cluster > 1) {
    attributes[c->numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[c->numAttrs++].val.clusterDim = {s.cluster, 1, 1};
  }
  if (s.cooperative) {
    attributes[c->numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[c->numAttrs++].val.cooperative = 1;
  }
  return 0;
}

template <class... Params, class... Args>
int launch(const LaunchShape& s, void* stream, void (*kernel)(Params...), const Args&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t c{};
  c.stream = static_cast<cudaStream_t>(stream);
  if (int e = configure(s, kernel, attributes, &c)) return e;
  if (cudaError_t e = cudaLaunchKernelEx(&c, kernel, Params(args)...)) return fail(s.name, e);
  return 0;
}

// Clusters of this shape that the current device runs at once: its GPCs differ in size.
template <class... Params>
int cluster_places(const LaunchShape& s, void (*kernel)(Params...), int* count) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t c{};
  if (int e = configure(s, kernel, attributes, &c)) return e;
  if (cudaError_t e = cudaOccupancyMaxActiveClusters(count, kernel, &c)) return fail(s.name, e);
  return 0;
}

#endif

}  // namespace rx
