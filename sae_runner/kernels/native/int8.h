// Rows in int8, and products of them where a processor multiplies matrices of int8 (AMX).
//
// A row is close to `step` times whole numbers of at most 127, `step` being a 127th of its largest
// entry. A product of two such rows is a sum of whole numbers, which is exact.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "largest.h"
#include "rows.h"

#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// A tile has 16 lines of 64 bytes. Of W, line i of tile t has columns 64 t + 4 i to + 3 of each of
// 16 latents, a panel; of x, line r has columns 64 t to + 63 of row r.
constexpr int64_t PANEL = 16, DEPTH = 64, TILE = PANEL * DEPTH;

int64_t tiles_across(int64_t d) { return (d + DEPTH - 1) / DEPTH; }

struct Int8Rows {  // Of W, as in base.py; each padded with zeros to a whole pair of panels.
  int8_t* tiles;
  float* steps;
  float* lengths;
  float* lost;
};

// A row's step, its length, and what may be lost of it. Its whole numbers are zero, and all scores
// NaN, if it has a NaN, of which the step is one then, or an infinity.
struct Quantised {
  float step, length, lost;
};

Quantised quantise(const float* __restrict row, int64_t d, int8_t* __restrict out) {
  float most = 0;
  int32_t odd = 0;
#pragma omp simd reduction(max : most) reduction(| : odd)
  for (int64_t c = 0; c < d; ++c) {
    const float size = std::fabs(row[c]);
    most = size > most ? size : most;
    odd |= row[c] != row[c];
  }
  if (odd) most = std::numeric_limits<float>::quiet_NaN();
  if (!(most > 1e-30f && most < std::numeric_limits<float>::infinity())) {
    std::fill(out, out + d, 0);
    const float step = most > 1e-30f || odd ? most : 0;
    return {step, step, step};
  }
  const float scale = 127 / most;
  float squares = 0, of_zeros = 0;  // In steps, of which no square is too small.
  int32_t zeros = 0;
#pragma omp simd reduction(+ : squares) reduction(+ : of_zeros) reduction(+ : zeros)
  for (int64_t c = 0; c < d; ++c) {
    const float exact = row[c] * scale, whole = std::nearbyint(exact);
    out[c] = static_cast<int8_t>(static_cast<int32_t>(whole));
    squares += exact * exact;
    of_zeros += whole == 0 ? exact * exact : 0;
    zeros += whole == 0;
  }
  const float step = most / 127, share = static_cast<float>(zeros) / d;
  return {step, step * std::sqrt(squares), step * std::sqrt(of_zeros * share)};
}

// Write `count` rows of W, at most a panel.
void write_panel(const float* W, int64_t first, int64_t count, int64_t d, Int8Rows to) {
  const int64_t T = tiles_across(d);
  thread_local std::vector<int8_t> numbers;
  numbers.assign(PANEL * T * DEPTH, 0);
  for (int64_t j = 0; j < count; ++j) {
    const auto found = quantise(W + (first + j) * d, d, numbers.data() + j * T * DEPTH);
    to.steps[first + j] = found.step;
    to.lengths[first + j] = found.length;
    to.lost[first + j] = found.lost;
  }
  int8_t* tiles = to.tiles + first * T * DEPTH;
  for (int64_t line = 0; line < T * PANEL; ++line)
    for (int64_t j = 0; j < PANEL; ++j)
      std::memcpy(tiles + (line * PANEL + j) * 4, numbers.data() + (j * T * PANEL + line) * 4, 4);
}

// Scores are off by the rounding of x and of W_j. A rounding error is uniform between −1/2 and 1/2
// of a step and a matter of chance, so that of a sum has a variance of (a² ‖W_j‖² + w_j² ‖x‖²) / 12,
// with steps a of x and w_j of W_j; so many times its root is counted on.
//
// But what is less than half a step is lost, and that is no matter of chance: where one entry of x
// is far larger than the others, x₀, all that is lost, may be along a W_j. Of ‖W_j‖ as much lies in
// those columns as if it were spread evenly: ⟨x₀, W_j⟩ ≤ ‖x₀‖ ‖W_j‖ √share. Likewise of W_j.
constexpr float DEVIATIONS = 4;

#ifdef __AMX_INT8__

// The kernel gives a process tiles when it asks for them.
bool tiles_granted() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

// While it lives, this thread's tiles are whole ones.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t lines[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = DEPTH, shape.lines[i] = PANEL;
    asm volatile("" ::"r"(&shape) : "memory");  // Else GCC 12 sees nobody who reads it.
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// out[16 rows, 32 latents] = sums · step of the row · steps of the latents + b, as bfloat16.
void write_scores(const int32_t (*sums)[256], const float* row_steps, const float* steps,
                  const float* b, int64_t rows, int64_t latents, int16_t* out, int64_t stride) {
  const auto some = [=](int64_t from) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(latents - from, 0, 16)) - 1);
  };
  const __m512 s0 = _mm512_loadu_ps(steps), s1 = _mm512_loadu_ps(steps + 16);
  const __m512 b0 = _mm512_maskz_loadu_ps(some(0), b), b1 = _mm512_maskz_loadu_ps(some(16), b + 16);
  const auto score = [](const int32_t* sum, __m512 scale, __m512 bias) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum)), scale, bias);
  };
  const __mmask32 all = some(0) | static_cast<__mmask32>(some(16)) << 16;
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 a = _mm512_set1_ps(row_steps[r]);
    const __m512 low = score(sums[0] + 16 * r, _mm512_mul_ps(a, s0), b0);
    const __m512 high = score(sums[1] + 16 * r, _mm512_mul_ps(a, s1), b1);
    const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16(out + r * stride, all, both);
  }
}

// Rows and latents by pairs of panels: each tile that is loaded is multiplied by two. Of latents a
// job has as many as fit the second cache, and runs through all of them for 32 rows, which fit the
// first; the scores of a row are then written 1 KB at a time.
void scores_of(const int8_t* x, const float* row_steps, Int8Rows W, const float* b, int64_t n,
               int64_t S, int64_t d, int16_t* out, int64_t threads) {
  constexpr int64_t PAIR = 2 * PANEL, ROWS = 256, LATENTS = 512;
  const int64_t T = tiles_across(d), row_jobs = (n + ROWS - 1) / ROWS;
  in_parallel(row_jobs * ((S + LATENTS - 1) / LATENTS), 1, threads, [=](int64_t job, int64_t) {
    const Tiles tiles;
    alignas(64) int32_t sums[4][256];
    const int64_t first = job % row_jobs * ROWS, last = std::min(n, first + ROWS);
    const int64_t begin = job / row_jobs * LATENTS, end = std::min(S, begin + LATENTS);
    for (int64_t i = first; i < last; i += PAIR)
      for (int64_t j = begin; j < end; j += PAIR) {
        const int8_t *x0 = x + i * T * DEPTH, *x1 = x0 + T * TILE;
        const int8_t *w0 = W.tiles + j * T * DEPTH, *w1 = w0 + T * TILE;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int64_t at = 0; at < T * TILE; at += TILE) {
          _tile_loadd(4, x0 + at, DEPTH); _tile_loadd(6, w0 + at, DEPTH);
          _tile_loadd(5, x1 + at, DEPTH); _tile_loadd(7, w1 + at, DEPTH);
          _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t row = i + half * PANEL, rows = std::clamp<int64_t>(last - row, 0, PANEL);
          write_scores(sums + 2 * half, row_steps + row, W.steps + j, b + j, rows, S - j,
                       out + row * S + j, S);
        }
      }
  });
}

#endif

// A key that lies so much lower, or a little more: scores and this number were rounded too, by a
// 512th at most each. What is no number, or infinite, is met by all keys.
int16_t within(int16_t key, float reach) {
  const uint32_t bits = static_cast<uint32_t>(key < 0 ? -key | 0x8000 : key) << 16;
  float score;
  std::memcpy(&score, &bits, 4);
  const float least = score - reach - std::fabs(score) / 128;
  if (key == LEAST<int16_t> || !(std::fabs(least) <= std::numeric_limits<float>::max()))
    return LEAST<int16_t>;
  return key_of<int16_t>(static_cast<int16_t>(bf16(least)));
}

// Of each row the k largest of x_t W_j + b_j: exactly, of those latents whose score, which is off
// by `error` at most, may be among them. The k-th largest product is at least the k-th largest
// score less an error; a latent with as much has a score of at least another error less.
void choose_within(const int16_t* scores, const float* error, const float* x, const float* W,
                   const float* b, int64_t n, int64_t S, int64_t d, int64_t k, float* values,
                   int32_t* indices, int32_t* n_candidates, int64_t threads) {
  using Bits = int16_t;
  in_parallel(n, 8, threads, [=](int64_t begin, int64_t end) {
    thread_local std::vector<Bits> keys;
    thread_local std::vector<int32_t> places, exact_keys, best;
    thread_local std::vector<Hit> hits;
    thread_local std::vector<float> exact;
    keys.resize(std::max(S, GROUPS) + 1), places.resize(S + 1), hits.resize(S / 16 + 1);
    best.resize(k);
    for (int64_t t = begin; t < end; ++t) {
      const Bits* row = scores + t * S;
      Bits cut = within(lower_bound(row, S, k, keys.data()), 2 * error[t]);
      auto found = survivors(row, S, cut, keys.data(), places.data(), hits.data());
      cut = within(kth_largest(keys.data(), found, k), 2 * error[t]);
      int64_t kept = 0;
      for (int64_t i = 0; i < found; ++i) {
        places[kept] = places[i];
        kept += keys[i] >= cut;
      }
      exact.resize(kept), exact_keys.resize(kept);
      dots(x + t * d, 0, kept, [=](int64_t e) { return W + places[e] * d; }, d, exact.data());
      for (int64_t i = 0; i < kept; ++i) {
        exact[i] += b[places[i]];
        std::memcpy(&exact_keys[i], &exact[i], 4);
        exact_keys[i] = key_of<int32_t>(exact_keys[i]);
      }
      write_largest(exact_keys.data(), kept, k, [](int64_t i) { return i; }, best.data());
      for (int64_t i = 0; i < k; ++i) {
        values[t * k + i] = exact[best[i]];
        indices[t * k + i] = places[best[i]];
      }
      n_candidates[t] = kept;
    }
  });
}

}  // namespace
