// Calls over lists of tensors, which Python gives as tuples of addresses and sizes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/hash.hpp"

namespace rx::cpu {

using RowsTuple = std::tuple<uintptr_t, size_t, size_t, size_t>;

inline uint64_t digest_of(const std::vector<RowsTuple>& tensors, int threads) {
  std::vector<Rows> all;
  for (const auto& [data, rows, bytes, stride] : tensors)
    all.push_back({(const void*)data, rows, bytes, stride});
  pybind11::gil_scoped_release release;
  return digest(all, threads);
}

using AdamTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, long, float, float>;

inline void step_weights(const std::string& isa, const std::vector<AdamTuple>& tensors,
                         const std::vector<float>& rates, int threads) {
  std::vector<AdamTensor> all;
  for (const auto& [weight, gradient, mean, square, count, mean_by, square_by] : tensors)
    all.push_back({(float*)weight, (const float*)gradient, (float*)mean, (float*)square, count,
                   mean_by, square_by});
  const AdamRates by{rates.at(0), rates.at(1), rates.at(2), rates.at(3), rates.at(4)};
  pybind11::gil_scoped_release release;
  adam_atan2(fp32_engine(isa), by, all, threads);
}

}  // namespace rx::cpu
