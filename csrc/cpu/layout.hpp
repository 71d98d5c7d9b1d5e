// Where things lie: activation matrices, and weights packed into panels of two vectors of columns.
//
// A panel pairs the columns that an epilogue needs together, so that every epilogue is local:
//   qkv      (j, j + head_dim/2) of Q and of K, for RoPE; V has plain neighbours
//   gate_up  (gate j, up j), for SwiGLU
//   plain    columns 2pW.. and 2pW + W..
#pragma once

#include "types.hpp"
#include "vec.hpp"

namespace rx::cpu::RX_ISA {

constexpr int kPanel = 2 * W;    // columns of a panel
constexpr int kDepth = 512;      // K chunk: a row group of this depth stays in L1
constexpr int kAlign = 32;       // widths of activations are padded to this many columns
constexpr int kSumColumns = 64;  // columns whose squares one partial sum holds

// [rows, cols], cut into chunks of kDepth columns: rows of a chunk are contiguous.
template <class T>
struct Mat {
  T* data;
  int ld;      // elements between rows: min(cols, kDepth)
  long chunk;  // elements between chunks
  T* at(long row, int col) const { return data + (col / kDepth) * chunk + row * ld + col % kDepth; }
};

template <class T>
RX_INLINE Mat<T> make_mat(T* data, int rows, int cols) {
  int ld = imin(cols, kDepth);
  return {data, ld, (long)rows * ld};
}
RX_INLINE size_t mat_size(int rows, int cols) {
  return (size_t)rows * (cols <= kDepth ? cols : round_up(cols, kDepth));
}

// ---- heads ---------------------------------------------------------------------------------
// Heads come in units: the fewest heads whose half-columns fill whole vectors. A unit is all Q
// pairs, then all K pairs, then all V columns of its heads. Missing heads of the last unit are 0.

struct Heads {
  int count, dim;
  int half() const { return dim / 2; }
  int per_unit() const { return half() % W == 0 ? 1 : 2; }  // half is a multiple of 8, W <= 16
  int units() const { return ceil_div(count, per_unit()); }
  int padded() const { return units() * per_unit(); }
  int pairs() const { return per_unit() * half() / W; }  // panels of Q (or K, or V) in a unit
  int unit_panels() const { return 3 * pairs(); }
};

// ---- products --------------------------------------------------------------------------------

enum class Columns { plain, gate_up, qkv };

struct Linear {
  Columns columns;
  int in, out;  // as in the weight [out, in]
  Heads heads;  // of qkv

  int panels() const {
    switch (columns) {
      case Columns::gate_up:
        return round_up(out / 2, kAlign) / W;
      case Columns::qkv:
        return heads.units() * heads.unit_panels();
      default:
        return round_up(out, kAlign) / kPanel;
    }
  }

  // Row of the weight behind lane `lane` of vector `side` (0 or 1) of a panel; -1 for padding.
  int source(int panel, int side, int lane) const {
    if (columns == Columns::plain) {
      int col = panel * kPanel + side * W + lane;
      return col < out ? col : -1;
    }
    if (columns == Columns::gate_up) {
      int col = panel * W + lane;
      return col < out / 2 ? side * (out / 2) + col : -1;
    }
    int unit = panel / heads.unit_panels(), index = panel % heads.unit_panels();
    int part = index / heads.pairs();  // Q, K, V
    int first = unit * heads.per_unit(), head, col;
    if (part < 2) {
      int pair = index % heads.pairs() * W + lane;
      head = first + pair / heads.half();
      col = pair % heads.half() + side * heads.half();
    } else {
      int flat = index % heads.pairs() * kPanel + side * W + lane;
      head = first + flat / heads.dim;
      col = flat % heads.dim;
    }
    return head < heads.count ? (part * heads.count + head) * heads.dim + col : -1;
  }
};

RX_INLINE int kv_heads(const BlockShape& s) {
  return s.variant.kv_heads ? s.variant.kv_heads : s.heads;
}

// The products of a variant: K/V heads of their own number, so qkv is plain.
RX_INLINE Linear variant_linear(const BlockShape& s, int which) {
  const Variant& v = s.variant;
  const Columns pairs = v.gated ? Columns::gate_up : Columns::plain;
  const int both = v.gated ? 2 : 1, heads = s.heads * s.head_dim;
  switch (which) {
    case mixer_in:
      return s.token_mlp
                 ? Linear{pairs, s.tokens, both * s.token_inner, {}}
                 : Linear{Columns::plain, s.hidden, heads + 2 * kv_heads(s) * s.head_dim, {}};
    case mixer_out:
      return s.token_mlp ? Linear{Columns::plain, s.token_inner, s.tokens, {}}
                         : Linear{Columns::plain, heads, s.hidden, {}};
    case gate_up:
      return Linear{pairs, s.hidden, both * s.inner, {}};
    case attn_gate:
      return Linear{Columns::plain, s.hidden, heads, {}};
    default:
      return Linear{Columns::plain, s.inner, s.hidden, {}};
  }
}

// Which of its matrices a block has.
RX_INLINE bool has_matrix(const BlockShape& s, int which) {
  const Variant& v = s.variant;
  if (!v.on) return which < weights_per_block;
  if (which == attn_gate) return v.attn_gate;
  return which < gate_up ? v.kind < Kind::none : v.kind != Kind::norm;
}

RX_INLINE Linear linear_of(const BlockShape& s, int which) {
  if (s.variant.on) return variant_linear(s, which);
  Heads heads{s.heads, s.head_dim};
  switch (which) {
    case mixer_in:
      return s.token_mlp ? Linear{Columns::gate_up, s.tokens, 2 * s.token_inner, {}}
                         : Linear{Columns::qkv, s.hidden, 3 * s.hidden, heads};
    case mixer_out:
      return s.token_mlp ? Linear{Columns::plain, s.token_inner, s.tokens, {}}
                         : Linear{Columns::plain, s.hidden, s.hidden, {}};
    case gate_up:
      return Linear{Columns::gate_up, s.hidden, 2 * s.inner, {}};
    default:
      return Linear{Columns::plain, s.inner, s.hidden, {}};
  }
}

// ---- work of one thread ----------------------------------------------------------------------

struct Range {
  int begin, end;
};

// Share `tid` of [0, total), cut at multiples of `unit`.
RX_INLINE Range share(int total, int tid, int size, int unit = 1) {
  long units = ceil_div(total, unit);
  return {imin(total, (int)(units * tid / size) * unit),
          imin(total, (int)(units * (tid + 1) / size) * unit)};
}

}  // namespace rx::cpu::RX_ISA
