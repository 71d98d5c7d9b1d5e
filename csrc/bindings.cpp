// recurx._C: raw pointers in, nothing of torch. The Python side has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.hpp"
#include "packing.hpp"
#include "tensors.hpp"
#ifdef RX_CUDA
#include "cuda/bindings.hpp"
#endif

#ifndef RX_MODULE_NAME
#define RX_MODULE_NAME _C
#endif

namespace py = pybind11;
using namespace rx::cpu;

namespace {

// How the caller of this thread's work computes: a window changes it, and handlers must not see
// that.
thread_local std::fenv_t outside;

struct Outside {
  std::fenv_t inside;
  Outside() {
    std::fegetenv(&inside);
    std::fesetenv(&outside);
  }
  ~Outside() { std::fesetenv(&inside); }
};

// Runs Python's handlers of pending signals; true if one raised, as that of Ctrl-C does. Python
// calls them on the main thread alone, so no other takes its lock for that.
bool interrupted() {
#if defined(__linux__)
  if (syscall(SYS_gettid) != getpid()) return false;
#endif
  const Outside own;
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// A recursion as Python gives it; holds what `Recursion` points to.
struct Given {
  std::vector<PackedNet> views;
  std::vector<Step> steps;  // with learned factors
  Recursion recursion;

  Given(const char* op, const std::vector<const Packed*>& nets, const Program& program,
        const std::tuple<int, int, int>& shape, const void* const* in, void* const* out,
        int num_states, uintptr_t cos, uintptr_t sin, const BesideTuple& beside = {}) {
    if (nets.empty() || num_states < 1)
      throw std::invalid_argument(std::string(op) + ": expected nets, x, and one output a state");
    for (const Packed* net : nets) {
      if (&net->engine() != &nets[0]->engine())
        throw std::invalid_argument(std::string(op) + ": nets packed for different engines");
      views.push_back(net->view());
    }
    const auto [batch, tokens, hidden] = shape;
    recursion = {batch,
                 tokens,
                 hidden,
                 num_states,
                 in,
                 out,
                 (int)program.steps.size(),
                 program.steps.data(),
                 (int)views.size(),
                 views.data(),
                 (const float*)cos,
                 (const float*)sin};
    const auto& [seed, first, key_mask, learned] = beside;
    recursion.seed = seed;
    recursion.first = first;
    recursion.key_mask = (const uint8_t*)key_mask;
    if (learned.empty()) return;
    steps = program.steps;
    for (const auto& [number, of_scale, each, d_each] : learned) {
      Step& step = steps.at(number);
      (of_scale ? step.scale_each : step.share_each) = (const float*)each;
      (of_scale ? step.d_scale : step.d_share) = (float*)d_each;
    }
    recursion.steps = steps.data();
  }
};

// Without Python's lock; what a signal's handler raised goes on as the error that it is.
template <class Work>
void interruptible(Work work) {
  bool done;
  const std::fenv_t before = outside;  // a handler may call the engine
  {
    py::gil_scoped_release release;
    std::fegetenv(&outside);
    done = work();
  }
  outside = before;
  if (!done) throw py::error_already_set();
}

void run_recursion(const std::vector<const Packed*>& nets, const Program& program,
                   const std::tuple<int, int, int>& shape, const std::vector<uintptr_t>& in,
                   const std::vector<uintptr_t>& out, uintptr_t cos, uintptr_t sin, int threads,
                   const BesideTuple& beside) {
  if (in.size() != out.size())
    throw std::invalid_argument("cpu_run: expected nets, x, and one output a state");
  Given given("cpu_run", nets, program, shape, (const void* const*)in.data(),
              (void* const*)out.data(), (int)in.size(), cos, sin, beside);
  interruptible(
      [&] { return rx::cpu::run(nets[0]->engine(), given.recursion, threads, interrupted); });
}

using Addresses = std::vector<uintptr_t>;
using KeptTuple = std::tuple<uintptr_t, size_t, uintptr_t, size_t>;  // values and floats: how many

Window window_of(const Engine& engine, const Recursion& recursion, int save,
                 const KeptTuple& kept) {
  if (!engine.window.forward)
    throw std::invalid_argument("cpu_window: nets of int8 have no window; pack their weights");
  const auto [values, num_values, floats, num_floats] = kept;
  const KeptSize size = engine.window.kept_size(recursion, (Save)save);
  const size_t batch = (size_t)recursion.batch;
  if (num_values != size.values * batch || num_floats != size.floats * batch)
    throw std::invalid_argument("cpu_window: what a window keeps has another size");
  return {recursion, (Save)save, (void*)values, (float*)floats, {}, {}, {}, {}};
}

void window_forward(const std::vector<const Packed*>& nets, const Program& program,
                    const std::tuple<int, int, int>& shape, const Addresses& in,
                    const Addresses& out, uintptr_t cos, uintptr_t sin, int save,
                    const KeptTuple& kept, int threads, const BesideTuple& beside) {
  if (in.size() != out.size())
    throw std::invalid_argument("cpu_window_forward: expected nets, x, and one output a state");
  Given given("cpu_window_forward", nets, program, shape, (const void* const*)in.data(),
              (void* const*)out.data(), (int)in.size(), cos, sin, beside);
  const Engine& engine = nets[0]->engine();
  const Window window = window_of(engine, given.recursion, save, kept);
  interruptible([&] { return rx::cpu::run_window(engine, window, false, threads, interrupted); });
}

void window_backward(const std::vector<const Packed*>& nets, const Program& program,
                     const std::tuple<int, int, int>& shape, const Addresses& in, uintptr_t cos,
                     uintptr_t sin, int save, const KeptTuple& kept,
                     const std::vector<WeightTuple>& weights, const Addresses& d_out,
                     const Addresses& d_in, const Addresses& d_weights, int threads,
                     const BesideTuple& beside) {
  Given given("cpu_window_backward", nets, program, shape, (const void* const*)in.data(),
              (void* const*)in.data(), (int)in.size(), cos, sin, beside);
  const Engine& engine = nets[0]->engine();
  Window window = window_of(engine, given.recursion, save, kept);
  Gradients slots(nets, weights, d_weights);
  if (d_out.size() != in.size() || d_in.size() != in.size())
    throw std::invalid_argument("cpu_window_backward: expected a gradient of x and each state");
  window.weights = slots.weights.data();
  window.d_out = (const void* const*)d_out.data();
  window.d_in = (void* const*)d_in.data();
  window.d_weights = slots.gradients.data();
  interruptible([&] { return rx::cpu::run_window(engine, window, true, threads, interrupted); });
}

// The solve that this thread is in: rows that ended, and who is told.
thread_local const std::atomic<int>* rows_done = nullptr;
thread_local const py::object* rows_told = nullptr;

bool told_or_interrupted() {
  if (interrupted()) return true;
  const Outside own;
  py::gil_scoped_acquire gil;
  try {
    (*rows_told)(rows_done->load());
  } catch (py::error_already_set& error) {
    error.restore();
    return true;
  }
  return false;
}

template <class T>
T* pointer(const py::dict& how, const char* name) {
  return (T*)how[name].cast<uintptr_t>();
}

void solve_queue(const std::vector<const Packed*>& nets, const Program& program,
                 const std::tuple<int, int, int>& shape, const std::vector<uintptr_t>& start,
                 uintptr_t cos, uintptr_t sin, int threads, const py::dict& how,
                 const py::object& progress) {
  const Given given("cpu_solve", nets, program, shape, nullptr, nullptr, (int)start.size(), cos,
                    sin);
  std::atomic<int> done{0};
  Solving asked{};
  asked.rows = std::get<0>(shape);
  asked.max_steps = how["max_steps"].cast<int>();
  asked.by_q = how["by_q"].cast<bool>();
  asked.against_continue = how["against_continue"].cast<bool>();
  asked.by_answer = how["by_answer"].cast<bool>();
  asked.above = how["above"].cast<float>();
  asked.patience = how["patience"].cast<int>();
  asked.sigma = how["sigma"].cast<float>();
  asked.seed = how["seed"].cast<uint64_t>();
  asked.numbers = pointer<const int64_t>(how, "numbers");
  asked.x = (const void*)start[0];
  asked.start = (const void* const*)start.data();
  asked.start_each = how["start_each"].cast<bool>();
  asked.output = how["output"].cast<int>();
  asked.prefix = how["prefix"].cast<int>();
  asked.vocab = how["vocab"].cast<int>();
  asked.lm_head = pointer<const void>(how, "lm_head");
  asked.q_head = pointer<const void>(how, "q_head");
  const auto bias = how["q_bias"].cast<std::tuple<float, float>>();
  asked.q_bias[0] = std::get<0>(bias);
  asked.q_bias[1] = std::get<1>(bias);
  asked.answers = pointer<int64_t>(how, "answers");
  asked.steps = pointer<int64_t>(how, "steps");
  asked.halted = pointer<bool>(how, "halted");
  asked.final = pointer<void>(how, "final");
  asked.trace = pointer<int64_t>(how, "trace");
  asked.done = &done;
  const bool tells = !progress.is_none();
  const auto* outer_done = rows_done;
  const auto* outer_told = rows_told;
  if (tells) rows_done = &done, rows_told = &progress;
  interruptible([&] {
    const bool finished = rx::cpu::solve(nets[0]->engine(), given.recursion, asked, threads,
                                         tells ? told_or_interrupted : interrupted);
    rows_done = outer_done;
    rows_told = outer_told;
    return finished;
  });
}

// Without Python's lock: whoever has the engine's may be waiting for it.
template <class Result, class... Given>
auto unlocked(Result (*call)(Given...)) {
  return [call](Given... given) {
    py::gil_scoped_release release;
    return call(given...);
  };
}

py::dict phase_times() {
  py::dict times;
  const std::vector<double> seconds = unlocked(phase_seconds)();
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
          py::init<const std::vector<StepTuple>&, const std::vector<FactorTuple>&>(),
          py::arg("steps"), py::arg("factors") = std::vector<FactorTuple>(),
          "Steps (net, write, state, inject, sum); sum 0: over inject for this step alone, 1: also "
          "kept, 2: the one that was kept. Factors (keep, share, scale, noise, number of the "
          "call): "
          "write <- keep * write + share * net(scale * sum(state) + sum(inject)) + noise * "
          "normals.");

  m.def("cpu_isas", &usable_isas, "Instruction sets usable here, slowest first.");
  m.def("cpu_isa", &chosen_isa, "The one in use: the best, or what RECURX_CPU_ISA names.");
  m.def("cpu_isa_gains", &isa_gains,
        "Times that products of the last instruction sets (bf16 pairs, or fp32 of amx_split) are "
        "faster than by FMA here; empty where that is no choice.");
  m.def("cpu_pack", &pack, py::arg("blocks"), py::arg("weights"), py::arg("bf16_states"),
        py::arg("isa"), py::arg("scales") = std::vector<uintptr_t>(),
        py::arg("variants") = std::vector<VariantTuple>(),
        "Pack the weights of a net; weights are (pointer, is_bf16), [out, in]. With pointers to "
        "scales [out] they are int8 codes. A variant is (the fields in which a block is not TRM's, "
        "the names of its weights).");
  m.def("cpu_has_int8", &has_int8, py::arg("isa"),
        "Whether that engine multiplies int8 by an instruction; else by plain code.");
  m.def("cpu_run", &run_recursion, py::arg("nets"), py::arg("program"), py::arg("shape"),
        py::arg("in_"), py::arg("out"), py::arg("cos"), py::arg("sin"), py::arg("threads"),
        py::arg("beside") = BesideTuple(),
        "Run a Program; index 0 of in_ is x, out holds the new states.");
  m.def("cpu_window_forward", &window_forward, py::arg("nets"), py::arg("program"),
        py::arg("shape"), py::arg("in_"), py::arg("out"), py::arg("cos"), py::arg("sin"),
        py::arg("save"), py::arg("kept"), py::arg("threads"), py::arg("beside") = BesideTuple(),
        "Run a Program as a window; kept is (values, how many, floats, how many).");
  m.def("cpu_window_backward", &window_backward, py::arg("nets"), py::arg("program"),
        py::arg("shape"), py::arg("in_"), py::arg("cos"), py::arg("sin"), py::arg("save"),
        py::arg("kept"), py::arg("weights"), py::arg("d_out"), py::arg("d_in"),
        py::arg("d_weights"), py::arg("threads"), py::arg("beside") = BesideTuple(),
        "Gradients of what entered and of the weights (fp32); address 0: none given or wanted.");
  m.def("cpu_window_kept", &kept_of, py::arg("block"), py::arg("fields"), py::arg("tokens"),
        py::arg("save"), "Values and floats that a window keeps of a sample for a block's call.");
  m.def(
      "cpu_on_huge_pages",
      [](uintptr_t data, size_t bytes) { return on_huge_pages((void*)data, bytes); },
      py::arg("data"), py::arg("bytes"),
      "Ask for huge pages inside fresh memory; seconds that the first touch took.");
  m.def("cpu_solve", &solve_queue, py::arg("nets"), py::arg("program"), py::arg("shape"),
        py::arg("start"), py::arg("cos"), py::arg("sin"), py::arg("threads"), py::arg("how"),
        py::arg("progress"),
        "Refine a queue of rows, a Program a supervision step, until each halts. `start` holds x "
        "[rows, T, D] and the start of each state; `how` the fields of Solving in "
        "csrc/cpu/dispatch.hpp; `progress` is called with the rows that ended, or is None.");
  m.def("cpu_digest", &digest_of, py::arg("tensors"), py::arg("threads"),
        "Hash of every byte of tensors (pointer, rows, bytes of a row, bytes from row to row).");
  m.def("cpu_adam_atan2", &step_weights, py::arg("isa"), py::arg("tensors"), py::arg("rates"),
        py::arg("threads"),
        "One step on fp32 tensors (pointers to weight, gradient and both means, count, 1 - "
        "beta^steps of either mean); `rates` the fields of AdamRates in csrc/cpu/types.hpp.");
  m.def("cpu_profile", unlocked(set_profiling), py::arg("on"),
        "Switch the phase clock; resets it.");
  m.def("cpu_phase_times", &phase_times,
        "Seconds in each phase since cpu_profile, summed over threads.");
  m.def("cpu_scratch_bytes", unlocked(scratch_held),
        "Scratch that the engine keeps between calls.");

#ifdef RX_CUDA
  rx::cuda::bind(m);
#endif
}
