// bindings.hpp - adds the CUDA functions to the Python module, where a CUDA toolkit was found.
#pragma once
#include <pybind11/pybind11.h>

namespace rx::cuda {

void bind(pybind11::module_& m);

}  // namespace rx::cuda
