// What a step of beam search does beside matrix products: attention of one token to the tokens before it, which stand
// anywhere in a cache, and the best tokens of a row of logits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace megaseq {

// Query i attends to the keys and values at places[i * places_stride ...], or, where `places` is null, to those at
// (i / group) * length .... There are counts[i / group] of them, or, where `counts` is null, `length`.
struct PlacesCall {
  const std::int64_t* places;
  std::int64_t places_stride;
  const std::int64_t* counts;
  std::int64_t group;
  std::int64_t length;
  std::int64_t num_queries;
  std::int64_t width;  // Of a head, a multiple of kLanes.
  float scale;
  std::size_t num_threads;
};

// softmax(scale * q K^T + bias) V for each query and head; bias[head * bias_stride + j] belongs to a query's key j and may
// be null. Zeros for a query without keys.
void attend_places(const PlacesCall& call, ConstHeads query, ConstHeads key, ConstHeads value, const float* bias,
                   std::int64_t bias_stride, Heads output);

struct TopCall {
  std::size_t rows;
  std::size_t columns;
  std::size_t count;  // At most `columns`.
  std::size_t num_threads;
};

// The best `count` of log_softmax(row) with their columns, best first and the lower column first among equals.
// shifts[2 * i] and shifts[2 * i + 1] are what log_softmax subtracts from row i, one after the other: its largest
// value, and the log of the sum. A row of -inf stays -inf; NaN anywhere in a row is NaN everywhere.
void log_softmax_top(const TopCall& call, const float* logits, float* values, std::int64_t* columns, float* shifts);

}  // namespace megaseq
