// bindings.cpp - Python over api.h. Plain C++: it sees no CUDA header, and nvcc no Python.
//
// Pointers and the stream arrive as integers; the Python side has checked shapes, dtypes, alignment
// and that everything is on the stream's device.
#include "bindings.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "api.h"

namespace py = pybind11;

namespace rx::cuda {
namespace {

void raise_unless_ok(int code) {
  if (!code) return;
  const std::string name = rx_cuda_error_name(code);
  throw std::runtime_error("recurx._C: " + std::string(rx_cuda_last_error()) + " (" + name + ")");
}

// Without a driver the count is 0 and the reason says so; that is no exception.
std::tuple<int, int, int, std::string> devices() {
  int count, driver, runtime;
  rx_cuda_device_count(&count, &driver, &runtime);
  return {count, driver, runtime, rx_cuda_last_error()};
}

void gemm_residual_rms(const std::string& target, uintptr_t a, uintptr_t w, uintptr_t residual,
                       uintptr_t out, const std::tuple<int, int, int>& mnk, float eps,
                       int cluster_rows, uintptr_t stream) {
  const auto [m, n, k] = mnk;
  const RxGemmResidualRms p{
      (const void*)a, (const void*)w, (const void*)residual, (void*)out, m, n, k, eps};
  int code;
  {
    py::gil_scoped_release release;
    if (target == "sm_80") code = rx_gemm_residual_rms_sm80(&p, (void*)stream);
#ifdef RX_HAVE_SM90A  // RECURX_CUDA_ARCHS may leave it out
    else if (target == "sm_90a")
      code = rx_gemm_residual_rms_sm90a(&p, cluster_rows, (void*)stream);
#endif
    else
      throw std::invalid_argument("cuda_gemm_residual_rms: target is '" + target +
                                  "'; sm_80 and sm_90a exist, this build may lack the second");
  }
  raise_unless_ok(code);
}

void pack_tape(uintptr_t w, uintptr_t tape, int n, int k, uintptr_t stream) {
  int code;
  {
    py::gil_scoped_release release;
    code = rx_pack_tape_sm90a((const void*)w, (void*)tape, n, k, (void*)stream);
  }
  raise_unless_ok(code);
}

// Addresses of the C entries: recurx/backends/cuda_abi.py calls them with the structs of api.h.
py::dict entries() {
  py::dict found;
#define RX_ENTRY(name) found[#name] = (uintptr_t)&name
  RX_ENTRY(rx_cuda_last_error);
  RX_ENTRY(rx_cuda_error_name);
  RX_ENTRY(rx_recursion_abi);
  RX_ENTRY(rx_timeline_compiled);
  RX_ENTRY(rx_recursion_owner_sm80);
  RX_ENTRY(rx_solve_owner_sm80);
  RX_ENTRY(rx_solve_bytes);
  RX_ENTRY(rx_owner_sm80_scratch_bytes);
  RX_ENTRY(rx_owner_sm80_shared_bytes);
  RX_ENTRY(rx_owner_sm80_tape_bytes);
  RX_ENTRY(rx_pack_owner_sm80);
  RX_ENTRY(rx_recursion_grid_sm80);
  RX_ENTRY(rx_grid_sm80_scratch_bytes);
  RX_ENTRY(rx_grid_sm80_fixed_shared_bytes);
  RX_ENTRY(rx_grid_sm80_tape_bytes);
#ifdef RX_HAVE_SM90A  // else nvcc left the file out
  RX_ENTRY(rx_recursion_cluster_sm90a);
  RX_ENTRY(rx_cluster_sm90a_tape_bytes);
  RX_ENTRY(rx_pack_cluster_sm90a);
#endif
#undef RX_ENTRY
  return found;
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_entries", &entries, "{name: address} of the C entries of csrc/cuda/api.h.");
  m.def(
      "cuda_devices", &devices,
      "(devices, driver version, runtime version, reason): 0 devices and a reason without a GPU.");
  m.def("cuda_gemm_residual_rms", &gemm_residual_rms, py::arg("target"), py::arg("a"), py::arg("w"),
        py::arg("residual"), py::arg("out"), py::arg("mnk"), py::arg("eps"),
        py::arg("cluster_rows"), py::arg("stream"),
        "out = rms(residual + a @ w.T), bf16; for sm_90a w is a tape. See csrc/cuda/api.h.");
  m.def("cuda_pack_tape", &pack_tape, py::arg("w"), py::arg("tape"), py::arg("n"), py::arg("k"),
        py::arg("stream"), "Pack w [n, k] bf16 as the tape that the sm_90a kernels read.");
}

}  // namespace rx::cuda
