// Attention within the segments of packed rows, in place: no gathering, no padding, no masked-out products.
//
// A segment is a run of neighbouring tokens in the flattened rows [tokens, heads, width]. Its queries see the keys of
// the same segment only, so its scores are one small matrix for each head, which stays in the first-level cache
// together with its keys and values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megaseq {

// A tensor [tokens, heads, width] in row-major order within a head; strides in elements.
template <typename T>
struct HeadsOf {
  T* data;
  std::size_t num_heads;
  std::int64_t token_stride;
  std::int64_t head_stride;
};
using Heads = HeadsOf<float>;
using ConstHeads = HeadsOf<const float>;

// Where a segment's queries and keys stand, and where its probabilities begin, counted for one head.
struct Segment {
  std::int64_t query_start;
  std::int64_t num_queries;
  std::int64_t key_start;
  std::int64_t num_keys;
  std::int64_t probabilities;
};

// Which attention weights become zero, as dropout.h defines it: the weight of query t, key s and head n of row b is
// element starts[b] + (n * query_length + t) * key_length + s of the stream.
struct WeightDropout {
  std::uint64_t key;
  std::uint32_t threshold;
  float scale;  // Of those that stay.
  const std::int64_t* starts;
  std::int64_t query_length;
  std::int64_t key_length;
};

// Added to the scaled score of query t and key s of head n: table[n * count + i], where i is s - t - first, but at
// least 0 and below `count`. Rows of queries and keys are equally long.
struct DistanceBias {
  const float* table;
  std::int64_t first;
  std::int64_t count;
};

struct AttentionCall {
  const Segment* segments;
  std::size_t num_segments;
  std::size_t width;  // Of a head, a multiple of kAttentionBlock.
  bool causal;        // Within a segment, query i sees keys 0 to i.
  float scale;
  std::size_t num_threads;
  const WeightDropout* dropout;  // Null: none.
  const DistanceBias* bias;      // Null: none.
};

// Rows of probabilities are padded to a multiple of this, and so must be the width of a head.
inline constexpr std::size_t kAttentionBlock = 16;

// Writes the outputs of all queries of all segments, and their probabilities, which the backward pass wants; those that
// dropout takes have their sign turned. T is float, or std::uint16_t for the bits of bfloat16: then all arithmetic and
// the probabilities are floats, and results are rounded to nearest, ties to even.
template <typename T>
void attention_forward(const AttentionCall& call, HeadsOf<const T> query, HeadsOf<const T> key, HeadsOf<const T> value,
                       HeadsOf<T> output, float* probabilities);

// Writes the gradients of all queries, keys and values of all segments, and of the bias's table where there is one.
// Sums are made in the same order on any number of threads.
template <typename T>
void attention_backward(const AttentionCall& call, HeadsOf<const T> gradient, HeadsOf<const T> query,
                        HeadsOf<const T> key, HeadsOf<const T> value, const float* probabilities,
                        HeadsOf<T> query_gradient, HeadsOf<T> key_gradient, HeadsOf<T> value_gradient,
                        float* bias_gradient);

}  // namespace megaseq
