// Rows of floats, gathered: products with a row, and sums. Whoever is free takes the next block.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Lanes of the widest register that the flags allow.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
// `aligned(4)`: rows start anywhere, since d may be odd.
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// body(begin, end) for blocks of 0..n; whoever is free takes the next, so a slow one delays nobody.
template <class Body>
void in_parallel(int64_t n, int64_t block, int64_t threads, Body body) {
  const int64_t blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads)) if (blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) body(b * block, std::min(n, (b + 1) * block));
}

// Gathered rows are taken four at a time: four streams keep the memory busier than one, and the row
// that they meet is loaded once for all. With rows of 3 KB out of the last cache a sum of rows takes
// 0.65 of the time of one by one, and products 0.8, of which half is due to asking for the next four
// meanwhile; sums gain nothing by that.
constexpr int AT_ONCE = 4;

// out[r] = ⟨x, rows[r]⟩, each with two sums side by side. R changes no bit.
template <int R>
void dots(const float* x, const float* const* rows, const float* const* next, int64_t d,
          float* out) {
  auto at = [](const float* p) { return *reinterpret_cast<const Lanes*>(p); };
  Lanes sums[R][2] = {};
  int64_t c = 0;
  for (; c + 2 * LANES <= d; c += 2 * LANES)
    for (int r = 0; r < R; ++r)
      for (int64_t p = c, u = 0; u < 2; p += LANES, ++u) {
        sums[r][u] += at(x + p) * at(rows[r] + p);
        __builtin_prefetch(next[r] + p);
      }
  for (int r = 0; r < R; ++r) {
    const Lanes all = sums[r][0] + sums[r][1];
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += all[l];
    for (int64_t tail = c; tail < d; ++tail) sum += x[tail] * rows[r][tail];
    out[r] = sum;
  }
}

float dot(const float* a, const float* b, int64_t d) {
  float sum;
  dots<1>(a, &b, &b, d, &sum);
  return sum;
}

// y += Σ_r coefs[r] · rows[r], in the order of r. R changes no bit.
template <int R>
void add_scaled(float* __restrict y, const float* coefs, const float* const* rows, int64_t d) {
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) {
    float sum = y[c];
    for (int r = 0; r < R; ++r) sum += coefs[r] * rows[r][c];
    y[c] = sum;
  }
}

void add_scaled(float* y, float coef, const float* row, int64_t d) {
  add_scaled<1>(y, &coef, &row, d);
}

// Of the entries first..last: out[e] = ⟨x, row(e)⟩.
template <class Row>
void dots(const float* x, int64_t first, int64_t last, Row row, int64_t d, float* out) {
  const float *rows[AT_ONCE], *next[AT_ONCE];
  int64_t e = first;
  for (; e + AT_ONCE <= last; e += AT_ONCE) {
    for (int r = 0; r < AT_ONCE; ++r) {
      rows[r] = row(e + r);
      next[r] = row(std::min(e + r + AT_ONCE, last - 1));
    }
    dots<AT_ONCE>(x, rows, next, d, out + e);
  }
  for (; e < last; ++e) out[e] = dot(x, row(e), d);
}

// Of the entries first..last: y += Σ_e coef(e) · row(e).
template <class Coef, class Row>
void add_rows(float* y, int64_t first, int64_t last, Coef coef, Row row, int64_t d) {
  const float* rows[AT_ONCE];
  float coefs[AT_ONCE];
  for (int64_t e = first; e < last; e += AT_ONCE) {
    const int64_t n = std::min<int64_t>(AT_ONCE, last - e);
    for (int r = 0; r < n; ++r) rows[r] = row(e + r), coefs[r] = coef(e + r);
    if (n == 1) add_scaled<1>(y, coefs, rows, d);
    if (n == 2) add_scaled<2>(y, coefs, rows, d);
    if (n == 3) add_scaled<3>(y, coefs, rows, d);
    if (n == 4) add_scaled<4>(y, coefs, rows, d);
  }
}

}  // namespace
