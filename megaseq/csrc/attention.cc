#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "vector.h"

namespace megaseq {
namespace {

constexpr std::int64_t kBlock = kAttentionBlock;
constexpr int kRows = 6;  // Twelve sums, two vectors of b and one factor fill the sixteen registers of AVX2.
constexpr int kVectors = kAttentionBlock / kLanes;

// A matrix with neighbouring columns.
struct Matrix {
  float* data;
  std::int64_t stride;
};
struct ConstMatrix {
  const float* data;
  std::int64_t stride;
};

// c[rows, 16] (+)= a[rows, depth] * b[depth, 16]. The sums are vectors and not arrays, which compilers leave in memory.
template <int rows>
MEGASEQ_INLINE void product_block(ConstMatrix a, ConstMatrix b, Matrix c, std::int64_t depth, bool add) {
  Vector sums[rows][kVectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = add ? load(c.data + i * c.stride + j * kLanes) : Vector{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const float* row = b.data + k * b.stride;
    Vector values[kVectors];
    for (int j = 0; j < kVectors; ++j) values[j] = load(row + j * kLanes);
    for (int i = 0; i < rows; ++i) {
      const float factor = a.data[i * a.stride + k];
      for (int j = 0; j < kVectors; ++j) sums[i][j] += values[j] * factor;
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c.data + i * c.stride + j * kLanes, sums[i][j]);
  }
}

// c[rows, columns] (+)= a[rows, depth] * b[depth, columns]; columns is a multiple of the block.
MEGASEQ_INLINE void product(ConstMatrix a, ConstMatrix b, Matrix c, std::int64_t rows, std::int64_t columns,
                            std::int64_t depth, bool add) {
  for (std::int64_t j = 0; j < columns; j += kBlock) {
    const ConstMatrix right{b.data + j, b.stride};
    for (std::int64_t i = 0; i < rows; i += kRows) {
      const ConstMatrix left{a.data + i * a.stride, a.stride};
      const Matrix out{c.data + i * c.stride + j, c.stride};
      // Rows one by one would wait for each sum in turn, so what is left at the end has blocks of its own.
      switch (std::min<std::int64_t>(rows - i, kRows)) {
        case 1: product_block<1>(left, right, out, depth, add); break;
        case 2: product_block<2>(left, right, out, depth, add); break;
        case 3: product_block<3>(left, right, out, depth, add); break;
        case 4: product_block<4>(left, right, out, depth, add); break;
        case 5: product_block<5>(left, right, out, depth, add); break;
        default: product_block<kRows>(left, right, out, depth, add);
      }
    }
  }
}

// target[columns, padded] = source[rows, columns] transposed, with zeros from column `rows` on.
MEGASEQ_INLINE void transpose(ConstMatrix source, std::int64_t rows, std::int64_t columns, std::int64_t padded,
                              float* target) {
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) target[j * padded + i] = source.data[i * source.stride + j];
    for (std::int64_t i = rows; i < padded; ++i) target[j * padded + i] = 0.0f;
  }
}

// Turns a row of scores into probabilities; those from `seen` on become 0.
MEGASEQ_INLINE void softmax_row(float* row, std::int64_t seen, std::int64_t padded, float scale) {
  float top = -std::numeric_limits<float>::infinity();
  for (std::int64_t j = 0; j < seen; ++j) top = std::max(top, row[j]);
  for (std::int64_t j = 0; j < padded; ++j) row[j] = exponential((std::min(row[j], top) - top) * scale);
  for (std::int64_t j = seen; j < padded; ++j) row[j] = 0.0f;
  float sums[kBlock] = {};
  for (std::int64_t j = 0; j < padded; j += kBlock) {
    for (std::int64_t k = 0; k < kBlock; ++k) sums[k] += row[j + k];
  }
  float total = 0.0f;
  for (std::int64_t k = 0; k < kBlock; ++k) total += sums[k];
  const float inverse = 1.0f / total;
  for (std::int64_t j = 0; j < padded; ++j) row[j] *= inverse;
}

// Turns a row of the probabilities' gradient into that of the scores.
MEGASEQ_INLINE void softmax_row_gradient(const float* probabilities, float* gradient, std::int64_t padded,
                                         float scale) {
  float sums[kBlock] = {};
  for (std::int64_t j = 0; j < padded; j += kBlock) {
    for (std::int64_t k = 0; k < kBlock; ++k) sums[k] += probabilities[j + k] * gradient[j + k];
  }
  float mean = 0.0f;
  for (std::int64_t k = 0; k < kBlock; ++k) mean += sums[k];
  for (std::int64_t j = 0; j < padded; ++j) gradient[j] = probabilities[j] * (gradient[j] - mean) * scale;
}

constexpr std::int64_t round_up(std::int64_t length) { return (length + kBlock - 1) / kBlock * kBlock; }

template <typename T>
auto head_of(const HeadsOf<T>& heads, std::int64_t token, std::int64_t head) {
  using Result = std::conditional_t<std::is_const_v<T>, ConstMatrix, Matrix>;
  return Result{heads.data + token * heads.token_stride + head * heads.head_stride, heads.token_stride};
}

MEGASEQ_CLONES
void forward_head(ConstMatrix query, ConstMatrix key, ConstMatrix value, Matrix output, float* probabilities,
                  float* scratch, std::int64_t num_queries, std::int64_t num_keys, std::int64_t width, bool causal,
                  float scale) {
  const std::int64_t padded = round_up(num_keys);
  transpose(key, num_keys, width, padded, scratch);
  product(query, {scratch, padded}, {probabilities, padded}, num_queries, padded, width, false);
  for (std::int64_t i = 0; i < num_queries; ++i) {
    softmax_row(probabilities + i * padded, causal ? std::min(i + 1, num_keys) : num_keys, padded, scale);
  }
  product({probabilities, padded}, value, output, num_queries, width, num_keys, false);
}

struct HeadGradients {
  Matrix query, key, value;
};

MEGASEQ_CLONES
void backward_head(ConstMatrix gradient, ConstMatrix query, ConstMatrix key, ConstMatrix value,
                   const float* probabilities, HeadGradients out, float* scratch, std::int64_t num_queries,
                   std::int64_t num_keys, std::int64_t width, float scale, bool add) {
  const std::int64_t padded = round_up(num_keys), padded_queries = round_up(num_queries);
  float* turned = scratch;                                             // [width, padded], then [keys, queries].
  float* scores = scratch + std::max(width, padded_queries) * padded;  // [queries, padded].
  transpose(value, num_keys, width, padded, turned);
  product(gradient, {turned, padded}, {scores, padded}, num_queries, padded, width, false);
  for (std::int64_t i = 0; i < num_queries; ++i) {
    softmax_row_gradient(probabilities + i * padded, scores + i * padded, padded, scale);
  }
  product({scores, padded}, key, out.query, num_queries, width, num_keys, false);
  transpose({scores, padded}, num_queries, num_keys, padded_queries, turned);
  product({turned, padded_queries}, query, out.key, num_keys, width, num_queries, add);
  transpose({probabilities, padded}, num_queries, num_keys, padded_queries, turned);
  product({turned, padded_queries}, gradient, out.value, num_keys, width, num_queries, add);
}

// Runs work(segment, scratch) for all segments on several threads, each with `scratch_size` floats of its own.
template <typename Work>
void for_segments(const AttentionCall& call, std::size_t scratch_size, Work work) {
  constexpr std::size_t kBatch = 8;
  std::atomic<std::size_t> next{0};
  const auto run = [&] {
    std::vector<float> scratch(scratch_size);
    for (std::size_t first; (first = next.fetch_add(kBatch)) < call.num_segments;) {
      const std::size_t last = std::min(first + kBatch, call.num_segments);
      for (std::size_t i = first; i < last; ++i) work(call.segments[i], scratch.data());
    }
  };
  const std::size_t batches = (call.num_segments + kBatch - 1) / kBatch;
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < std::min(call.num_threads, batches); ++i) threads.emplace_back(run);
  run();
  for (auto& thread : threads) thread.join();
}

std::int64_t longest(const AttentionCall& call) {
  std::int64_t length = 0;
  for (std::size_t i = 0; i < call.num_segments; ++i) {
    length = std::max({length, call.segments[i].num_queries, call.segments[i].num_keys});
  }
  return round_up(length);
}

}  // namespace

void attention_forward(const AttentionCall& call, ConstHeads query, ConstHeads key, ConstHeads value, Heads output,
                       float* probabilities) {
  const auto width = static_cast<std::int64_t>(call.width);
  const auto num_heads = static_cast<std::int64_t>(query.num_heads);
  const auto group = num_heads / static_cast<std::int64_t>(key.num_heads);
  const auto scratch_size = static_cast<std::size_t>(width * longest(call));
  for_segments(call, scratch_size, [&](const Segment& segment, float* scratch) {
    const std::int64_t area = segment.num_queries * round_up(segment.num_keys);
    for (std::int64_t head = 0; head < num_heads; ++head) {
      forward_head(head_of(query, segment.query_start, head), head_of(key, segment.key_start, head / group),
                   head_of(value, segment.key_start, head / group), head_of(output, segment.query_start, head),
                   probabilities + segment.probabilities * num_heads + head * area, scratch, segment.num_queries,
                   segment.num_keys, width, call.causal, call.scale);
    }
  });
}

void attention_backward(const AttentionCall& call, ConstHeads gradient, ConstHeads query, ConstHeads key,
                        ConstHeads value, const float* probabilities, Heads query_gradient, Heads key_gradient,
                        Heads value_gradient) {
  const auto width = static_cast<std::int64_t>(call.width);
  const auto num_heads = static_cast<std::int64_t>(query.num_heads);
  const auto group = num_heads / static_cast<std::int64_t>(key.num_heads);
  const std::int64_t length = longest(call);
  const auto scratch_size = static_cast<std::size_t>((std::max(width, length) + length) * length);
  for_segments(call, scratch_size, [&](const Segment& segment, float* scratch) {
    const std::int64_t area = segment.num_queries * round_up(segment.num_keys);
    for (std::int64_t head = 0; head < num_heads; ++head) {
      const HeadGradients out{head_of(query_gradient, segment.query_start, head),
                              head_of(key_gradient, segment.key_start, head / group),
                              head_of(value_gradient, segment.key_start, head / group)};
      backward_head(head_of(gradient, segment.query_start, head), head_of(query, segment.query_start, head),
                    head_of(key, segment.key_start, head / group), head_of(value, segment.key_start, head / group),
                    probabilities + segment.probabilities * num_heads + head * area, out, scratch,
                    segment.num_queries, segment.num_keys, width, call.scale, head % group != 0);
    }
  });
}

}  // namespace megaseq
