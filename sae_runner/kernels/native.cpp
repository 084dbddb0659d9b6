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
#include <limits>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

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

// ---- Rows of floats -----------------------------------------------------------------------------

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

// ---- The k largest ------------------------------------------------------------------------------

// Floats are compared as integers: without its sign, a float's bits grow as it does. The two zeros
// are equal, and NaN, whose bits are beyond those of infinity, becomes the least of all.
template <class Bits>
constexpr Bits INFINITE = sizeof(Bits) == 2 ? 0x7F80 : 0x7F800000;
template <class Bits>
constexpr Bits LEAST = std::numeric_limits<Bits>::min();

// T: Bits, or a register of them.
template <class Bits, class T>
inline T key_of(T bits) {
  const T sign = bits >> (8 * sizeof(Bits) - 1);  // 0 or −1
  const T key = ((bits & std::numeric_limits<Bits>::max()) ^ sign) - sign;
  return key > INFINITE<Bits> ? T{} + LEAST<Bits> : key;
}

template <class Bits>
int64_t count_at_least(const Bits* keys, int64_t n, Bits cut) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += 16384) {  // An int16 can count so many.
    Bits part = 0;
    const int64_t end = std::min(n, begin + 16384);
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += keys[i] >= cut;
    count += part;
  }
  return count;
}

// The k-th largest key, bit by bit: the largest number that at least k keys reach. Some ten passes
// over some hundred keys take less time than one pass that branches on each.
template <class Bits>
Bits kth_largest(const Bits* keys, int64_t n, int64_t k) {
  Bits least = keys[0], most = keys[0];
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const Bits key = keys[i];  // With std::min the loop is not vectorised.
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  int64_t found = least;
  for (int64_t bit = int64_t{1} << 32; bit; bit >>= 1) {
    const int64_t higher = found + bit;
    if (higher <= most && count_at_least(keys, n, static_cast<Bits>(higher)) >= k) found = higher;
  }
  return static_cast<Bits>(found);
}

// Write the k places whose keys are largest, in their order; of equal keys, the first.
template <class Bits, class Place>
void write_largest(const Bits* keys, int64_t n, int64_t k, Place place, int32_t* out) {
  const Bits kth = kth_largest(keys, n, k);
  int64_t ties = k - count_at_least(keys, n, static_cast<Bits>(kth + 1));
  for (int64_t i = 0, written = 0; written < k; ++i) {
    out[written] = place(i);  // Stays if it is among them: no branch to mispredict.
    const bool tied = keys[i] == kth && ties > 0;
    ties -= tied;
    written += tied || keys[i] > kth;
  }
}

// Of WIDTH keys, those that may reach the cut, as bits; none if none does.
#ifdef __AVX512BW__
template <class Bits>
constexpr int64_t WIDTH = 64 / sizeof(Bits);
template <class Bits>
uint32_t lanes_reaching(Bits cut, const Bits* row) {
  typedef Bits Register __attribute__((vector_size(64), aligned(sizeof(Bits)), may_alias));
  const auto keys = (__m512i)key_of<Bits>(*reinterpret_cast<const Register*>(row));
  return sizeof(Bits) == 2 ? _mm512_cmpge_epi16_mask(keys, _mm512_set1_epi16(cut))
                           : _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(cut));
}
#else
template <class Bits>
constexpr int64_t WIDTH = 32;
template <class Bits>
uint32_t lanes_reaching(Bits cut, const Bits* row) {
  Bits most = LEAST<Bits>;
#pragma omp simd reduction(max : most)
  for (int64_t l = 0; l < WIDTH<Bits>; ++l) {
    const Bits key = key_of<Bits>(row[l]);
    most = key > most ? key : most;
  }
  return most >= cut ? ~0u : 0;
}
#endif

struct Hit {
  int32_t first;
  uint32_t lanes;
};

// Keys of a row that reach the cut, and their places; returns how many.
template <class Bits>
int64_t survivors(const Bits* row, int64_t n, Bits cut, Bits* keys, int32_t* places, Hit* hits) {
  int64_t found = 0, n_hits = 0, i = 0;
  const auto add = [&](int64_t place) {
    const Bits key = key_of<Bits>(row[place]);
    places[found] = place, keys[found] = key;
    found += key >= cut;
  };
  // Some fifty of 12,288 do. First where they are: a branch on each register would be mispredicted
  // at almost every hit, which doubles the time.
  for (; i + WIDTH<Bits> <= n; i += WIDTH<Bits>) {
    hits[n_hits] = {static_cast<int32_t>(i), lanes_reaching(cut, row + i)};
    n_hits += hits[n_hits].lanes != 0;
  }
  for (int64_t h = 0; h < n_hits; ++h)
    for (uint32_t lanes = hits[h].lanes; lanes; lanes &= lanes - 1)
      add(hits[h].first + __builtin_ctz(lanes));
  for (; i < n; ++i) add(i);
  return found;
}

// A lower bound on the k-th largest key of a row, close to it. Place i is in group i mod GROUPS; the
// last places, too few for every group to get one, are in none. The k-th largest of the groups'
// maxima is reached by k groups, so by k keys at least; and by few more, as long as k is well below
// GROUPS: 52 at k = 48 of 12,288.
constexpr int64_t GROUPS = 512;
template <class Bits>
Bits lower_bound(const Bits* row, int64_t n, int64_t k, Bits* keys) {
  const bool grouped = n >= 4 * GROUPS && k <= GROUPS / 2;
  if (!grouped) {
    for (int64_t i = 0; i < n; ++i) keys[i] = key_of<Bits>(row[i]);
    return kth_largest(keys, n, k);
  }
  std::fill(keys, keys + GROUPS, LEAST<Bits>);
  for (int64_t i = 0; i + GROUPS <= n; i += GROUPS) {
    for (int64_t g = 0; g < GROUPS; g += 64 / sizeof(Bits))
      __builtin_prefetch(row + i + 4 * GROUPS + g);
#pragma omp simd
    for (int64_t g = 0; g < GROUPS; ++g) {
      const Bits key = key_of<Bits>(row[i + g]), most = keys[g];
      keys[g] = key > most ? key : most;
    }
  }
  return kth_largest(keys, GROUPS, k);
}

template <class Bits>
void topk(const Bits* scores, int64_t n, int64_t S, int64_t k, int32_t* out, int64_t threads) {
  in_parallel(n, 16, threads, [=](int64_t begin, int64_t end) {
    // Kept between calls: new pages would cost more than the search.
    thread_local std::vector<Bits> keys;
    thread_local std::vector<int32_t> places;
    thread_local std::vector<Hit> hits;
    keys.resize(std::max(S, GROUPS) + 1), places.resize(S + 1), hits.resize(S / 16 + 1);
    for (int64_t t = begin; t < end; ++t) {
      const Bits* row = scores + t * S;
      const Bits cut = lower_bound(row, S, k, keys.data());
      const auto found = survivors(row, S, cut, keys.data(), places.data(), hits.data());
      write_largest(keys.data(), found, k, [&](int64_t i) { return places[i]; }, out + t * k);
    }
  });
}

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

constexpr int64_t LATENTS = 16;  // At a time.

float length(const float* w, int64_t d) { return std::max(std::sqrt(dot(w, w, d)), 1e-12f); }

// g − (g·ŵ) ŵ
void remove_parallel(float* g, const float* w, int64_t d) {
  const float norm = length(w, d);
  add_scaled(g, -dot(g, w, d) / norm / norm, w, d);
}

uint16_t bf16(float x) {  // Rounded to the nearest, ties to even.
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return x != x ? 0x7FC0 : rounded;
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

void rescore(const float* x, const float* W, const float* b, const int32_t* candidates, int64_t n,
             int64_t d, int64_t m, int64_t k, float* values, int32_t* indices, int64_t threads) {
  in_parallel(n, ROWS, threads, [=](int64_t begin, int64_t end) {
    std::vector<float> scores(m);
    std::vector<int32_t> keys(m), best(k);
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row = candidates + t * m;
      dots(x + t * d, 0, m, [=](int64_t c) { return W + row[c] * d; }, d, scores.data());
      for (int64_t c = 0; c < m; ++c) {
        scores[c] += b[row[c]];
        std::memcpy(&keys[c], &scores[c], 4);
        keys[c] = key_of<int32_t>(keys[c]);
      }
      write_largest(keys.data(), m, k, [](int64_t c) { return c; }, best.data());
      for (int64_t i = 0; i < k; ++i) {
        values[t * k + i] = scores[best[i]];
        indices[t * k + i] = row[best[i]];
      }
    }
  });
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

// Memory is read in order, yet the processor's own prefetcher stops at each page, which is a row or
// two: asking for the next row while this one is at work takes 20% less time.
void adam(float* W, float* exp_avg, float* exp_avg_sq, uint16_t* shadow, int64_t shadow_stride,
          const Factor* factors, int64_t n_factors, int64_t S, int64_t d, Step s, int64_t unit,
          int64_t threads) {
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
  });
}

}  // extern "C"
