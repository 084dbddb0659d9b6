// The k largest of a row of scores, float32 or bfloat16, without sorting them; and all above a floor.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "rows.h"

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

uint16_t bf16(float x) {  // Rounded to the nearest, ties to even.
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return x != x ? 0x7FC0 : rounded;
}

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

inline float number(int32_t bits) {
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}
inline float number(int16_t bits) {
  return number(static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16));
}

// Of places `begin` to `end`: how many scores exceed their floor less the error.
template <class Bits>
int32_t n_above(const Bits* row, const float* least, float error, int64_t begin, int64_t end) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t j = begin; j < end; ++j) count += number(row[j]) > least[j] - error;
  return count;
}

template <class Bits>
void count_above(const Bits* scores, const float* least, const float* error, int64_t n, int64_t S,
                 int64_t* counts, int64_t threads) {
  in_parallel(n, 16, threads, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      counts[t] = n_above(scores + t * S, least, error[t], 0, S);
  });
}

template <class Bits>
void list_above(const Bits* scores, const float* least, const float* error, const int64_t* offsets,
                int64_t n, int64_t S, int32_t* out, int64_t threads) {
  constexpr int64_t SOME = 64;  // Few of which have one.
  in_parallel(n, 16, threads, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Bits* row = scores + t * S;
      int32_t* next = out + offsets[t];
      for (int64_t i = 0; i < S; i += SOME) {
        const int64_t last = std::min(S, i + SOME);
        if (n_above(row, least, error[t], i, last))
          for (int64_t j = i; j < last; ++j)
            if (number(row[j]) > least[j] - error[t]) *next++ = static_cast<int32_t>(j);
      }
    }
  });
}

}  // namespace
