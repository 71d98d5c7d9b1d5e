// One product of csrc/cpu/gemm_int8.hpp, compiled with any vectors: from a file of ints (rows, in,
// out), activations fp32 [rows, in], codes [out, in] and scales fp32 [out], to one with the product
// fp32 [rows, out], the codes of the rows [rows, in] (128 added) and their scales [rows]. With
// RX_CHECK_AMX by tiles, for activations that bf16 holds exactly.
#define RX_ISA int8_check
#define RX_L2_CHUNK_BYTES 4096  // several chunks of panels
#define RX_GROUP_ROWS 64
#include <cstdio>
#include <vector>

#if defined(RX_CHECK_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/gemm_int8_amx.hpp"
#else
#include "cpu/gemm.hpp"
#include "cpu/gemm_int8.hpp"
#endif
#include "cpu/workspace.hpp"

using namespace rx::cpu;
using namespace rx::cpu::int8_check;
#if defined(RX_CHECK_AMX)
using Core = AmxInt8Core;
#else
using Base = VectorCore<float>;
using Core = Int8Core<Base>;
#endif
using Act = Core::Act;

template <class T>
std::vector<T> read(FILE* file, size_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, file) != count) exit(3);
  return values;
}

int main(int, char** argv) {
#if defined(RX_CHECK_AMX) && !defined(RX_EMULATE_AMX)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 4;  // ARCH_REQ_XCOMP_PERM, as in dispatch.cpp
#endif
  FILE* const file = fopen(argv[1], "rb");
  const std::vector<int> size = read<int>(file, 3);
  const int rows = size[0], in = size[1], out = size[2], wide = round_up(in, kAlign);
  const std::vector<float> x = read<float>(file, (size_t)rows * in);
  const std::vector<int8_t> codes = read<int8_t>(file, (size_t)out * in);
  const std::vector<float> scales = read<float>(file, out);

  const Linear l{Columns::plain, in, out, {}};
  std::vector<char> packed(Core::linear_bytes(l));
  Core::pack(l, {codes.data(), Dtype::int8, scales.data()}, packed.data());
  const int room = rows + Core::kSpareRows;
  std::vector<Act> padded(mat_size(room, wide));
  const Mat<Act> a = make_mat(padded.data(), room, wide);
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < in; ++k) store_one(a.at(row, k), x[(size_t)row * in + k]);
  Carver count{nullptr};
  Core::carve_scratch(count, room, wide);
  std::vector<char> memory(count.used + 64);
  Carver carver{(char*)(((size_t)memory.data() + 63) / 64 * 64)};
  const Core::Scratch own = Core::carve_scratch(carver, room, wide);

  const int columns = l.panels() * kPanel;
  std::vector<float> y((size_t)room * columns);
  float* const to = y.data();
  Core::enter(own);
  Core::gemm(own, a, {0, rows}, l, packed.data(), {0, l.panels()}, packed.data(), [=](int panel) {
    return [=](int row, V v0, V v1) {
      store(to + (long)row * columns + panel * kPanel, v0);
      store(to + (long)row * columns + panel * kPanel + W, v1);
    };
  });
  Core::leave();
  FILE* const result = fopen(argv[2], "wb");
  for (int row = 0; row < rows; ++row) fwrite(to + (long)row * columns, 4, out, result);
  for (int row = 0; row < rows; ++row) fwrite(own.codes + row * Core::row_bytes(in), 1, in, result);
  fwrite(own.scales, 4, rows, result);
  fclose(result);
}
