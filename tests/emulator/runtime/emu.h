// emu.h - run CUDA C++ kernels on a CPU. The whole interface of the emulator.
//
// One fiber stands for one CUDA thread; the CTAs of one cluster are scheduled together on one OS
// thread and clusters spread over the cores. Every function below is called from inside a kernel
// (by the rx:: wrappers, or by C++ translated from PTX) and acts for the CUDA thread that calls it,
// except launch(), config(), stats() and watch(), which the host calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

// ---- who am I
struct ThreadContext {
  dim3 tid, bid, bdim, gdim, cdim;  // threadIdx, blockIdx, blockDim, gridDim, cluster shape
  unsigned lane, warp, cta_rank;    // within the warp, the CTA, the cluster
};
extern __thread ThreadContext* cur;  // __thread: no initialisation check at each use

// ---- host side
struct Error : std::runtime_error {  // a fault of the kernel: race, deadlock, misuse, bad address
  using std::runtime_error::runtime_error;
};
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Async { kEager = 0, kLazy = 1, kRandom = 2 };  // when asynchronous work is carried out
struct Config {  // EMU_ASYNC, EMU_RANDOM, EMU_SEED, EMU_RACE, EMU_YIELD, EMU_WORKERS
  Async async = Async::kRandom;
  bool random_order = true;  // random choice of the next warp; false: round robin
  unsigned seed = 1;
  bool race = true;    // the race checker; plain ld/st need an instrumented build, see hooks.cpp
  bool banks = false;  // count bank conflicts of plain loads and stores too
  // fence.proxy.async counts in any thread that knows of the write, as in PTX's memory model. Off:
  // it must be the writer's own, which is the rule of this project's kernels and finds more
  // mistakes.
  bool reader_may_fence = false;
  bool proxies = true;            // whether wgmma needs a fence.proxy.async after other writes
  bool copies_may_write = false;  // threads of a CTA may store one value with one instruction
  bool aligned = true;            // .aligned instructions want a whole warp at one call site
  bool together = false;    // all CTAs of every launch interleaved, as those of a cooperative one
  double yield_chance = 0;  // chance of a switch at each instrumented access
  int workers = 2;          // OS threads
  uint64_t max_switches = 2'000'000'000;  // a launch that needs more is reported as a livelock
};
Config& config();

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;    // CTAs a cluster, along x
  size_t smem = 0;         // dynamic shared memory, bytes
  size_t static_smem = 0;  // bytes of static shared memory, placed at kSharedBase (PTX only)
  bool cooperative =
      false;  // schedule the whole grid together, so that CTAs may wait for each other
  const char* name = "kernel";
};
void launch(const Launch&, const std::function<void()>& body);  // throws Error

// A library of translated PTX sets this: the PTX of the kernel at this address, or null. rx::launch
// then runs the PTX in the place of the C++, launched in the same way.
using PtxEntry = void (*)(const uint8_t* parameters);
extern PtxEntry (*find_ptx)(const void* kernel, size_t* static_smem);

// Global memory is checked for races only in ranges that the host names (scratch, in-out tensors).
void watch(const void* base, size_t bytes, const char* name);
void unwatch_all();

struct Stats {
  uint64_t switches, mma, wgmma, flop, async_bytes, ldmatrix, ldmatrix_conflicts, accesses;
  uint64_t plain_shared, plain_conflicts;  // warp instructions and extra passes, if Config::banks
};
Stats& stats();

// ---- shared memory
// A 32-bit shared address is (rank + 1) << 24 | offset; rank field 0 means "my own CTA". Offsets
// below kSharedBase are never valid, so that a null address faults. Dynamic shared memory starts at
// dyn_offset(static bytes) and is aligned to 1024.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t dyn_offset(size_t static_smem) {
  return uint32_t((kSharedBase + static_smem + 1023) / 1024 * 1024);
}
constexpr size_t kMaxShared = 232448;  // the most a CTA of sm_90 may ask for
uint8_t* dyn_smem();
uint32_t cvta_shared(const void* generic);
uint8_t* shared_ptr(uint32_t addr);  // checks the rank and that the offset is inside
// The shared::cluster address of the same variable in CTA `rank`.
uint32_t mapa(uint32_t addr, unsigned rank);
// The race hook. `unchanged`: a write of the bytes that are there already; lanes of one warp may
// make it together by one instruction (`what`), as compilers do with a value that all of them hold.
void access(const void* p, size_t n, bool write, const char* what = "ld/st",
            bool unchanged = false);
// ld.global.nc: memory that nobody writes during the launch, for its cache is never emptied.
void access_constant(const void* p, size_t n, const char* what = "ld.global.nc");

uint64_t global_time_ns();  // of the calling CTA: 32 more at each call, so that runs repeat

// ---- synchronisation
// Who is ordered by a release, an acquire or a fence: the threads of the caller's CTA, of its
// cluster, or all.
enum class Scope : uint8_t { kCta, kCluster, kGpu };
// C++ translated from PTX names the next .aligned instruction by its line; null: it is not aligned.
// Elsewhere the place in the code that calls the emulator stands for the instruction.
void at(const char* site);
void bar_sync(int id, int threads);  // threads -1: every live thread of the CTA
void bar_arrive(int id, int threads);
void syncwarp(uint32_t mask);
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait();
void yield();
enum class Order { kRelaxed, kAcquire, kRelease, kAcqRel };
// To be called before an atomic, an ld.acquire or an st.release.
void atomic_order(const void* p, size_t n, Order, Scope = Scope::kGpu);
// These two call it themselves.
uint32_t atomic_add(uint32_t* p, uint32_t n, Order, Scope = Scope::kGpu);
uint32_t atomic_load(const uint32_t* p, Order, Scope = Scope::kGpu);
void fence(Scope);       // membar, fence.acq_rel, fence.sc
void proxy_fence();      // fence.proxy.async
void mbar_init_fence();  // fence.mbarrier_init.release.cluster

void mbar_init(uint32_t bar, uint32_t count);
void mbar_inval(uint32_t bar);
// A local or mapa'd address. At CTA scope, as the PTX default has it, an arrival at another CTA's
// barrier orders this thread's reads alone: see clocks.h.
void mbar_arrive(uint32_t bar, uint32_t n = 1, Scope = Scope::kCta);
void mbar_expect_tx(uint32_t bar, uint32_t bytes);
void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes);
bool mbar_test(uint32_t bar, uint32_t parity, Scope = Scope::kCta);
void mbar_wait(uint32_t bar, uint32_t parity, Scope = Scope::kCta);

// ---- warp collectives
enum class Shfl { kIdx, kUp, kDown, kXor };
uint32_t shfl(uint32_t mask, uint32_t v, int lane_or_delta, Shfl mode);
uint32_t ballot(uint32_t mask, bool p);
void ldmatrix(uint32_t addr, uint32_t* out, int n, bool trans);
void stmatrix(uint32_t addr, const uint32_t* in, int n, bool trans);
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c);
void mma_m32n16k16_bf16(float* d00, float* d01, float* d10, float* d11, const uint32_t* a0,
                        const uint32_t* a1, const uint32_t* b);  // four in one, d += a * b
void mma_m16n16k16_bf16(float* d0, float* d1, const uint32_t* a, const uint32_t* b);
void mma_m32n8k16_bf16(float* d0, float* d1, const uint32_t* a0, const uint32_t* a1,
                       const uint32_t* b);

// ---- asynchronous copies
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes);  // the rest is zero-filled
void cp_commit();
void cp_wait(int groups_left);

enum class Swizzle : uint32_t { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };
struct alignas(64) TensorMap {  // fits in the 128 bytes of a CUtensorMap; strides in bytes
  const uint8_t* base;
  uint32_t elem_bytes, rank;
  uint64_t dim[3], stride[3];
  uint32_t box[3];
  Swizzle swizzle;
};
static_assert(sizeof(TensorMap) == 128, "must fit in a CUtensorMap");
// cta_mask 0: no multicast, destination and barrier are the addresses given.
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint32_t cta_mask);
void tensor_load(uint32_t dst, const TensorMap*, int x, int y, int z, uint32_t bar,
                 uint32_t cta_mask);
void bulk_to_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar);
void st_async(uint32_t dst, const void* value, uint32_t bytes, uint32_t bar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes);
void bulk_commit();
void bulk_wait(int groups_left,
               bool read_only = false);  // read_only: sources may be reused, no more

// ---- warpgroup
void setmaxnreg(int registers, bool increase);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);
// D[64, n] (fp32, 128 threads) += A[64, 16] * B[16, n], bf16. a_regs null: A from descriptor a.
// The emulator keeps `d` until wgmma_wait and fills it with NaN until then: keep the array in
// place.
struct WgmmaArgs {
  float* d;
  const uint32_t* a_regs;
  uint64_t a, b;
  int n, scale_d, trans_a, trans_b, negate_a, negate_b;
};
void wgmma(const WgmmaArgs&);
void wgmma_now(const WgmmaArgs&);  // results reach `d` at once (C++ translated from PTX)

// ---- bf16
inline float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {  // round to nearest even, NaN to the canonical NaN
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

}  // namespace emu
