// warp.cpp - collectives of a warp: the last lane to arrive does the work of all of them.
//
// They exchange data and nothing else: as PTX has it, only __syncwarp orders memory within a warp.
#include "multiply.h"
#include "state.h"

namespace emu {

// The rendezvous of these lanes, or a new one: a diverged warp may have several.
static Rendezvous* find_rendezvous(Warp& w, uint32_t mask, const char* op) {
  for (Rendezvous& r : w.rendezvous)
    if (r.arrived && r.mask == mask) return &r;
  for (Rendezvous& r : w.rendezvous)
    if (!r.arrived) {
      r.mask = mask;
      r.op = op;
      return &r;
    }
  die("%s: the warp is split over too many masks", op);
}

static void complete(Warp& w, Rendezvous& r, uint32_t running) {
  r.work(w, r);
  uint32_t lanes = r.arrived & ~running;
  r.arrived = 0;
  for (; lanes; lanes &= lanes - 1) make_ready(w.lane[size_t(__builtin_ctz(lanes))]);
}

template <class Work>
static void collective(uint32_t mask, const char* op, void* arg, Work work) {
  Thread* me = self();
  Warp& w = *me->home;
  if (!(mask >> me->lane & 1)) die("%s: the calling lane is not in mask %08x", op, mask);
  Rendezvous* r = &w.rendezvous[0];  // as a rule there is only one
  if (!r->arrived || r->mask != mask) r = find_rendezvous(w, mask, op);
  if (r->op != op) die("diverged warp: lanes are at %s and at %s", r->op, op);
  if (!r->arrived) r->work = work;
  r->arg[me->lane] = arg;
  r->arrived |= 1u << me->lane;
  if (r->arrived == (mask & w.live)) return complete(w, *r, 1u << me->lane);
  block({Wait::kCollective, op, mask});
}

// Lanes that have left are not waited for.
void warp_thread_exit(Warp& w) {
  for (Rendezvous& r : w.rendezvous)
    if (r.arrived && r.arrived == (r.mask & w.live)) complete(w, r, 0);
}

// The same instruction must be every lane's k-th .aligned one, for all k: a warp that diverged and
// has not come together again is at several at once. Lanes that have left are not asked.
void aligned(const char* op, const void* caller) {
  Thread* me = self();
  const uint64_t where = me->site ? me->site : uint64_t(caller);
  me->site = 0;
  if (!gang->config.aligned || where == named(nullptr)) return;
  Warp& w = *me->home;
  uint32_t step = me->aligned_count++ - w.aligned_done;
  if (step == w.aligned.size()) w.aligned.push_back({where, op, 0, me->lane});
  AlignedStep& s = w.aligned[step];
  if (s.where != where || s.op != op)
    die("diverged warp: lane %u is at %s (%s), lane %u was at %s (%s) instead; these are .aligned: "
        "all lanes of a warp must come to one call site",
        me->lane, op, describe_code(where).c_str(), s.first_lane, s.op,
        describe_code(s.where).c_str());
  s.lanes |= 1u << me->lane;
  while (!w.aligned.empty() && (w.aligned[0].lanes & w.live) == w.live)
    w.aligned.pop_front(), w.aligned_done++;
}

void at(const char* site) { self()->site = named(site); }

template <class F>
static void each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(unsigned(__builtin_ctz(mask)));
}

void syncwarp(uint32_t mask) {
  collective(mask, "__syncwarp", nullptr, [](Warp& w, Rendezvous& r) {
    if (!gang->race.on) return;
    Published all;
    each_lane(r.arrived, [&](unsigned l) { gang->race.release(w.lane[l], all); });
    each_lane(r.arrived, [&](unsigned l) { gang->race.acquire(w.lane[l], all); });
  });
}

// ---- shfl, ballot
struct Exchange {
  uint32_t in, out;
  int lane_or_delta;
};

uint32_t shfl(uint32_t mask, uint32_t v, int lane_or_delta, Shfl mode) {
  static const char* const kNames[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
  Exchange mine{v, v, lane_or_delta};
  collective(mask, kNames[int(mode)], &mine, [mode](Warp&, Rendezvous& r) {
    each_lane(r.arrived, [&](unsigned l) {
      auto* x = static_cast<Exchange*>(r.arg[l]);
      int arg = x->lane_or_delta, lane = int(l);
      int from = mode == Shfl::kIdx    ? arg & 31
                 : mode == Shfl::kUp   ? lane - arg
                 : mode == Shfl::kDown ? lane + arg
                                       : lane ^ arg;
      if (from < 0 || from > 31) from = lane;
      if (!(r.arrived >> from & 1)) die("shfl reads lane %d, which takes no part", from);
      x->out = static_cast<Exchange*>(r.arg[size_t(from)])->in;
    });
  });
  return mine.out;
}

uint32_t ballot(uint32_t mask, bool p) {
  Exchange mine{p, 0, 0};
  collective(mask, "ballot", &mine, [](Warp&, Rendezvous& r) {
    uint32_t bits = 0;
    each_lane(r.arrived, [&](unsigned l) { bits |= static_cast<Exchange*>(r.arg[l])->in << l; });
    each_lane(r.arrived, [&](unsigned l) { static_cast<Exchange*>(r.arg[l])->out = bits; });
  });
  return mine.out;
}

// ---- ldmatrix, stmatrix
// Eight rows of 16 bytes are read in one pass unless two different rows share their four banks.
static void count_conflicts(uint8_t* const* row) {
  gang->stats.ldmatrix++;
  unsigned busy = 0;
  for (int i = 0; i < 8; i++) {
    bool again = false;
    for (int j = 0; j < i; j++) again |= row[j] == row[i];
    unsigned banks = 1u << (uintptr_t(row[i]) / 16 % 8);
    if (!again && (busy & banks)) gang->stats.ldmatrix_conflicts++;
    busy |= banks;
  }
}

// One 8x8 matrix of 16-bit elements; lane l holds elements (l / 4, 2 * (l % 4)) and the next. Lanes
// 8 * matrix + i give the row addresses.
static void move_matrix(Warp& w, Rendezvous& r, unsigned matrix, bool trans, bool store) {
  uint8_t* row[8];
  RaceChecker& race = gang->race;
  for (unsigned i = 0; i < 8; i++) {
    Thread* owner = w.lane[matrix * 8 + i];
    row[i] = static_cast<uint8_t*>(r.arg[owner->lane]);
    if (race.on) {
      Event e = race.thread_event(owner, named(store ? "stmatrix" : "ldmatrix"));
      race.touch(row[i], 16, store, e, race.view(owner));
    }
  }
  if (!store) count_conflicts(row);
  for (unsigned l = 0; l < 32; l++) {
    uint32_t& word = w.words[l][matrix];
    unsigned a = l / 4, b = l % 4 * 2;
    uint8_t* e0 = trans ? row[b] + 2 * a : row[a] + 2 * b;
    uint8_t* e1 = trans ? row[b + 1] + 2 * a : row[a] + 2 * b + 2;
    uint16_t lo = uint16_t(word), hi = uint16_t(word >> 16);
    if (store) {
      memcpy(e0, &lo, 2);
      memcpy(e1, &hi, 2);
    } else {
      memcpy(&lo, e0, 2);
      memcpy(&hi, e1, 2);
      word = lo | uint32_t(hi) << 16;
    }
  }
}

static uint8_t* row_address(uint32_t addr) {
  if (addr & 15) die("ldmatrix/stmatrix: row address 0x%x is not 16-byte aligned", addr);
  uint8_t* p = shared_ptr(addr);
  window_check(p, 16, "ldmatrix/stmatrix");
  return p;
}

// Lanes of matrices that an .x1 or .x2 does not have need no valid address.
void ldmatrix(uint32_t addr, uint32_t* out, int n, bool trans) {
  aligned("ldmatrix", __builtin_return_address(0));
  Thread* me = self();
  void* row = int(me->lane) < 8 * n ? row_address(addr) : nullptr;
  collective(~0u, trans ? "ldmatrix.trans" : "ldmatrix", row, [=](Warp& w, Rendezvous& r) {
    for (int m = 0; m < n; m++) move_matrix(w, r, unsigned(m), trans, false);
  });
  memcpy(out, me->home->words[me->lane], size_t(n) * 4);
}

void stmatrix(uint32_t addr, const uint32_t* in, int n, bool trans) {
  aligned("stmatrix", __builtin_return_address(0));
  Thread* me = self();
  void* row = int(me->lane) < 8 * n ? row_address(addr) : nullptr;
  memcpy(me->home->words[me->lane], in, size_t(n) * 4);
  collective(~0u, trans ? "stmatrix.trans" : "stmatrix", row, [=](Warp& w, Rendezvous& r) {
    for (int m = 0; m < n; m++) move_matrix(w, r, unsigned(m), trans, true);
  });
}

// ---- mma.sync
// Lane l holds rows g = l / 4 and g + 8, columns t = 2 * (l % 4) and t + 1 (and + 8) of each
// operand.
static void put_pair(float* two, uint32_t v) {
  two[0] = bf16_to_float(uint16_t(v));
  two[1] = bf16_to_float(uint16_t(v >> 16));
}

// kRows x kColumns tiles of 16 x 8; one pointer for each tile of d and c, for each row tile of a.
template <unsigned kRows, unsigned kColumns>
static void multiply(const char* op, float* const (&d)[kRows * kColumns],
                     const float* const (&c)[kRows * kColumns], const uint32_t* const (&a)[kRows],
                     const uint32_t* b) {
  // One pitch for all shapes: each lane's elements lie where they lie for every other shape, so a
  // lane that is at the next instruction already leaves alone what others have yet to fetch.
  constexpr unsigned n = kColumns * 8, pitch = 16;
  Thread* me = self();
  Warp& w = *me->home;
  unsigned g = me->lane / 4, t = me->lane % 4 * 2;
  auto mine = [&](unsigned tile, unsigned half) {
    return &w.d[(tile / kColumns * 16 + half * 8 + g) * pitch + tile % kColumns * 8 + t];
  };
  for (unsigned i = 0; i < kRows; i++)
    for (unsigned e = 0; e < 4; e++) put_pair(&w.a[i * 16 + e % 2 * 8 + g][e / 2 * 8 + t], a[i][e]);
  for (unsigned j = 0; j < kColumns * 2; j++) {
    float two[2];
    put_pair(two, b[j]);
    float* column = &w.b[(j % 2 * 8 + t) * pitch + j / 2 * 8 + g];
    column[0] = two[0];
    column[pitch] = two[1];
  }
  for (unsigned tile = 0; tile < kRows * kColumns; tile++)
    for (unsigned half = 0; half < 2; half++) memcpy(mine(tile, half), c[tile] + half * 2, 8);
  collective(~0u, op, nullptr, [](Warp& all, Rendezvous&) {
    multiply_add(all.d, all.a[0], all.b, kRows * 16, n, pitch);
    gang->stats.mma += kRows * kColumns;
    gang->stats.flop += 2 * kRows * 16 * n * 16;
  });
  for (unsigned tile = 0; tile < kRows * kColumns; tile++)
    for (unsigned half = 0; half < 2; half++) memcpy(d[tile] + half * 2, mine(tile, half), 8);
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  aligned("mma", __builtin_return_address(0));
  multiply<1, 1>("mma.m16n8k16", {d}, {c}, {a}, b);
}
void mma_m32n16k16_bf16(float* d00, float* d01, float* d10, float* d11, const uint32_t* a0,
                        const uint32_t* a1, const uint32_t* b) {
  aligned("mma", __builtin_return_address(0));
  multiply<2, 2>("four mma.m16n8k16", {d00, d01, d10, d11}, {d00, d01, d10, d11}, {a0, a1}, b);
}

void mma_m16n16k16_bf16(float* d0, float* d1, const uint32_t* a, const uint32_t* b) {
  aligned("mma", __builtin_return_address(0));
  multiply<1, 2>("two mma.m16n8k16", {d0, d1}, {d0, d1}, {a}, b);
}
void mma_m32n8k16_bf16(float* d0, float* d1, const uint32_t* a0, const uint32_t* a1,
                       const uint32_t* b) {
  aligned("mma", __builtin_return_address(0));
  multiply<2, 1>("two mma.m16n8k16 of two rows", {d0, d1}, {d0, d1}, {a0, a1}, b);
}

}  // namespace emu
