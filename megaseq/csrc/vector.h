// Eight floats at a time, and what attention and decoding do with them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
// Vectors are passed between inlined functions only, so there is no ABI to change.
#pragma GCC diagnostic ignored "-Wpsabi"
#define MEGASEQ_INLINE inline __attribute__((always_inline))
#else
#define MEGASEQ_INLINE inline
#endif

// One body, compiled for several instruction sets, the best of which is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define MEGASEQ_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGASEQ_CLONES
#endif

namespace megaseq {

inline constexpr int kLanes = 8;

// One register with AVX2, half of one with AVX-512, two with SSE or NEON.
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t IntegerVector __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

MEGASEQ_INLINE Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

MEGASEQ_INLINE void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

MEGASEQ_INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }

MEGASEQ_INLINE float sum(Vector value) {
  return ((value[0] + value[4]) + (value[1] + value[5])) + ((value[2] + value[6]) + (value[3] + value[7]));
}

// e^x for x <= 0: 2^n * e^r with |r| <= ln(2) / 2 and a Taylor polynomial of degree 6, relative error below 2e-7.
MEGASEQ_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const float p =
      1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// The same of eight numbers; of NaN it is NaN.
MEGASEQ_INLINE Vector exponential(Vector x) {
  const Vector least = Vector{} - 87.0f;
  x = x < least ? least : x;
  const Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const Vector p =
      1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
  const IntegerVector bits = (__builtin_convertvector(n, IntegerVector) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

}  // namespace megaseq
