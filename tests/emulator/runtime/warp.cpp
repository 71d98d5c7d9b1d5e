// warp.cpp - collectives of a warp: the last lane to arrive does the work of all of them.
//
// They exchange data and nothing else: as PTX has it, only __syncwarp orders memory within a warp.
#include "state.h"

namespace emu {

template <class Work>
static void collective(uint32_t mask, const char* op, void* arg, Work work) {
  Thread* me = self();
  Warp& w = *me->home;
  if (!(mask >> me->lane & 1)) die("%s: the calling lane is not in mask %08x", op, mask);
  mask &= w.live;
  Rendezvous* r = nullptr;
  for (Rendezvous& x : w.rendezvous)
    if (x.arrived && x.mask == mask) r = &x;
  for (size_t i = 0; !r && i < w.rendezvous.size(); i++)
    if (!w.rendezvous[i].arrived) {
      r = &w.rendezvous[i];
      r->mask = mask;
      r->op = op;
    }
  if (!r) die("%s: the warp is split over too many masks", op);
  if (r->op != op) die("diverged warp: lanes are at %s and at %s", r->op, op);
  r->arg[me->lane] = arg;
  r->arrived |= 1u << me->lane;
  if (r->arrived != mask) return block({Wait::kCollective, op, mask});
  work(w, *r);
  r->arrived = 0;
  for (uint32_t others = mask & ~(1u << me->lane); others; others &= others - 1)
    make_ready(w.lane[size_t(__builtin_ctz(others))]);
}

template <class F>
static void each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(unsigned(__builtin_ctz(mask)));
}

void syncwarp(uint32_t mask) {
  collective(mask, "__syncwarp", nullptr, [](Warp& w, Rendezvous& r) {
    if (!gang->race.on) return;
    Published all;
    each_lane(r.mask, [&](unsigned l) { gang->race.release(w.lane[l], all); });
    each_lane(r.mask, [&](unsigned l) { gang->race.acquire(w.lane[l], all); });
  });
}

// ---- shfl, ballot -------------------------------------------------------------------------------
struct Exchange {
  uint32_t in, out;
  int lane_or_delta;
};

uint32_t shfl(uint32_t mask, uint32_t v, int lane_or_delta, Shfl mode) {
  static const char* const kNames[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
  Exchange mine{v, v, lane_or_delta};
  collective(mask, kNames[int(mode)], &mine, [mode](Warp&, Rendezvous& r) {
    each_lane(r.mask, [&](unsigned l) {
      auto* x = static_cast<Exchange*>(r.arg[l]);
      int arg = x->lane_or_delta, lane = int(l);
      int from = mode == Shfl::kIdx    ? arg & 31
                 : mode == Shfl::kUp   ? lane - arg
                 : mode == Shfl::kDown ? lane + arg
                                       : lane ^ arg;
      if (from < 0 || from > 31) from = lane;
      if (!(r.mask >> from & 1)) die("shfl reads lane %d, which takes no part", from);
      x->out = static_cast<Exchange*>(r.arg[size_t(from)])->in;
    });
  });
  return mine.out;
}

uint32_t ballot(uint32_t mask, bool p) {
  Exchange mine{p, 0, 0};
  collective(mask, "ballot", &mine, [](Warp&, Rendezvous& r) {
    uint32_t bits = 0;
    each_lane(r.mask, [&](unsigned l) { bits |= static_cast<Exchange*>(r.arg[l])->in << l; });
    each_lane(r.mask, [&](unsigned l) { static_cast<Exchange*>(r.arg[l])->out = bits; });
  });
  return mine.out;
}

// ---- ldmatrix, stmatrix -------------------------------------------------------------------------
struct MatrixArg {
  uint32_t addr;
  uint32_t* registers;
};

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

// One 8x8 matrix of 16-bit elements; lane l holds elements (l / 4, 2 * (l % 4)) and the next.
static void move_matrix(Warp& w, Rendezvous& r, int matrix, bool trans, bool store) {
  uint8_t* row[8];
  for (int i = 0; i < 8; i++) {
    Thread* owner = w.lane[size_t(matrix * 8 + i)];
    uint32_t addr = static_cast<MatrixArg*>(r.arg[owner->lane])->addr;
    if (addr & 15) die("ldmatrix/stmatrix: row address 0x%x is not 16-byte aligned", addr);
    row[i] = shared_in(*owner->cta->cluster, owner->cta_rank, addr);
    RaceChecker& race = gang->race;
    if (race.on)
      race.touch(row[i], 16, store,
                 race.thread_event(owner, named(store ? "stmatrix" : "ldmatrix")), race.row(owner));
  }
  if (!store) count_conflicts(row);
  for (unsigned l = 0; l < 32; l++) {
    uint32_t& reg = static_cast<MatrixArg*>(r.arg[l])->registers[matrix];
    unsigned a = l / 4, b = l % 4 * 2;
    uint8_t* e0 = trans ? row[b] + 2 * a : row[a] + 2 * b;
    uint8_t* e1 = trans ? row[b + 1] + 2 * a : row[a] + 2 * b + 2;
    uint16_t lo = uint16_t(reg), hi = uint16_t(reg >> 16);
    if (store) {
      memcpy(e0, &lo, 2);
      memcpy(e1, &hi, 2);
    } else {
      memcpy(&lo, e0, 2);
      memcpy(&hi, e1, 2);
      reg = lo | uint32_t(hi) << 16;
    }
  }
}

void ldmatrix(uint32_t addr, uint32_t* out, int n, bool trans) {
  MatrixArg mine{addr, out};
  collective(~0u, trans ? "ldmatrix.trans" : "ldmatrix", &mine, [=](Warp& w, Rendezvous& r) {
    for (int m = 0; m < n; m++) move_matrix(w, r, m, trans, false);
  });
}

void stmatrix(uint32_t addr, const uint32_t* in, int n, bool trans) {
  MatrixArg mine{addr, const_cast<uint32_t*>(in)};
  collective(~0u, trans ? "stmatrix.trans" : "stmatrix", &mine, [=](Warp& w, Rendezvous& r) {
    for (int m = 0; m < n; m++) move_matrix(w, r, m, trans, true);
  });
}

// ---- mma.sync -----------------------------------------------------------------------------------
struct MmaArg {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

// Lane l holds rows g = l / 4 and g + 8, columns t = 2 * (l % 4) and t + 1 (and + 8) of each
// operand.
static void multiply(Rendezvous& r) {
  alignas(32) float A[16][16], B[16][8], D[16][8];
  for (unsigned l = 0; l < 32; l++) {
    auto* x = static_cast<MmaArg*>(r.arg[l]);
    unsigned g = l / 4, t = l % 4 * 2;
    for (unsigned i = 0; i < 4; i++) {
      float* two = &A[g + i % 2 * 8][t + i / 2 * 8];
      two[0] = bf16_to_float(uint16_t(x->a[i]));
      two[1] = bf16_to_float(uint16_t(x->a[i] >> 16));
    }
    for (unsigned i = 0; i < 2; i++) {
      B[t + i * 8][g] = bf16_to_float(uint16_t(x->b[i]));
      B[t + i * 8 + 1][g] = bf16_to_float(uint16_t(x->b[i] >> 16));
    }
    for (unsigned i = 0; i < 4; i++) D[g + i / 2 * 8][t + i % 2] = x->c[i];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
  for (unsigned l = 0; l < 32; l++) {
    float* d = static_cast<MmaArg*>(r.arg[l])->d;
    for (unsigned i = 0; i < 4; i++) d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
  gang->stats.mma++;
  gang->stats.flop += 2 * 16 * 8 * 16;
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaArg mine{d, a, b, c};
  collective(~0u, "mma.m16n8k16", &mine, [](Warp&, Rendezvous& r) { multiply(r); });
}

}  // namespace emu
