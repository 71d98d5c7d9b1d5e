#include "dispatch.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "engines.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace rx::cpu {
namespace {

bool always() { return true; }

#if defined(RX_PRETEND_ISA)  // tests: every engine runs, compiled without its instructions
bool has_avx2() { return true; }
bool has_avx512() { return true; }
bool has_avx512_bf16() { return true; }
bool has_amx() { return true; }
bool has_amx_int8() { return true; }
bool has_avx_vnni() { return true; }
bool has_avx512_vnni() { return true; }
#elif defined(__x86_64__)
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &a, &b, &c, &d); }
};

// Register state that the operating system saves; XCR0.
uint64_t saved_state() {
  if (!(Cpuid(1).c >> 27 & 1)) return 0;  // no OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

bool has_avx2() {
  return (saved_state() & 0x6) == 0x6 && (Cpuid(1).c >> 12 & 1) && (Cpuid(7).b >> 5 & 1);
}

bool has_avx512() {
  const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  return has_avx2() && (saved_state() & 0xe6) == 0xe6 && (Cpuid(7).b & wanted) == wanted;
}

unsigned more_features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return a;
}

bool has_avx_vnni() { return has_avx2() && (more_features() >> 4 & 1); }
bool has_avx512_vnni() { return has_avx512() && (Cpuid(7).c >> 11 & 1); }

// With VNNI, which every such processor has: the core for int8 is compiled with both.
bool has_avx512_bf16() { return has_avx512_vnni() && (more_features() >> 5 & 1); }

bool has_amx() {
#if defined(__linux__)
  const unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  // AVX512_BF16 for the conversions.
  if (!has_avx512_bf16() || (Cpuid(7).d & wanted) != wanted) return false;
  if ((saved_state() & 0x60000) != 0x60000) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx_int8() { return has_amx() && (Cpuid(7).d >> 25 & 1); }
#elif defined(__aarch64__) && defined(__linux__)
bool has_neon_bf16() {                        // BFDOT and BFMMLA
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & kBf16;
}
#endif

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// Engines of int8 products, and whether the processor has the instruction.
struct Int8 {
  bool (*usable)();
  const Engine *f32, *bf16;
};
constexpr Int8 emulated{always, &portable_int8_f32, &portable_int8_bf16};
#if defined(RX_HAVE_AVX2_VNNI)
constexpr Int8 on_avx2{has_avx_vnni, &avx2_vnni_int8_f32, &avx2_vnni_int8_bf16};
#else
constexpr Int8 on_avx2 = emulated;
#endif
#if defined(RX_HAVE_AVX512_VNNI)
constexpr Int8 on_avx512{has_avx512_vnni, &vnni_int8_f32, &vnni_int8_bf16};
#else
constexpr Int8 on_avx512 = emulated;
#endif
#if defined(RX_HAVE_AVX512_BF16)
constexpr Int8 on_dot{has_avx512_bf16, on_avx512.f32, &dot_int8};
#endif
#if defined(RX_HAVE_AMX)
constexpr Int8 on_amx{has_amx_int8, on_avx512.f32, &amx_int8};
#endif

struct Isa {
  const char* name;
  bool (*usable)();
  const Engine *f32, *bf16;
  const Int8& int8;
};

const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> isas = {
      {"portable", always, &portable_f32, &portable_bf16, emulated},
#if defined(RX_HAVE_AVX2)
      {"avx2", has_avx2, &avx2_f32, &avx2_bf16, on_avx2},
#endif
#if defined(RX_HAVE_AVX512)
      {"avx512", has_avx512, &avx512_f32, &avx512_bf16, on_avx512},
#endif
#if defined(RX_HAVE_AVX512_BF16)
      {"avx512_bf16", has_avx512_bf16, &avx512_f32, &dot_bf16, on_dot},
#endif
#if defined(RX_HAVE_AMX)
      {"amx", has_amx, &avx512_f32, &amx_bf16, on_amx},
#endif
#if defined(RX_HAVE_AMX_SPLIT)
      {"amx_split", has_amx, &amx_f32, &amx_bf16, on_amx},
#endif
#if defined(RX_HAVE_NEON)
      {"neon", always, &neon_f32, &neon_bf16, emulated},
#endif
#if defined(RX_HAVE_NEON_BF16) && defined(__linux__)
      {"neon_bf16", has_neon_bf16, &neon_f32, &bfdot_bf16, emulated},
#endif
#if defined(RX_HAVE_NEON_BFMMLA) && defined(__linux__)
      {"neon_bfmmla", has_neon_bf16, &neon_f32, &bfmmla_bf16, emulated},
#endif
  };
  return isas;
}

// Asked once: a virtual machine leaves for its host at every CPUID, 0.4 ms for all of ours.
const std::vector<const Isa*>& usable() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> isas;
    for (const Isa& isa : all_isas())
      if (isa.usable()) isas.push_back(&isa);
    return isas;
  }();
  return found;
}
// At load: a fork while another thread asks would leave the answer half made in the child.
[[maybe_unused]] const bool asked = !usable().empty();

// What it adds to the one before, if that is no gain everywhere: products of pairs of bf16, or fp32
// products by AMX.
const Engine* Isa::* added(const std::string& name) {
  if (name == "amx_split") return &Isa::f32;
  const bool dot = name == "avx512_bf16" || name == "neon_bf16" || name == "neon_bfmmla";
  return dot ? &Isa::bf16 : nullptr;
}
constexpr int kSampleColumns[] = {64, 256};  // of a dot core; of AMX, which cuts its rows first

const Isa& isa_of(const std::string& name) {
  for (const Isa* isa : usable())
    if (isa->name == name) return *isa;
  throw std::runtime_error("no engine '" + name + "' here; this machine has " +
                           joined(usable_isas()));
}

const Int8& int8_of(const Isa& isa) { return isa.int8.usable() ? isa.int8 : emulated; }

const Engine* engine_for(const std::string& name, Dtype state, bool int8) {
  const Isa& isa = isa_of(name);
  const Engine *f32 = isa.f32, *bf16 = isa.bf16;
  if (int8) f32 = int8_of(isa).f32, bf16 = int8_of(isa).bf16;
  return state == Dtype::f32 ? f32 : bf16;
}

// Whether weights are codes, all of them.
bool are_int8(const std::vector<RawBlock>& blocks) {
  size_t codes = 0, all = 0;
  for (const RawBlock& block : blocks)
    for (const RawWeight& weight : block.matrix) {
      all += weight.data != nullptr;
      codes += weight.dtype == Dtype::int8;
    }
  if (codes != 0 && codes != all)
    throw std::invalid_argument("recurx cpu engine: expected codes for all weights or for none");
  return codes != 0;
}

// Four weights a block.
std::vector<RawBlock> in_blocks(const std::vector<RawWeight>& weights) {
  std::vector<RawBlock> blocks(weights.size() / weights_per_block);
  for (size_t i = 0; i < blocks.size(); ++i)
    std::copy_n(&weights[i * weights_per_block], weights_per_block, blocks[i].matrix);
  return blocks;
}

}  // namespace

const Engine& fp32_engine(const std::string& isa) { return *isa_of(isa).f32; }

bool has_int8(const std::string& name) { return int8_of(isa_of(name)).f32 != emulated.f32; }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : usable()) names.push_back(isa->name);
  return names;
}

std::string best_isa(const std::vector<std::string>& names, const std::vector<double>& gains) {
  size_t best = names.size() - gains.size() - 1;
  double gain = 1.0;
  for (size_t i = 0; i < gains.size(); ++i)
    if (gains[i] >= kLeastGain * gain) best = names.size() - gains.size() + i, gain = gains[i];
  return names[best];
}

const std::vector<double>& isa_gains() {
  static const std::vector<double> gains = [] {
    const auto core = added(usable().back()->name);
    if (!core) return std::vector<double>();
    std::vector<const Engine*> cores;  // last first, down to the first that needs no measurement
    for (size_t i = usable().size(); i-- > 0;) {
      cores.push_back(usable()[i]->*core);
      if (added(usable()[i]->name) != core) break;
    }
    const int columns = kSampleColumns[core == &Isa::f32];
    std::vector<double> best(cores.size(), 1.0);
    const std::unique_ptr<void, void (*)(void*)> scratch(allocate(kSampleBytes), std::free);
    const auto seconds = [&](const Engine* engine) {
      engine->sample_product(scratch.get(), columns);  // warms clock, caches and branches
      const auto start = std::chrono::steady_clock::now();
      engine->sample_product(scratch.get(), columns);
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    for (int round = 0; round < 12; ++round)
      for (size_t i = 0; i < cores.size(); ++i) best[i] = std::min(best[i], seconds(cores[i]));
    std::vector<double> found;
    for (size_t i = cores.size() - 1; i-- > 0;) found.push_back(best.back() / best[i]);
    return found;
  }();
  return gains;
}

std::string chosen_isa() {
  const char* threads = std::getenv("RECURX_CPU_THREADS");
  if (threads && *threads && std::strcmp(threads, "own") && std::strcmp(threads, "openmp"))
    throw std::runtime_error(std::string("RECURX_CPU_THREADS: expected own or openmp, got '") +
                             threads + "'. Unset it to use PyTorch's threads where there are any.");
  const std::vector<std::string> names = usable_isas();
  const char* wanted = std::getenv("RECURX_CPU_ISA");
  if (!wanted || !*wanted) return best_isa(names, isa_gains());
  for (const std::string& name : names)
    if (name == wanted) return name;
  throw std::runtime_error("RECURX_CPU_ISA: expected one of " + joined(names) +
                           " (what this processor and this build have), got '" + wanted +
                           "'. Unset it to use the best.");
}

Packed::Packed(const std::vector<BlockShape>& shapes, const std::vector<RawWeight>& weights,
               Dtype state, const std::string& isa)
    : Packed(shapes, in_blocks(weights), state, isa) {}

Packed::Packed(const std::vector<BlockShape>& shapes, const std::vector<RawBlock>& weights,
               Dtype state, const std::string& isa)
    : engine_(engine_for(isa, state, are_int8(weights))),
      memory_(nullptr, std::free),
      blocks_(shapes.size()) {
  for (const BlockShape& shape : shapes) check(shape, are_int8(weights));
  for (const BlockShape& shape : shapes) bytes_ += engine_->packed_bytes(shape);
  memory_.reset(allocate(bytes_));
  char* out = (char*)memory_.get();
  for (size_t i = 0; i < shapes.size(); ++i) {
    check(shapes[i], weights[i]);
    engine_->pack(shapes[i], weights[i].matrix, out, &blocks_[i]);
    out += engine_->packed_bytes(shapes[i]);
    for (int v = 0; v < vectors_per_block; ++v) {
      if (!weights[i].vector[v].data) continue;
      vectors_.push_back(pack_vector(shapes[i], v, weights[i].vector[v]));
      blocks_[i].vector[v] = vectors_.back().data();
    }
  }
}

}  // namespace rx::cpu
