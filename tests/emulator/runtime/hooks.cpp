// hooks.cpp - how the race checker sees plain loads and stores, and the controls for the host.
//
// Kernels are compiled with g++ -fsanitize=thread, which puts a call in front of every memory
// access. The sanitizer's own library is not linked: the calls end here.
#include "state.h"

namespace emu {

extern __thread const uint8_t* window_base;
extern __thread size_t window_bytes;

static void check(const void* p, size_t n, bool write, uint64_t where, bool unchanged = false,
                  bool constant = false) {
  Gang* g = gang;
  g->stats.accesses++;
  if (g->config.yield_chance > 0 && (g->random() & 0xffff) < g->config.yield_chance * 65536)
    yield();
  window_check(static_cast<const uint8_t*>(p), n, write ? "write" : "read");
  size_t offset = size_t(static_cast<const uint8_t*>(p) - window_base);
  if (g->config.banks && offset < window_bytes) count_banks(offset % kWindow, n, where);
  if (!g->race.on) return;
  Event event = g->race.thread_event(self(), where);
  event.unchanged = unchanged;
  event.constant = constant;
  g->race.touch(p, n, write, event, g->race.view(self()));
}

PtxEntry (*find_ptx)(const void* kernel, size_t* static_smem) = nullptr;

void access(const void* p, size_t n, bool write, const char* what, bool unchanged) {
  check(p, n, write, named(what), unchanged);
}

void access_constant(const void* p, size_t n, const char* what) {
  check(p, n, false, named(what), false, true);
}

static inline void hook(const void* p, size_t n, bool write, void* caller) {
  size_t offset = size_t(static_cast<const uint8_t*>(p) - window_base);
  bool shared = offset < window_bytes;
  if (!shared && !watching()) return;
  if (cur) check(p, n, write, uint64_t(caller));
}

Config& config() {
  static Config c = [] {
    auto number = [](const char* name, double otherwise) {
      const char* s = getenv(name);
      return s ? atof(s) : otherwise;
    };
    Config d;
    d.async = Async(int(number("EMU_ASYNC", int(d.async))));
    d.random_order = number("EMU_RANDOM", 1) != 0;
    d.seed = unsigned(number("EMU_SEED", 1));
    d.race = number("EMU_RACE", 1) != 0;
    d.yield_chance = number("EMU_YIELD", 0);
    d.workers = int(number("EMU_WORKERS", 2));
    return d;
  }();
  return c;
}

}  // namespace emu

extern "C" {

#define EMU_HOOK(n)                                                                               \
  void __tsan_read##n(void* p) { emu::hook(p, n, false, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { emu::hook(p, n, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##n(void* p) { emu::hook(p, n, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { emu::hook(p, n, true, __builtin_return_address(0)); }
EMU_HOOK(1)
EMU_HOOK(2)
EMU_HOOK(4)
EMU_HOOK(8)
EMU_HOOK(16)
void __tsan_read_range(void* p, size_t n) { emu::hook(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { emu::hook(p, n, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// ---- controls, for ctypes
int emu_set(const char* name, double value) {
  emu::Config& c = emu::config();
  std::string n = name;
  if (n == "async")
    c.async = emu::Async(int(value));
  else if (n == "random_order")
    c.random_order = value != 0;
  else if (n == "seed")
    c.seed = unsigned(value);
  else if (n == "race")
    c.race = value != 0;
  else if (n == "reader_may_fence")
    c.reader_may_fence = value != 0;
  else if (n == "proxies")
    c.proxies = value != 0;
  else if (n == "copies_may_write")
    c.copies_may_write = value != 0;
  else if (n == "together")
    c.together = value != 0;
  else if (n == "aligned")
    c.aligned = value != 0;
  else if (n == "yield_chance")
    c.yield_chance = value;
  else if (n == "workers")
    c.workers = int(value);
  else if (n == "banks")
    c.banks = value != 0;
  else if (n == "max_switches")
    c.max_switches = uint64_t(value);
  else
    return 1;
  return 0;
}

double emu_stat(const char* name) {
  const emu::Stats& s = emu::stats();
  std::string n = name;
  if (n == "switches") return double(s.switches);
  if (n == "mma") return double(s.mma);
  if (n == "wgmma") return double(s.wgmma);
  if (n == "flop") return double(s.flop);
  if (n == "async_bytes") return double(s.async_bytes);
  if (n == "accesses") return double(s.accesses);
  if (n == "ldmatrix") return double(s.ldmatrix);
  if (n == "ldmatrix_conflicts") return double(s.ldmatrix_conflicts);
  if (n == "plain_shared") return double(s.plain_shared);
  if (n == "plain_conflicts") return double(s.plain_conflicts);
  return -1;
}

void emu_reset_stats() { emu::stats() = {}; }
void emu_watch(const void* p, size_t bytes, const char* name) { emu::watch(p, bytes, name); }
void emu_unwatch_all() { emu::unwatch_all(); }

}  // extern "C"
