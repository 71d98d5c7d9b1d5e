// launch.cpp - memory of a gang, its threads, and the loop over the grid.
#include <sys/mman.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "state.h"
#include "wgmma.h"

namespace emu {

static constexpr size_t kStack = 160 << 10;  // bytes a thread, the lowest page is a guard

// Registers hold anything when a thread starts: its first frames begin as NaN, in any float type.
static constexpr size_t kPoisoned = 8 << 10;

// Stacks one power of two apart would all use the same few sets of every cache, so each begins a
// different number of lines below its top.
static size_t stack_color(unsigned thread) { return thread * 13 % 512 * 64; }

// ---- memory
// Kept between launches: mapping, guarding and touching pages costs more than a small kernel.
class Arena {
 public:
  ~Arena() { release(); }
  void release() {
    if (base_) munmap(base_, bytes_);
    base_ = nullptr, bytes_ = 0;
  }
  uint8_t* at_least(size_t bytes, size_t guard_every = 0) {
    if (bytes <= bytes_) return base_;
    release();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw Error("the emulator cannot map " + std::to_string(bytes) + " bytes");
    base_ = static_cast<uint8_t*>(p);
    bytes_ = bytes;
    for (size_t i = 0; guard_every && i < bytes; i += guard_every)
      mprotect(base_ + i, 4096, PROT_NONE);
    return base_;
  }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* base_ = nullptr;
  size_t bytes_ = 0;
};

struct Memory {
  Arena stacks, windows;
};

// A guard page splits a mapping in two, and a process has 65,530 mappings (vm.max_map_count) for
// hundreds of libraries with a pool each: only the stacks of a small gang are kept.
static constexpr size_t kKeptStacks = 64;
static std::mutex memory_lock;
static std::vector<std::unique_ptr<Memory>> unused_memory;

static std::unique_ptr<Memory> take_memory() {
  std::lock_guard<std::mutex> hold(memory_lock);
  if (unused_memory.empty()) return std::make_unique<Memory>();
  auto m = std::move(unused_memory.back());
  unused_memory.pop_back();
  return m;
}
static void give_back_memory(std::unique_ptr<Memory> m) {
  if (m->stacks.bytes() > kKeptStacks * kStack) m->stacks.release();
  std::lock_guard<std::mutex> hold(memory_lock);
  unused_memory.push_back(std::move(m));
}

__thread const uint8_t* window_base;  // what hooks.cpp compares addresses with
__thread size_t window_bytes;

uint64_t global_time_ns() { return self()->cta->time_ns += 32; }

uint8_t* dyn_smem() { return self()->cta->smem + self()->cta->dyn; }

uint32_t cvta_shared(const void* generic) {
  size_t offset = size_t(static_cast<const uint8_t*>(generic) - window_base);
  if (offset >= window_bytes) die("cvta: the pointer is not one to shared memory");
  const Cta& owner = gang->ctas[offset / kWindow];
  uint32_t in_cta = uint32_t(offset % kWindow);
  return &owner == self()->cta ? in_cta : (owner.rank + 1) << 24 | in_cta;
}

uint8_t* shared_in(Cluster& cluster, unsigned rank, uint32_t addr) {
  unsigned named_rank = addr >> 24, offset = addr & 0xffffff;
  if (named_rank) rank = named_rank - 1;
  if (rank >= cluster.ctas.size() || offset < kSharedBase || offset >= cluster.ctas[rank]->end)
    die("0x%x is no shared memory address", addr);
  return cluster.ctas[rank]->smem + offset;
}
uint8_t* shared_ptr(uint32_t addr) {
  return shared_in(*self()->cta->cluster, self()->cta_rank, addr);
}

uint32_t mapa(uint32_t addr, unsigned rank) {
  if (rank >= self()->cta->cluster->ctas.size()) die("mapa: the cluster has no cta %u", rank);
  return (addr & 0xffffff) | (rank + 1) << 24;
}

void window_check(const uint8_t* p, size_t n, const char* what) {
  size_t offset = size_t(p - window_base);
  if (offset >= window_bytes) return;
  const Cta& c = gang->ctas[offset / kWindow];
  size_t in_cta = offset % kWindow;
  if (in_cta < kSharedBase || in_cta + n > c.end)
    die("%s outside shared memory: cta %u dynamic bytes %ld..%ld of %zu", what, c.bid_x,
        long(in_cta) - long(c.dyn), long(in_cta + n) - long(c.dyn), c.end - c.dyn);
  if (!c.live) die("%s on shared memory of cta %u, which has exited", what, c.bid_x);
}

// ---- a gang
static dim3 unflatten(unsigned i, dim3 shape) {
  return dim3(i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y);
}

static void set_up_cta(Gang& g, Cta& c, unsigned block, unsigned threads) {
  const Launch& l = *g.launch;
  c.bid_x = block;
  c.smem = const_cast<uint8_t*>(window_base) + c.index * kWindow;
  c.dyn = dyn_offset(l.static_smem);
  c.end = c.dyn + l.smem;
  memset(c.smem, 0xff, c.end);  // NaN in any float type
  c.live = c.thread_count = threads;
  c.first_thread = c.index * threads;
  c.warps = std::vector<Warp>((threads + 31) / 32);
  // The most that the launch may have given each thread.
  c.registers.resize((threads + 127) / 128);
  for (RegisterShare& r : c.registers) r.held = int(65536 / threads / 8 * 8);
  for (unsigned i = 0; i < (threads + 127) / 128; i++) {
    c.warpgroups.push_back(std::make_unique<Warpgroup>());
    c.warpgroups.back()->index = i;
  }
}

static void set_up_thread(Gang& g, Cta& c, Thread& t, unsigned in_cta) {
  const Launch& l = *g.launch;
  t.id = c.first_thread + in_cta;
  t.cta = &c;
  t.tid = unflatten(in_cta, l.block);
  t.bid = unflatten(c.bid_x, l.grid);
  t.bdim = l.block, t.gdim = l.grid, t.cdim = dim3(l.cluster);
  t.lane = in_cta % 32, t.warp = in_cta / 32, t.cta_rank = c.rank;
  t.home = &c.warps[t.warp];
  t.home->lane[t.lane] = &t;
  t.home->live |= 1u << t.lane;
}

static void set_up(Gang& g, Memory& memory, const Launch& l, unsigned first_block,
                   unsigned blocks) {
  unsigned threads = l.block.x * l.block.y * l.block.z;
  g.launch = &l;
  g.live = blocks * threads;
  g.rng = (g.config.seed * 0x9E3779B97F4A7C15ull) ^ (first_block * 0xD1B54A32D192ED03ull) ^
          0x2545F4914F6CDD1Dull;
  window_bytes = blocks * kWindow;
  window_base = memory.windows.at_least(window_bytes);
  uint8_t* stack = memory.stacks.at_least(g.live * kStack, kStack);
  g.ctas = std::vector<Cta>(blocks);
  g.clusters = std::vector<Cluster>(blocks / l.cluster);
  g.threads = std::vector<Thread>(g.live);
  for (unsigned b = 0; b < blocks; b++) {
    Cta& c = g.ctas[b];
    c.index = b;
    c.rank = b % l.cluster;
    c.cluster = &g.clusters[b / l.cluster];
    c.cluster->ctas.push_back(&c);
    c.cluster->live += threads;
    set_up_cta(g, c, first_block + b, threads);
    for (unsigned i = 0; i < threads; i++) {
      Thread& t = g.threads[c.first_thread + i];
      set_up_thread(g, c, t, i);
      uint8_t* top = stack + (size_t(t.id) + 1) * kStack - stack_color(t.id);
      memset(top - kPoisoned, 0xff, kPoisoned);
      start_fiber(&t, top);
    }
  }
  g.race.start(g);
}

static std::mutex stats_lock;
static Stats total;
Stats& stats() { return total; }

static void add_stats(const Stats& s) {
  std::lock_guard<std::mutex> hold(stats_lock);
  total.switches += s.switches, total.mma += s.mma, total.wgmma += s.wgmma, total.flop += s.flop;
  total.async_bytes += s.async_bytes, total.accesses += s.accesses, total.ldmatrix += s.ldmatrix;
  total.ldmatrix_conflicts += s.ldmatrix_conflicts, total.plain_shared += s.plain_shared;
  total.plain_conflicts += s.plain_conflicts;
}

static std::string run_gang(Memory& memory, const Launch& l, const std::function<void()>& body,
                            unsigned first_block, unsigned blocks) {
  Gang g;
  g.config = config();
  gang = &g;
  g.body = &body;
  try {
    set_up(g, memory, l, first_block, blocks);
    run_to_end(g);
  } catch (const std::exception& e) {
    g.error = e.what();
  }
  add_stats(g.stats);
  gang = nullptr;
  window_bytes = 0;
  return g.error;
}

// ---- the grid
static void check_launch(const Launch& l) {
  unsigned threads = l.block.x * l.block.y * l.block.z;
  unsigned blocks = l.grid.x * l.grid.y * l.grid.z;
  auto refuse = [&](const std::string& why) {
    throw Error(std::string("launch of ") + l.name + ": " + why);
  };
  if (!blocks || !threads || threads > 1024)
    refuse(std::to_string(threads) + " threads in " + std::to_string(blocks) + " CTAs");
  if (!l.cluster || l.cluster > 16 || l.grid.x % l.cluster)
    refuse("grid.x " + std::to_string(l.grid.x) + " in clusters of " + std::to_string(l.cluster));
  if (l.smem + l.static_smem > kMaxShared)
    refuse(std::to_string(l.smem + l.static_smem) + " bytes of shared memory exceed " +
           std::to_string(kMaxShared));
}

void launch(const Launch& l, const std::function<void()>& body) {
  check_launch(l);
  unsigned blocks = l.grid.x * l.grid.y * l.grid.z;
  unsigned each = l.cooperative || config().together ? blocks : l.cluster, gangs = blocks / each;
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  std::string error;
  auto work = [&] {
    auto memory = take_memory();
    for (unsigned i; !failed && (i = next++) < gangs;) {
      std::string e = run_gang(*memory, l, body, i * each, each);
      if (e.empty()) continue;
      std::lock_guard<std::mutex> hold(lock);
      failed = true;
      if (error.empty()) error = e;
    }
    give_back_memory(std::move(memory));
  };
  unsigned workers = std::min(unsigned(std::max(1, config().workers)), gangs);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; i++) others.emplace_back(work);
  work();
  for (auto& t : others) t.join();
  if (failed) throw Error(error);
}

}  // namespace emu
