// recurx._C: raw pointers in, nothing of torch. The Python side has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.hpp"
#ifdef RX_CUDA
#include "cuda/bindings.hpp"
#endif

#ifndef RX_MODULE_NAME
#define RX_MODULE_NAME _C
#endif

namespace py = pybind11;
using namespace rx::cpu;

namespace {

// (token_mlp, hidden, inner, heads, head_dim, tokens, token_inner, eps)
using BlockTuple = std::tuple<bool, int, int, int, int, int, int, float>;
using WeightTuple = std::tuple<uintptr_t, bool>;  // pointer, is bf16
using StepTuple = std::tuple<int, int, std::vector<int>, std::vector<int>, int>;

Dtype dtype_of(bool is_bf16) { return is_bf16 ? Dtype::bf16 : Dtype::f32; }

std::unique_ptr<Packed> pack(const std::vector<BlockTuple>& blocks,
                             const std::vector<WeightTuple>& weights, bool bf16_states,
                             const std::string& isa) {
  if (weights.size() != blocks.size() * weights_per_block)
    throw std::invalid_argument("cpu_pack: expected four weights a block");
  std::vector<BlockShape> shapes;
  for (const auto& [token_mlp, hidden, inner, heads, head_dim, tokens, token_inner, eps] : blocks)
    shapes.push_back({token_mlp, hidden, inner, heads, head_dim, tokens, token_inner, eps});
  std::vector<RawWeight> raw;
  for (const auto& [pointer, is_bf16] : weights)
    raw.push_back({(const void*)pointer, dtype_of(is_bf16)});
  py::gil_scoped_release release;
  return std::make_unique<Packed>(shapes, raw, dtype_of(bf16_states), isa);
}

// The steps of a recursion, translated once. The steps point into `reads`.
struct Program {
  std::vector<int> reads;
  std::vector<Step> steps;

  explicit Program(const std::vector<StepTuple>& given) {
    size_t total = 0;
    for (const auto& [net, write, state, inject, sum] : given)
      total += state.size() + inject.size();
    reads.reserve(total);
    for (const auto& [net, write, state, inject, sum] : given) {
      const int* at = reads.data() + reads.size();
      reads.insert(reads.end(), state.begin(), state.end());
      reads.insert(reads.end(), inject.begin(), inject.end());
      steps.push_back(
          {net, write, (int)state.size(), (int)inject.size(), at, at + state.size(), (Sum)sum});
    }
  }
  Program(const Program&) = delete;
};

void run_recursion(const std::vector<const Packed*>& nets, const Program& program,
                   const std::tuple<int, int, int>& shape, const std::vector<uintptr_t>& in,
                   const std::vector<uintptr_t>& out, uintptr_t cos, uintptr_t sin, int threads) {
  if (nets.empty() || in.size() != out.size() || threads < 1)
    throw std::invalid_argument("cpu_run: expected nets, one output a state, one thread or more");
  for (const Packed* net : nets)
    if (&net->engine() != &nets[0]->engine())
      throw std::invalid_argument("cpu_run: the nets were packed for different engines");
  std::vector<PackedNet> views;
  for (const Packed* net : nets) views.push_back(net->view());
  const auto [batch, tokens, hidden] = shape;
  const Recursion recursion{batch,
                            tokens,
                            hidden,
                            (int)in.size(),
                            (const void* const*)in.data(),
                            (void* const*)out.data(),
                            (int)program.steps.size(),
                            program.steps.data(),
                            (int)views.size(),
                            views.data(),
                            (const float*)cos,
                            (const float*)sin};
  py::gil_scoped_release release;
  rx::cpu::run(nets[0]->engine(), recursion, threads);
}

uint64_t fingerprint_of(const std::vector<std::tuple<uintptr_t, size_t>>& tensors) {
  std::vector<Span> spans;
  for (const auto& [pointer, bytes] : tensors) spans.push_back({(const void*)pointer, bytes});
  py::gil_scoped_release release;
  return fingerprint(spans);
}

py::dict phase_times() {
  py::dict times;
  const std::vector<double> seconds = phase_seconds();
  for (size_t i = 0; i < seconds.size(); ++i) times[kPhaseNames[i]] = seconds[i];
  return times;
}

}  // namespace

PYBIND11_MODULE(RX_MODULE_NAME, m) {
  m.doc() = "Compiled parts of recurx; called through recurx.backends.";

  py::class_<Packed>(m, "PackedNet", py::module_local(),
                     "Weights of one net in the panels of one CPU engine.")
      .def_property_readonly("nbytes", &Packed::bytes);

  py::class_<Program>(m, "Program", py::module_local(), "The steps of a recursion.")
      .def(
          py::init<const std::vector<StepTuple>&>(), py::arg("steps"),
          "Steps (net, write, state, inject, sum); sum 0: over inject for this step alone, 1: also "
          "kept, 2: the one that was kept.");

  m.def("cpu_isas", &usable_isas, "Instruction sets usable here, slowest first.");
  m.def("cpu_isa", &chosen_isa, "The one in use: the best, or what RECURX_CPU_ISA names.");
  m.def(
      "cpu_dot_gain", &dot_gain,
      "Times that products of bf16 pairs are faster than by FMA here; 0 where that is no choice.");
  m.def("cpu_pack", &pack, py::arg("blocks"), py::arg("weights"), py::arg("bf16_states"),
        py::arg("isa"), "Pack the weights of a net; weights are (pointer, is_bf16), [out, in].");
  m.def("cpu_run", &run_recursion, py::arg("nets"), py::arg("program"), py::arg("shape"),
        py::arg("in_"), py::arg("out"), py::arg("cos"), py::arg("sin"), py::arg("threads"),
        "Run a Program; index 0 of in_ is x, out holds the new states.");
  m.def("cpu_fingerprint", &fingerprint_of, py::arg("tensors"),
        "Hash of a sample of each (pointer, bytes), to notice weights changed in place.");
  m.def("cpu_profile", &set_profiling, py::arg("on"), "Switch the phase clock; resets it.");
  m.def("cpu_phase_times", &phase_times,
        "Seconds in each phase since cpu_profile, summed over threads.");
  m.def("cpu_scratch_bytes", &scratch_held, "Scratch that the engine keeps between calls.");

#ifdef RX_CUDA
  rx::cuda::bind(m);
#endif
}
