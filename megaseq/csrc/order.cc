#include "order.h"

#include <array>
#include <bit>

namespace megaseq {
namespace {

constexpr int kRounds = 8;
constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr std::uint64_t kFirst = 0xBF58476D1CE4E5B9;
constexpr std::uint64_t kSecond = 0x94D049BB133111EB;

std::uint64_t splitmix64(std::uint64_t value) {
  value = (value ^ (value >> 30)) * kFirst;
  value = (value ^ (value >> 27)) * kSecond;
  return value ^ (value >> 31);
}

// A keyed bijection on [0, 2^(left + right)).
struct Feistel {
  std::array<std::uint64_t, kRounds> keys;
  int left_width;
  int right_width;

  Feistel(std::uint64_t key, std::uint64_t size) {
    for (int round = 0; round < kRounds; ++round) keys[round] = splitmix64(key + (round + 1) * kGolden);
    const int needed = static_cast<int>(std::bit_width(size - 1));
    const int bits = needed < 2 ? 2 : needed;
    left_width = bits / 2;
    right_width = bits - left_width;
  }

  std::uint64_t operator()(std::uint64_t value) const {
    std::uint64_t left = value >> right_width;
    std::uint64_t right = value & ((std::uint64_t{1} << right_width) - 1);
    int width = left_width;
    int other = right_width;
    for (const std::uint64_t key : keys) {
      std::uint64_t mixed = (right ^ key) * kFirst;
      mixed ^= mixed >> 32;
      mixed *= kSecond;
      mixed >>= 64 - width;
      const std::uint64_t next = left ^ mixed;
      left = right;
      right = next;
      const int swapped = width;
      width = other;
      other = swapped;
    }
    return left << right_width | right;  // The number of rounds is even: the widths are back in their places.
  }
};

}  // namespace

void permute(std::int64_t* values, std::size_t count, std::uint64_t key, std::uint64_t size, std::uint64_t start) {
  const Feistel feistel(key, size);
  for (std::size_t index = 0; index < count; ++index) {
    std::uint64_t value = feistel(start + index);
    while (value >= size) value = feistel(value);
    values[index] = static_cast<std::int64_t>(value);
  }
}

}  // namespace megaseq
