// Packs pairs in rows; data/packing.py describes the algorithm and gives the same rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megaseq {

struct Pairs {
  const std::int32_t* source;  // Tokens of each source, 0 to source_row.
  const std::int32_t* target;  // Tokens of each target, 0 to target_row.
  std::size_t count;
};

// Both at most 65536, so that scores fit 32 bits.
struct RowRoom {
  std::int32_t source;
  std::int32_t target;
};

// Writes the rows' starts to `offsets` [count + 1] and their examples to `examples` [count]; returns the number of rows.
std::size_t pack(const Pairs& pairs, RowRoom room, std::size_t lookahead, std::int64_t* offsets,
                 std::int64_t* examples);

}  // namespace megaseq
