// The epoch permutation; data/order.py describes it and gives the same values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megaseq {

// Writes places `start` to `start + count` of the permutation of [0, size) under `key`.
void permute(std::int64_t* values, std::size_t count, std::uint64_t key, std::uint64_t size, std::uint64_t start);

}  // namespace megaseq
