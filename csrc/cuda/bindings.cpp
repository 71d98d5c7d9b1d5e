// bindings.cpp - Python over api.h. Plain C++: it sees no CUDA header, and nvcc no Python.
//
// It hands out the addresses of the C entries: recurx/backends/cuda_abi.py calls them, with structs
// whose shapes, dtypes, alignment and device the Python side has checked.
#include "bindings.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "api.h"

namespace py = pybind11;

namespace rx::cuda {
namespace {

// Without a driver the count is 0 and the reason says so; that is no exception.
std::tuple<int, int, int, std::string> devices() {
  int count, driver, runtime;
  rx_cuda_device_count(&count, &driver, &runtime);
  return {count, driver, runtime, rx_cuda_last_error()};
}

// (hidden, CTAs of a cluster, clusters at once) of each cluster kernel on the current device.
std::vector<std::tuple<int, int, int>> cluster_places() {
  std::vector<std::tuple<int, int, int>> found;
#ifdef RX_HAVE_SM90A
  for (int hidden : {128, 256, 384, 512})
    for (int cluster : {2, 4, 8}) {
      int count = 0;
      if (!rx_cluster_sm90a_places(hidden, cluster, &count) && count > 0)
        found.emplace_back(hidden, cluster, count);
    }
#endif
  return found;
}

py::dict entries() {
  py::dict found;
#define RX_ENTRY(name) found[#name] = (uintptr_t)&name
  RX_ENTRY(rx_cuda_last_error);
  RX_ENTRY(rx_cuda_error_name);
  RX_ENTRY(rx_struct_sizes);
  RX_ENTRY(rx_timeline_compiled);
  RX_ENTRY(rx_owner_sm80_run);
  RX_ENTRY(rx_owner_sm80_solve);
  RX_ENTRY(rx_owner_sm80_scratch_bytes);
  RX_ENTRY(rx_owner_sm80_shared_bytes);
  RX_ENTRY(rx_owner_sm80_tape_bytes);
  RX_ENTRY(rx_owner_sm80_pack);
  RX_ENTRY(rx_grid_sm80_run);
  RX_ENTRY(rx_grid_sm80_scratch_bytes);
  RX_ENTRY(rx_grid_sm80_fixed_shared_bytes);
  RX_ENTRY(rx_grid_sm80_tape_bytes);
#ifdef RX_HAVE_SM90A  // RECURX_CUDA_ARCHS may leave it out
  RX_ENTRY(rx_cluster_sm90a_run);
  RX_ENTRY(rx_cluster_sm90a_solve);
  RX_ENTRY(rx_cluster_sm90a_scratch_bytes);
  RX_ENTRY(rx_cluster_sm90a_tape_bytes);
  RX_ENTRY(rx_cluster_sm90a_pack);
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
  m.def("cuda_cluster_places", &cluster_places,
        "[(D, CTAs of a cluster, clusters that run at once)] of the cluster kernels on the current "
        "device.");
}

}  // namespace rx::cuda
