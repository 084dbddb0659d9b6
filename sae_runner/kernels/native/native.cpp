// The hot step of sparse autoencoders on a CPU: plain functions over raw pointers, float32.
//
// A latent is a row of W [S, d]; a selection is CSR (row t owns entries offsets[t] to
// offsets[t + 1] of `indices`). Whoever calls has checked shapes and types. Two passes read almost
// all the memory that a step reads: rows of W gathered for each row of the batch, rows of the batch
// gathered for each latent. Both are bound by memory, not by arithmetic.
//
// No float is ever added by two threads, and no sum depends on how many there are: the same inputs
// give the same bits, whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "int8.h"
#include "largest.h"
#include "rows.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

// ---- Rows of the batch --------------------------------------------------------------------------

constexpr int64_t ROWS = 8;  // At a time: some hundred entries, 0.05 ms.

// ---- Rows of the weights ------------------------------------------------------------------------

struct Factor {  // As in base.py.
  const int64_t* starts;
  const int32_t* rows;
  const int32_t* entries;
  const float* coefs;
  const float* dense;
};

// grad[j] = Σ_{e of j} coefs[entries[e]] · dense[rows[e]], summed over all factors, row by row.
//
// A latent that fires in half of all rows would keep one thread busy when all others are done. So
// the sums of those with more than LONG entries are made first, each by all threads, by columns.
class Gradient {
 public:
  Gradient(const Factor* factors, int64_t n_factors, int64_t S, int64_t d, int64_t threads)
      : factors(factors, factors + n_factors), longs(n_factors), sums(n_factors), S(S), d(d) {
    for (int64_t f = 0; f < n_factors; ++f) {
      for (int64_t j = 0; j < S; ++j)
        if (entries_of(f, j) > LONG) longs[f].push_back(j);
      sums[f].resize(longs[f].size() * d);
      const int64_t slices = (d + SLICE - 1) / SLICE;
      in_parallel(longs[f].size() * slices, 1, threads, [&](int64_t part, int64_t) {
        const int64_t i = part / slices, column = part % slices * SLICE;
        float* sum = sums[f].data() + i * d + column;
        add(this->factors[f], longs[f][i], column, std::min(SLICE, d - column), sum);
      });
    }
  }

  // Write row j, and say whether the latent has any entry; without one the row is zero.
  bool row(int64_t j, float* grad) const {
    std::fill(grad, grad + d, 0.0f);
    bool any = false;
    for (int64_t f = 0; f < static_cast<int64_t>(factors.size()); ++f) {
      any |= entries_of(f, j) > 0;
      if (entries_of(f, j) <= LONG) {
        add(factors[f], j, 0, d, grad);
      } else {
        const auto place = std::lower_bound(longs[f].begin(), longs[f].end(), j) - longs[f].begin();
        add_scaled(grad, 1.0f, sums[f].data() + place * d, d);
      }
    }
    return any;
  }

 private:
  static constexpr int64_t LONG = 1024, SLICE = 64;

  int64_t entries_of(int64_t f, int64_t j) const {
    return factors[f].starts[j + 1] - factors[f].starts[j];
  }

  void add(const Factor& of, int64_t j, int64_t column, int64_t width, float* grad) const {
    add_rows(
        grad, of.starts[j], of.starts[j + 1], [&](int64_t e) { return of.coefs[of.entries[e]]; },
        [&](int64_t e) { return of.dense + of.rows[e] * d + column; }, width);
  }

  std::vector<Factor> factors;
  std::vector<std::vector<int64_t>> longs;
  std::vector<std::vector<float>> sums;
  int64_t S, d;
};

constexpr int64_t LATENTS = PANEL;  // At a time.

float length(const float* w, int64_t d) { return std::max(std::sqrt(dot(w, w, d)), 1e-12f); }

// g − (g·ŵ) ŵ
void remove_parallel(float* g, const float* w, int64_t d) {
  const float norm = length(w, d);
  add_scaled(g, -dot(g, w, d) / norm / norm, w, d);
}

// The first moment of a latent that no longer fires shrinks by β1 each step, and is a denormal number
// after some 800, for ever: with those a step takes twenty times as long. Within this scope they are
// zero.
struct DenormalsAreZero {
#ifdef __SSE2__
  unsigned before = _mm_getcsr();
  DenormalsAreZero() { _mm_setcsr(before | 0x8040); }
  ~DenormalsAreZero() { _mm_setcsr(before); }
#endif
};

}  // namespace

extern "C" {

// What one step of Adam has in common for all weights. Adam's own form of it (Kingma and Ba 2015,
// §2) spares a division: m̂ / (√v̂ + ε) = √(1 − β2^t) / (1 − β1^t) · m / (√v + ε √(1 − β2^t)).
struct Step {
  float scale;
  float new1;         // 1 − β1, from the caller: in float32, 1 − 0.999 is off by 5e-5 of itself
  float keep2, new2;  // β2, 1 − β2
  float size;         // lr √(1 − β2^t) / (1 − β1^t)
  float eps;          // ε √(1 − β2^t)
};

void topk_bf16(const int16_t* scores, int64_t n, int64_t S, int64_t k, int32_t* out, int64_t threads) {
  topk(scores, n, S, k, out, threads);
}

void topk_fp32(const int32_t* scores, int64_t n, int64_t S, int64_t k, int32_t* out, int64_t threads) {
  topk(scores, n, S, k, out, threads);
}

void products(const float* x, const float* W, const int64_t* offsets, const int32_t* indices,
              int64_t n, int64_t d, float* out, int64_t threads) {
  const auto row = [=](int64_t e) { return W + indices[e] * d; };
  in_parallel(n, ROWS, threads, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      dots(x + t * d, offsets[t], offsets[t + 1], row, d, out);
  });
}

void decode(const float* W, const int64_t* offsets, const int32_t* indices, const float* values,
            int64_t n, int64_t d, float* out, int64_t threads) {
  const auto row = [=](int64_t e) { return W + indices[e] * d; };
  const auto value = [=](int64_t e) { return values[e]; };
  in_parallel(n, ROWS, threads, [=](int64_t begin, int64_t end) {
    std::fill(out + begin * d, out + end * d, 0.0f);
    for (int64_t t = begin; t < end; ++t)
      add_rows(out + t * d, offsets[t], offsets[t + 1], value, row, d);
  });
}

void reconstruct(const float* W, const int64_t* offsets, const int32_t* indices,
                 const float* values, const float* wanted, int64_t n, int64_t d, float* residual,
                 float* out, int64_t threads) {
  const auto row = [=](int64_t e) { return W + indices[e] * d; };
  const auto less = [=](int64_t e) { return -values[e]; };
  in_parallel(n, ROWS, threads, [=](int64_t begin, int64_t end) {
    std::copy(wanted + begin * d, wanted + end * d, residual + begin * d);
    for (int64_t t = begin; t < end; ++t) {
      add_rows(residual + t * d, offsets[t], offsets[t + 1], less, row, d);
      dots(residual + t * d, offsets[t], offsets[t + 1], row, d, out);  // Rows still in the cache.
    }
  });
}

// A stable counting sort: each of `parts` counts its own rows, then knows where its entries go.
// Each needs S counters, and has some 0.5 ms of work.
void by_latent(const int64_t* offsets, const int32_t* indices, int64_t n, int64_t S,
               int64_t* starts, int32_t* rows, int32_t* entries, int64_t threads) {
  const int64_t parts = std::min({threads, n, 1 + (offsets[n] >> 16), int64_t{8}});
  std::vector<int32_t> counters(parts * S);
  in_parallel(parts, 1, threads, [&](int64_t p, int64_t) {
    int32_t* count = counters.data() + p * S;
    for (int64_t e = offsets[n * p / parts]; e < offsets[n * (p + 1) / parts]; ++e)
      ++count[indices[e]];
  });
  int32_t next = 0;
  for (int64_t j = 0; j < S; ++j) {
    starts[j] = next;
    for (int64_t p = 0; p < parts; ++p) {
      const int32_t count = counters[p * S + j];
      counters[p * S + j] = next;
      next += count;
    }
  }
  starts[S] = next;
  in_parallel(parts, 1, threads, [&](int64_t p, int64_t) {
    int32_t* place = counters.data() + p * S;
    for (int64_t t = n * p / parts; t < n * (p + 1) / parts; ++t)
      for (int64_t e = offsets[t]; e < offsets[t + 1]; ++e) {
        const int32_t to = place[indices[e]]++;
        rows[to] = t;
        entries[to] = e;
      }
  });
}

void sums_by_latent(const int64_t* starts, const int32_t* entries, const float* values, int64_t S,
                    float* out, int64_t threads) {
  in_parallel(S, 1024, threads, [=](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double sum = 0;
      for (int64_t e = starts[j]; e < starts[j + 1]; ++e) sum += values[entries[e]];
      out[j] = static_cast<float>(sum);
    }
  });
}

// In as many parts as never changes, so that the sum does not either. Of the weights most may be
// zero: those of latents that no row of the batch has.
void weighted_sum(const float* W, const float* weights, int64_t m, int64_t d, float* out,
                  int64_t threads) {
  constexpr int64_t PARTS = 64;
  std::vector<float> sums(PARTS * d);
  in_parallel(PARTS, 1, threads, [&](int64_t p, int64_t) {
    std::vector<int64_t> some;
    for (int64_t j = m * p / PARTS; j < m * (p + 1) / PARTS; ++j)
      if (weights[j] != 0) some.push_back(j);
    const auto weight = [&](int64_t e) { return weights[some[e]]; };
    const auto row = [&](int64_t e) { return W + some[e] * d; };
    add_rows(sums.data() + p * d, 0, some.size(), weight, row, d);
  });
  std::fill(out, out + d, 0.0f);
  for (int64_t p = 0; p < PARTS; ++p) add_scaled(out, 1.0f, sums.data() + p * d, d);
}

void weight_gradient(const Factor* factor, int64_t S, int64_t d, float* out, int64_t threads) {
  const Gradient gradient(factor, 1, S, d, threads);
  in_parallel(S, LATENTS, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) gradient.row(j, out + j * d);
  });
}

void gradient_norm2(const Factor* factors, int64_t n_factors, const float* W, int64_t S, int64_t d,
                    double* out, int64_t threads) {
  const Gradient gradient(factors, n_factors, S, d, threads);
  std::vector<double> squares(S);
  in_parallel(S, LATENTS, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> g(d);
    for (int64_t j = begin; j < end; ++j) {
      if (!gradient.row(j, g.data())) continue;
      if (W) remove_parallel(g.data(), W + j * d, d);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(g[c]) * g[c];
      squares[j] = sum;
    }
  });
  *out = 0;
  for (const double square : squares) *out += square;
}

void int8_rows(const float* W, int64_t S, int64_t d, Int8Rows to, int64_t threads) {
  in_parallel(S, PANEL, threads, [=](int64_t begin, int64_t end) {
    write_panel(W, begin, end - begin, d, to);
  });
}

// Whether `int8_scores` can be called.
int32_t multiplies_int8() {
#ifdef __AMX_INT8__
  return tiles_granted();
#else
  return 0;
#endif
}

#ifdef __AMX_INT8__
// `longest`, `largest_step`, `most_lost`: of all rows of W.
void int8_scores(const float* x, Int8Rows W, float longest, float largest_step, float most_lost,
                 const float* b, int64_t n, int64_t S, int64_t d, int16_t* out, float* error,
                 int64_t threads) {
  const int64_t width = tiles_across(d) * DEPTH, padded = (n + 31) / 32 * 32;
  thread_local std::vector<int8_t> room;
  thread_local std::vector<float> steps;
  room.resize(padded * width + 64), steps.resize(padded);
  int8_t* rows = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & 63);
  float* row_steps = steps.data();
  // What is beyond row n may be anything: nothing of it is written.
  in_parallel(n, PANEL, threads, [=](int64_t begin, int64_t end) {
    std::vector<int8_t> numbers(width);
    for (int64_t t = begin; t < end; ++t) {
      const auto found = quantise(x + t * d, d, numbers.data());
      const float by_chance = std::hypot(found.step * longest, found.length * largest_step);
      row_steps[t] = found.step;
      error[t] = DEVIATIONS / std::sqrt(12.0f) * by_chance + found.lost * longest +
                 found.length * most_lost;
      for (int64_t c = 0; c < width; c += DEPTH)
        std::memcpy(rows + begin * width + c * PANEL + (t - begin) * DEPTH, &numbers[c], DEPTH);
    }
  });
  scores_of(rows, row_steps, W, b, n, S, d, out, threads);
}
#endif

void largest_within(const int16_t* scores, const float* error, const float* x, const float* W,
                    const float* b, int64_t n, int64_t S, int64_t d, int64_t k, float* values,
                    int32_t* indices, int32_t* n_candidates, int64_t threads) {
  choose_within(scores, error, x, W, b, n, S, d, k, values, indices, n_candidates, threads);
}

void count_above_bf16(const int16_t* scores, const float* least, const float* error, int64_t n,
                      int64_t S, int64_t* counts, int64_t threads) {
  count_above(scores, least, error, n, S, counts, threads);
}

void count_above_fp32(const int32_t* scores, const float* least, const float* error, int64_t n,
                      int64_t S, int64_t* counts, int64_t threads) {
  count_above(scores, least, error, n, S, counts, threads);
}

void list_above_bf16(const int16_t* scores, const float* least, const float* error,
                     const int64_t* offsets, int64_t n, int64_t S, int32_t* out, int64_t threads) {
  list_above(scores, least, error, offsets, n, S, out, threads);
}

void list_above_fp32(const int32_t* scores, const float* least, const float* error,
                     const int64_t* offsets, int64_t n, int64_t S, int32_t* out, int64_t threads) {
  list_above(scores, least, error, offsets, n, S, out, threads);
}

// Memory is read in order, yet the processor's own prefetcher stops at each page, which is a row or
// two: asking for the next row while this one is at work takes 20% less time.
void adam(float* W, float* exp_avg, float* exp_avg_sq, uint16_t* shadow, int64_t shadow_stride,
          Int8Rows in_int8, const Factor* factors, int64_t n_factors, int64_t S, int64_t d, Step s,
          int64_t unit, int64_t threads) {
  constexpr int64_t COLUMNS = 64;
  const Gradient gradient(factors, n_factors, S, d, threads);
  in_parallel(S, LATENTS, threads, [&](int64_t begin, int64_t end) {
    const DenormalsAreZero scope;
    std::vector<float> row(d);
    float* __restrict g = row.data();
    for (int64_t j = begin; j < end; ++j) {
      float *__restrict w = W + j * d, *__restrict m = exp_avg + j * d;
      float* __restrict v = exp_avg_sq + j * d;
      if (gradient.row(j, g) && unit) remove_parallel(g, w, d);
      for (int64_t begin = 0; begin < d; begin += COLUMNS) {
        for (int64_t c = begin + d; c < begin + d + COLUMNS; c += 16)  // Of the next row.
          for (const float* row : {w, m, v}) __builtin_prefetch(row + c, 1);
        const int64_t end = std::min(d, begin + COLUMNS);
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
          const float grad = s.scale * g[c];
          m[c] += s.new1 * (grad - m[c]);
          v[c] = s.keep2 * v[c] + s.new2 * grad * grad;
          w[c] -= s.size * m[c] / (std::sqrt(v[c]) + s.eps);
        }
      }
      if (unit) {
        const float shrink = 1 / length(w, d);
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) w[c] *= shrink;
      }
      if (shadow) {
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) shadow[j * shadow_stride + c] = bf16(w[c]);
      }
    }
    if (in_int8.tiles) write_panel(W, begin, end - begin, d, in_int8);
  });
}

}  // extern "C"
