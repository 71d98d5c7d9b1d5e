// A product split over a team: by rows if each thread gets many, else by columns.
#pragma once

#include "../layout.hpp"
#include "../pool.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kOwnRows = 64;  // rows of a thread for which it reads all of the weight itself

// Of one thread: rows and panels.
struct Shares {
  Range rows, panels;
  bool empty() const { return rows.begin >= rows.end || panels.begin >= panels.end; }
};
RX_INLINE Shares shares_of(const Team& team, int rows, const Linear& l) {
  if (rows >= kOwnRows * team.size) return {share(rows, team.tid, team.size), {0, l.panels()}};
  return {{0, rows}, share(l.panels(), team.tid, team.size)};
}

// epilogue_of(product, one past the last row of this thread) gives the epilogue; all threads meet
// at the end.
template <class Core, class Act, class Epilogue>
RX_INLINE void split_product(const Team& team, const typename Core::Scratch& scratch, Mat<Act> a,
                             int rows, const Linear& l, const void* weight, Epilogue epilogue_of) {
  const Shares own = shares_of(team, rows, l);
  if (!own.empty())
    Core::gemm(scratch, a, own.rows, l, weight, own.panels, weight, epilogue_of(l, own.rows.end));
  team.sync();
}

}  // namespace rx::cpu::RX_ISA
