// wgmma.cpp - asynchronous matrix products of a warpgroup.
//
// Accumulators live in the threads' arrays. While a product is in flight the emulator keeps them in
// a 64 x n buffer of its own and fills the arrays with NaN, as the hardware leaves the registers
// undefined; wgmma_wait puts them back. Register operands (A) are copied at issue.
#include "wgmma.h"

#include "multiply.h"

namespace emu {

uint32_t swizzled(uint32_t addr, Swizzle);  // copies.cpp

// ---- operands
// Where element (r along M or N, k) of an operand lies. K-major: rows of `span` bytes in groups of
// eight that are `stride` apart. MN-major: the same with the roles of r and k exchanged, `leading`
// between spans.
struct Descriptor {
  uint32_t start, leading, stride, span;
  Swizzle swizzle;

  explicit Descriptor(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4),
        leading(uint32_t(d >> 16 & 0x3fff) << 4),
        stride(uint32_t(d >> 32 & 0x3fff) << 4) {
    static const Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
    swizzle = kModes[d >> 62];
    span = uint32_t(swizzle);
    if (d >> 49 & 7) die("wgmma descriptor: base offset %u is not emulated", unsigned(d >> 49 & 7));
  }

  uint32_t address(uint32_t r, uint32_t k, bool mn_major) const {
    uint32_t a, w = span / 2;
    if (!mn_major)
      a = span ? start + r / 8 * stride + r % 8 * span + k * 2
               : start + r / 8 * stride + k / 8 * leading + r % 8 * 16 + k % 8 * 2;
    else
      a = span ? start + r / w * leading + k / 8 * stride + k % 8 * span + r % w * 2
               : start + r / 8 * stride + k / 8 * leading + k % 8 * 16 + r % 8 * 2;
    return swizzled(a, swizzle);
  }
};

// Calls f(first r, first k, address) for every 16 bytes of a rows x 16 operand.
template <class F>
static void each_chunk(uint64_t descriptor, int rows, bool mn_major, F f) {
  Descriptor d(descriptor);
  for (int r = 0; r < rows; r += mn_major ? 8 : 1)
    for (int k = 0; k < 16; k += mn_major ? 1 : 8)
      f(r, k, d.address(uint32_t(r), uint32_t(k), mn_major));
}

// out[r * r_step + k * k_step] = element (r, k), as float
static void unpack(const Cta& cta, uint64_t descriptor, int rows, bool mn_major, float* out,
                   int r_step, int k_step, float sign) {
  each_chunk(descriptor, rows, mn_major, [&](int r, int k, uint32_t at) {
    uint16_t e[8];
    memcpy(e, cta.smem + at, 16);
    float* o = out + r * r_step + k * k_step;
    int step = mn_major ? r_step : k_step;
    for (int i = 0; i < 8; i++) o[i * step] = sign * bf16_to_float(e[i]);
  });
}

static void execute(const Cta& cta, WgmmaOp& op) {
  if (op.done) return;
  op.done = true;
  const WgmmaArgs& a = op.args;
  alignas(32) float A[64 * 16], B[16 * 256];
  if (!op.a_registers.empty())
    memcpy(A, op.a_registers.data(), sizeof A);
  else
    unpack(cta, a.a, 64, a.trans_a, A, 16, 1, a.negate_a ? -1.f : 1.f);
  unpack(cta, a.b, a.n, a.trans_b, B, 1, a.n, a.negate_b ? -1.f : 1.f);
  auto& D = op.accumulator->buffer;
  if (!a.scale_d) std::fill(D.begin(), D.end(), 0.f);
  multiply_add(D.data(), A, B, 64, a.n, a.n);
  std::vector<float>().swap(op.a_registers);
  gang->stats.wgmma++;
  gang->stats.flop += 2ull * 64 * 16 * unsigned(a.n);
}

// ---- accumulators
// A signalling NaN: arithmetic on it makes another number of it, so that a write shows.
static constexpr uint32_t kInFlight = 0x7fa0'1234;

// Thread t of the warpgroup: warp t / 32 owns 16 rows; within them the layout of mma.sync.
static void exchange(Accumulator& acc, unsigned t, bool to_registers) {
  unsigned row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  float* d = acc.registers[t];
  for (unsigned j = 0; j < unsigned(acc.n) / 8; j++)
    for (unsigned e = 0; e < 4; e++) {
      float& x = acc.buffer[(row + e / 2 * 8) * unsigned(acc.n) + j * 8 + column + e % 2];
      if (to_registers) {
        d[j * 4 + e] = x;
      } else {
        x = d[j * 4 + e];
        memcpy(d + j * 4 + e, &kInFlight, 4);
      }
    }
}

static Accumulator* accumulator_for(Warpgroup& g) {
  float* d = g.args[0].d;
  for (auto& acc : g.accumulators)
    if (acc->registers[0] == d) return acc.get();
  Accumulator* acc = g.accumulators.emplace_back(std::make_unique<Accumulator>()).get();
  acc->n = g.args[0].n;
  acc->buffer.resize(size_t(64 * acc->n));
  for (unsigned t = 0; t < 128; t++) {
    acc->registers[t] = g.args[t].d;
    exchange(*acc, t, false);
  }
  return acc;
}

static std::vector<float> gather_a(const Warpgroup& g, float sign) {
  std::vector<float> A(64 * 16);
  for (unsigned t = 0; t < 128; t++)
    for (unsigned e = 0; e < 4; e++) {
      unsigned row = t / 32 * 16 + t % 32 / 4 + e % 2 * 8, k = t % 4 * 2 + e / 2 * 8;
      uint32_t v = g.args[t].a_regs[e];
      A[row * 16 + k] = sign * bf16_to_float(uint16_t(v));
      A[row * 16 + k + 1] = sign * bf16_to_float(uint16_t(v >> 16));
    }
  return A;
}

// ---- issue
static void check_operand(const Cta& cta, uint64_t descriptor, int rows, bool mn_major,
                          const Event& e, WarpgroupView& view) {
  each_chunk(descriptor, rows, mn_major, [&](int r, int k, uint32_t at) {
    if (at < kSharedBase || at + 16 > cta.end)
      die("%s: element (%d, %d) at shared byte %ld is outside shared memory",
          describe_code(e.where).c_str(), r, k, long(at) - long(cta.dyn));
    gang->race.touch(cta.smem + at, 16, false, e, View(view));
  });
}

static void issue(const Cta& cta, Warpgroup& g) {  // all 128 threads have arrived
  auto op = std::make_unique<WgmmaOp>();
  op->args = g.args[0];
  const WgmmaArgs& a = op->args;
  op->accumulator = accumulator_for(g);
  uint32_t number = uint32_t(g.ops.size());
  op->accumulator->last = number;
  if (a.a_regs) op->a_registers = gather_a(g, a.negate_a ? -1.f : 1.f);

  WarpgroupView view;
  if (gang->race.on)
    for (Thread* t : g.threads) view.rows.push_back(gang->race.row(t));
  op->event = gang->race.wgmma_event(cta, g.index, "wgmma");
  Event reads_a = op->event, reads_b = op->event;
  reads_a.where = named("wgmma operand A");
  reads_b.where = named("wgmma operand B");
  if (!a.a_regs) check_operand(cta, a.a, 64, a.trans_a, reads_a, view);
  check_operand(cta, a.b, a.n, a.trans_b, reads_b, view);

  g.ops.push_back(std::move(op));
  for (Thread* t : g.threads) t->wgmmas.add(number);
}

static void execute_up_to(const Cta& cta, Warpgroup& g, size_t count) {
  for (; g.executed < count; g.executed++) execute(cta, *g.ops[g.executed]);
}

static Warpgroup& my_warpgroup() {
  Thread* me = self();
  size_t g = me->tid.x / 128;
  if (g * 128 + 128 > me->cta->thread_count) die("wgmma needs four whole warps");
  return *me->cta->warpgroups[g];
}

static void join(const WgmmaArgs& mine, bool at_once) {
  Thread* me = self();
  Warpgroup& g = my_warpgroup();
  const Cta& cta = *me->cta;
  unsigned t = me->tid.x % 128;
  if (!me->wgmma_fenced) die("wgmma without wgmma.fence since its registers were last written");
  if (mine.n % 8 || mine.n < 8 || mine.n > 256) die("wgmma: n = %d", mine.n);
  if (g.arrived) {
    const WgmmaArgs& o = g.args[g.first];
    if (o.a != mine.a || o.b != mine.b || o.n != mine.n || o.scale_d != mine.scale_d ||
        o.trans_a != mine.trans_a || o.trans_b != mine.trans_b)
      die("wgmma: threads of one warpgroup disagree on descriptors, shape or scale-d");
  } else {
    g.first = t;
  }
  g.args[t] = mine;
  g.threads[t] = me;
  if (++g.arrived < 128) return block({Wait::kWgmma, "wgmma"});
  g.arrived = 0;
  issue(cta, g);
  if (at_once || happens_now()) execute_up_to(cta, g, g.ops.size());
  if (at_once) {
    for (auto& acc : g.accumulators)
      for (unsigned i = 0; i < 128; i++) exchange(*acc, i, true);
    g.accumulators.clear();
  }
  for (Thread* other : g.threads)
    if (other != me) make_ready(other);
}

void wgmma(const WgmmaArgs& args) {
  aligned("wgmma", __builtin_return_address(0));
  join(args, false);
}
void wgmma_now(const WgmmaArgs& args) {
  aligned("wgmma", __builtin_return_address(0));
  join(args, true);
}

// ---- fence, commit, wait
void wgmma_fence() {
  aligned("wgmma.fence", __builtin_return_address(0));
  self()->wgmma_fenced = true;
}
void wgmma_commit() {
  aligned("wgmma.commit_group", __builtin_return_address(0));
  self()->wgmmas.commit();
}

static void check_untouched(const Accumulator& acc, unsigned lane) {
  for (int i = 0; i < acc.n / 2; i++)
    if (memcmp(acc.registers[lane] + i, &kInFlight, 4))
      die("wgmma: accumulator %d was written while products were in flight", i);
}

// Gives a thread the accumulators that no product in flight uses any more.
static void hand_back(Warpgroup& g, Thread* t, int64_t last_done) {
  unsigned lane = t->tid.x % 128;
  for (size_t i = 0; i < g.accumulators.size();) {
    Accumulator& acc = *g.accumulators[i];
    if (int64_t(acc.last) <= last_done && !acc.returned[lane]) {
      check_untouched(acc, lane);
      exchange(acc, lane, true);
      acc.returned[lane] = true;
      acc.returned_count++;
      t->wgmma_fenced = false;
    }
    if (acc.returned_count == 128)
      g.accumulators.erase(g.accumulators.begin() + long(i));
    else
      i++;
  }
}

void wgmma_wait(int groups_left) {
  aligned("wgmma.wait_group", __builtin_return_address(0));
  Thread* me = self();
  Warpgroup& g = my_warpgroup();
  int64_t last_done = -1;
  while (int(me->wgmmas.committed()) > groups_left)
    me->wgmmas.pop_group([&](uint32_t number) {
      last_done = number;
      execute_up_to(*me->cta, g, number + 1);
      gang->race.completed(me, g.ops[number]->event);
    });
  hand_back(g, me, last_done);
}

// ---- setmaxnreg
// Warpgroups exchange the registers that the launch gave the CTA: at most 65536 over its threads,
// in eights a thread. An increase waits until others have given up enough.
static void grant_registers(Cta& cta) {
  int pool = 0;
  for (const RegisterShare& r : cta.registers) pool -= r.held;
  pool += int(65536 / cta.thread_count / 8 * 8 * cta.registers.size());
  for (RegisterShare& r : cta.registers) {
    if (r.waiting.size() < 128 || r.wanted - r.held > pool) continue;
    pool -= r.wanted - r.held;
    r.held = r.wanted;
    wake(r.waiting);
  }
}

void setmaxnreg(int registers, bool increase) {
  aligned("setmaxnreg", __builtin_return_address(0));
  Thread* me = self();
  if (registers % 8 || registers < 24 || registers > 256)
    die("setmaxnreg %d: a multiple of 8 in 24..256 is needed", registers);
  RegisterShare& mine = me->cta->registers[me->tid.x / 128];
  if (!increase && registers > mine.held)
    die("setmaxnreg.dec %d: the threads hold %d at most", registers, mine.held);
  if (!mine.waiting.empty() && mine.wanted != registers)
    die("setmaxnreg: threads of one warpgroup want %d and %d", mine.wanted, registers);
  mine.wanted = registers;
  mine.waiting.push_back(me);
  for (int granted = 0; granted < 2; granted++) grant_registers(*me->cta);  // dec first, then inc
  block({Wait::kRegisters, "setmaxnreg", uint32_t(registers)});
}

}  // namespace emu
