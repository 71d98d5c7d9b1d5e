// Every CPU engine that this machine can run, against a plain fp64 recursion. No Python, no torch:
// link it statically and run it wherever the instructions are, on an emulated processor too.
//
//   engines_check [isa...]     prints one line a case, "ok" at the end, exit status 1 on failure
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/hash.hpp"

using namespace rx::cpu;
using Matrix = std::vector<double>;  // row-major

namespace {

std::mt19937 rng(7);

float round_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&f, &u, 4);
  return f;
}

std::vector<float> gaussian(size_t count, double scale, bool bf16) {
  std::normal_distribution<float> normal(0.f, (float)scale);
  std::vector<float> values(count);
  for (float& v : values) v = bf16 ? round_bf16(normal(rng)) : normal(rng);
  return values;
}

// [rows, in] times weight [out, in]
Matrix linear(const Matrix& x, int in, const std::vector<float>& w, int out) {
  const int rows = (int)x.size() / in;
  Matrix y((size_t)rows * out);
  for (int r = 0; r < rows; ++r)
    for (int o = 0; o < out; ++o)
      for (int i = 0; i < in; ++i) y[r * out + o] += x[r * in + i] * w[(size_t)o * in + i];
  return y;
}

Matrix swiglu(const Matrix& x, int in, const std::vector<float>& up, int inner,
              const std::vector<float>& down) {
  const Matrix both = linear(x, in, up, 2 * inner);
  Matrix middle(x.size() / in * inner);
  for (size_t i = 0; i < middle.size(); ++i) {
    const size_t row = i / inner, f = i % inner;
    const double gate = both[row * 2 * inner + f];
    middle[i] = gate / (1 + std::exp(-gate)) * both[row * 2 * inner + inner + f];
  }
  return linear(middle, inner, down, in);
}

void add_and_norm(Matrix& h, const Matrix& y, int width, double eps) {
  for (size_t row = 0; row < h.size() / width; ++row) {
    double squares = 0;
    for (int i = 0; i < width; ++i) {
      double& v = h[row * width + i];
      v += y[row * width + i];
      squares += v * v;
    }
    for (int i = 0; i < width; ++i) h[row * width + i] /= std::sqrt(squares / width + eps);
  }
}

struct Net {
  BlockShape shape;
  std::vector<float> weight[4];
  std::vector<float> cos, sin;  // [T, head_dim] or empty
};

// Attention of one sample, h [T, D].
Matrix attention(const Net& net, const Matrix& h, int T) {
  const int D = net.shape.hidden, H = net.shape.heads, dim = net.shape.head_dim;
  Matrix qkv = linear(h, D, net.weight[0], 3 * D), mixed((size_t)T * D);
  if (!net.cos.empty()) {
    const Matrix raw = qkv;
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < 2 * D; ++c) {
        const int d = c % dim, pair = d < dim / 2 ? c + dim / 2 : c - dim / 2;
        const double turned = raw[t * 3 * D + pair] * (d < dim / 2 ? -1 : 1);
        qkv[t * 3 * D + c] =
            raw[t * 3 * D + c] * net.cos[t * dim + d] + turned * net.sin[t * dim + d];
      }
  }
  for (int head = 0; head < H; ++head)
    for (int t = 0; t < T; ++t) {
      std::vector<double> p(T);
      double top = -INFINITY, sum = 0;
      for (int s = 0; s < T; ++s) {
        for (int d = 0; d < dim; ++d)
          p[s] += qkv[t * 3 * D + head * dim + d] * qkv[s * 3 * D + D + head * dim + d];
        p[s] /= std::sqrt((double)dim);
        top = std::fmax(top, p[s]);
      }
      for (double& v : p) sum += v = std::exp(v - top);
      for (int s = 0; s < T; ++s)
        for (int d = 0; d < dim; ++d)
          mixed[t * D + head * dim + d] += p[s] / sum * qkv[s * 3 * D + 2 * D + head * dim + d];
    }
  return linear(mixed, D, net.weight[1], D);
}

Matrix transposed(const Matrix& x, int rows, int cols) {
  Matrix y(x.size());
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) y[(size_t)c * rows + r] = x[(size_t)r * cols + c];
  return y;
}

Matrix call(const Net& net, Matrix h, int T) {
  const BlockShape& s = net.shape;
  if (s.token_mlp) {
    Matrix columns = transposed(h, T, s.hidden);
    add_and_norm(columns, swiglu(columns, T, net.weight[0], s.token_inner, net.weight[1]), T,
                 s.eps);
    h = transposed(columns, s.hidden, T);
  } else {
    add_and_norm(h, attention(net, h, T), s.hidden, s.eps);
  }
  add_and_norm(h, swiglu(h, s.hidden, net.weight[2], s.inner, net.weight[3]), s.hidden, s.eps);
  return h;
}

struct Case {
  bool token_mlp;
  int D, F, H, T, token_inner, B, threads;
  double logits;  // scale of the qkv weights
};

// Relative error of `write <- N(z + x)` for the engine, one block, against fp64.
// Whether a queue of the rows, one step each, ends in the states of the recursion, bit for bit.
bool solves_alike(const Engine& engine, const Recursion& recursion, const std::vector<char>& out,
                  const Case& c) {
  std::vector<char> final(out.size()), heads((size_t)8 * c.D);
  std::vector<int64_t> steps(c.B), answers((size_t)c.B * c.T), numbers(c.B), trace(answers);
  bool halted[16] = {};
  std::atomic<int> done{0};
  Solving how{};
  how.rows = c.B;
  how.max_steps = 1;
  how.by_answer = true;
  how.patience = 1;
  how.numbers = numbers.data();
  how.x = recursion.in[0];
  how.start = recursion.in;
  how.start_each = true;
  how.output = 1;
  how.vocab = 2;
  how.lm_head = how.q_head = heads.data();
  how.steps = steps.data();
  how.halted = halted;
  how.final = final.data();
  how.answers = answers.data();
  how.trace = trace.data();
  how.done = &done;
  return solve(engine, recursion, how, c.threads) && final == out && done == c.B &&
         steps == std::vector<int64_t>(c.B, 1);
}

double error_of(const Case& c, const std::string& isa, bool bf16) {
  Net net;
  net.shape = {c.token_mlp, c.D, c.F, c.H, c.H ? c.D / c.H : 0, c.T, c.token_inner, 1e-5f};
  const int first = c.token_mlp ? 2 * c.token_inner * c.T : 3 * c.D * c.D;
  const int second = c.token_mlp ? c.T * c.token_inner : c.D * c.D;
  const int fan_in = c.token_mlp ? c.T : c.D;
  net.weight[0] = gaussian(first, c.logits / std::sqrt(fan_in), bf16);
  net.weight[1] = gaussian(second, 1 / std::sqrt(c.token_mlp ? c.token_inner : c.D), bf16);
  net.weight[2] = gaussian((size_t)2 * c.F * c.D, 1 / std::sqrt(c.D), bf16);
  net.weight[3] = gaussian((size_t)c.D * c.F, 1 / std::sqrt(c.F), bf16);
  const int dim = net.shape.head_dim;
  for (int i = 0; i < c.T * dim; ++i) {
    const double angle = i / dim * std::pow(10000., -2. * (i % dim % (dim / 2)) / dim);
    net.cos.push_back((float)std::cos(angle));
    net.sin.push_back((float)std::sin(angle));
  }
  const size_t sample = (size_t)c.T * c.D, size = sample * c.B;
  const std::vector<float> x = gaussian(size, 1, bf16), z = gaussian(size, 1, bf16);

  std::vector<RawWeight> raw;
  for (const auto& w : net.weight) raw.push_back({w.data(), Dtype::f32});
  const Packed packed({net.shape}, raw, bf16 ? Dtype::bf16 : Dtype::f32, isa);

  auto stored = [&](const std::vector<float>& values) {
    std::vector<char> bytes(values.size() * (bf16 ? 2 : 4));
    for (size_t i = 0; i < values.size(); ++i)
      std::memcpy(&bytes[i * (bf16 ? 2 : 4)], (const char*)&values[i] + (bf16 ? 2 : 0),
                  bf16 ? 2 : 4);
    return bytes;
  };
  const std::vector<char> x_in = stored(x), z_in = stored(z);
  std::vector<char> out(z_in.size());
  const int zero = 0, one = 1;
  const Step step{0, 1, 1, 1, &one, &zero};
  const void* in[] = {x_in.data(), z_in.data()};
  void* const outs[] = {nullptr, out.data()};
  const PackedNet view = packed.view();
  const Recursion recursion{c.B,
                            c.T,
                            c.D,
                            2,
                            in,
                            outs,
                            1,
                            &step,
                            1,
                            &view,
                            dim ? net.cos.data() : nullptr,
                            dim ? net.sin.data() : nullptr};
  run(packed.engine(), recursion, c.threads);
  if (!solves_alike(packed.engine(), recursion, out, c)) return INFINITY;

  double error = 0, norm = 0;
  for (int b = 0; b < c.B; ++b) {
    Matrix h(sample);
    for (size_t i = 0; i < sample; ++i) {
      const float sum = z[b * sample + i] + x[b * sample + i];
      h[i] = bf16 ? round_bf16(sum) : sum;
    }
    const Matrix want = call(net, h, c.T);
    for (size_t i = 0; i < sample; ++i) {
      float got = 0;
      std::memcpy((char*)&got + (bf16 ? 2 : 0), &out[(b * sample + i) * (bf16 ? 2 : 4)],
                  bf16 ? 2 : 4);
      error += (got - want[i]) * (got - want[i]);
      norm += want[i] * want[i];
    }
  }
  return std::sqrt(error / norm);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  if (isas.empty()) isas = usable_isas();
  const Case cases[] = {
      // token_mlp, D, F, H, T, token_inner, B, threads, logits
      {false, 64, 64, 2, 17, 0, 2, 1, 1},   // 17 rows: a tile and a bit
      {false, 32, 40, 2, 33, 0, 1, 2, 1},   // 16-wide heads, one sample on two threads
      {false, 96, 32, 2, 5, 0, 1, 1, 1},    // 48-wide heads: vectors across heads
      {false, 64, 544, 1, 7, 0, 1, 1, 1},   // 544 deep: two K chunks
      {false, 32, 32, 1, 3, 0, 3, 2, 60},   // scores in the thousands
      {false, 160, 32, 2, 27, 0, 1, 1, 1},  // 80-wide heads; 27 rows: tiles of 14 and 13
      {true, 64, 64, 0, 17, 40, 1, 1, 1},   // T padded from 17 to 32
      {true, 32, 32, 0, 33, 32, 2, 2, 1},
  };
  int failures = 0;
  for (const std::string& isa : isas)
    for (const Case& c : cases)
      for (const bool bf16 : {false, true}) {
        const double error = error_of(c, isa, bf16), limit = bf16 ? 1e-2 : 3e-6;
        const bool ok = error <= limit;
        failures += !ok;
        std::printf("%-11s %s %s D=%d T=%d B=%d: %.2e%s\n", isa.c_str(), bf16 ? "bf16" : "fp32",
                    c.token_mlp ? "token_mlp" : "attention", c.D, c.T, c.B, error,
                    ok ? "" : "  FAILED");
        std::fflush(stdout);
      }
#if defined(RX_HAVE_AVX512)
  if (std::find(isas.begin(), isas.end(), "avx512") != isas.end())
    for (size_t bytes : {0, 1, 511, 512, 513, 100003}) {
      std::string text(bytes, 0);
      for (char& c : text) c = (char)rng();
      const bool ok = digest_portable(&text[0], bytes) == digest_avx512(&text[0], bytes);
      failures += !ok;
      std::printf("avx512   digest of %zu bytes%s\n", bytes, ok ? "" : "  FAILED");
    }
#endif
  // Which of the two best is taken depends on a measurement, what it says does not.
  const std::vector<std::string> names{"avx2", "avx512", "avx512_bf16"};
  failures += best_isa(names, {2.0}) != "avx512_bf16" || best_isa(names, {1.0}) != "avx512" ||
              best_isa({"avx512", "avx512_bf16", "amx"}, {}) != "amx";
  const std::vector<std::string> tiles{"avx512", "avx512_bf16", "amx", "amx_split"};
  failures += best_isa(tiles, {2.0}) != "amx_split" || best_isa(tiles, {1.1}) != "amx";
  const std::vector<std::string> arms{"neon", "neon_bf16", "neon_bfmmla"};
  failures += best_isa(arms, {2.0, 4.0}) != "neon_bfmmla" ||
              best_isa(arms, {2.0, 2.1}) != arms[1] ||
              best_isa(arms, {1.0, 2.0}) != "neon_bfmmla" || best_isa(arms, {1.0, 1.1}) != "neon";
  std::printf("%s\n", failures ? "failed" : "ok");
  return failures != 0;
}
