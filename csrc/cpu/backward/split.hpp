// A product split over a team: by rows if each thread gets many, else by columns.
#pragma once

#include "../layout.hpp"
#include "../pool.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kOwnRows = 64;  // rows of a thread for which it reads all of the weight itself

// epilogue_of(product, one past the last row of this thread) gives the epilogue; all threads meet
// at the end.
template <class Core, class Act, class Epilogue>
RX_INLINE void split_product(const Team& team, const typename Core::Scratch& scratch, Mat<Act> a,
                             int rows, const Linear& l, const void* weight, Epilogue epilogue_of) {
  const bool by_rows = rows >= kOwnRows * team.size;
  const Range own = by_rows ? share(rows, team.tid, team.size) : Range{0, rows};
  const Range panels = by_rows ? Range{0, l.panels()} : share(l.panels(), team.tid, team.size);
  if (own.begin < own.end && panels.begin < panels.end)
    Core::gemm(scratch, a, own, l, weight, panels, weight, epilogue_of(l, own.end));
  team.sync();
}

}  // namespace rx::cpu::RX_ISA
