#include "attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
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

// Rows of bfloat16 bits as floats, `width` each.
MEGASEQ_CLONES
void widen(const std::uint16_t* source, std::int64_t stride, std::int64_t rows, std::int64_t width, float* target) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < width; ++j) {
      target[i * width + j] = std::bit_cast<float>(static_cast<std::uint32_t>(source[i * stride + j]) << 16);
    }
  }
}

// The reverse, rounded to nearest, ties to even. NaN becomes one NaN: rounding would carry its bits into infinity.
MEGASEQ_CLONES
void narrow(const float* source, std::int64_t rows, std::int64_t width, std::uint16_t* target, std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < width; ++j) {
      const auto bits = std::bit_cast<std::uint32_t>(source[i * width + j]);
      const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
      const std::uint32_t value = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
      target[i * stride + j] = static_cast<std::uint16_t>(value);
    }
  }
}

// Hands out a thread's scratch, piece by piece.
struct Scratch {
  float* next;
  float* take(std::int64_t size) {
    float* piece = next;
    next += size;
    return piece;
  }
};

// A head's rows to read: floats where they stand, bfloat16 as a copy.
ConstMatrix read(const HeadsOf<const float>& heads, std::int64_t token, std::int64_t head, std::int64_t, std::int64_t,
                 Scratch&) {
  return {heads.data + token * heads.token_stride + head * heads.head_stride, heads.token_stride};
}
ConstMatrix read(const HeadsOf<const std::uint16_t>& heads, std::int64_t token, std::int64_t head, std::int64_t rows,
                 std::int64_t width, Scratch& scratch) {
  float* copy = scratch.take(rows * width);
  widen(heads.data + token * heads.token_stride + head * heads.head_stride, heads.token_stride, rows, width, copy);
  return {copy, width};
}

// A head's rows to write: floats where they belong, bfloat16 in scratch until `finish`.
Matrix place(const HeadsOf<float>& heads, std::int64_t token, std::int64_t head, std::int64_t, std::int64_t, Scratch&) {
  return {heads.data + token * heads.token_stride + head * heads.head_stride, heads.token_stride};
}
Matrix place(const HeadsOf<std::uint16_t>&, std::int64_t, std::int64_t, std::int64_t rows, std::int64_t width,
             Scratch& scratch) {
  return {scratch.take(rows * width), width};
}
void finish(const HeadsOf<float>&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, Matrix) {}
void finish(const HeadsOf<std::uint16_t>& heads, std::int64_t token, std::int64_t head, std::int64_t rows,
            std::int64_t width, Matrix matrix) {
  narrow(matrix.data, rows, width, heads.data + token * heads.token_stride + head * heads.head_stride,
         heads.token_stride);
}

// Floats that a thread wants beside its matrices for the copies of `count` heads' rows.
template <typename T>
std::size_t copies(std::int64_t count, std::int64_t length, std::int64_t width) {
  return std::is_same_v<std::remove_const_t<T>, float> ? 0 : static_cast<std::size_t>(count * length * width);
}

}  // namespace

template <typename T>
void attention_forward(const AttentionCall& call, HeadsOf<const T> query, HeadsOf<const T> key, HeadsOf<const T> value,
                       HeadsOf<T> output, float* probabilities) {
  const auto width = static_cast<std::int64_t>(call.width);
  const auto num_heads = static_cast<std::int64_t>(query.num_heads);
  const auto group = num_heads / static_cast<std::int64_t>(key.num_heads);
  const std::int64_t length = longest(call);
  const std::size_t scratch_size = static_cast<std::size_t>(width * length) + copies<T>(4, length, width);
  for_segments(call, scratch_size, [&](const Segment& segment, float* memory) {
    const std::int64_t area = segment.num_queries * round_up(segment.num_keys);
    const std::int64_t first = segment.query_start, queries = segment.num_queries;
    const std::int64_t first_key = segment.key_start, keys = segment.num_keys;
    for (std::int64_t head = 0; head < num_heads; ++head) {
      Scratch scratch{memory + width * length};
      const Matrix out = place(output, first, head, queries, width, scratch);
      forward_head(read(query, first, head, queries, width, scratch),
                   read(key, first_key, head / group, keys, width, scratch),
                   read(value, first_key, head / group, keys, width, scratch), out,
                   probabilities + segment.probabilities * num_heads + head * area, memory, queries, keys, width,
                   call.causal, call.scale);
      finish(output, first, head, queries, width, out);
    }
  });
}

template <typename T>
void attention_backward(const AttentionCall& call, HeadsOf<const T> gradient, HeadsOf<const T> query,
                        HeadsOf<const T> key, HeadsOf<const T> value, const float* probabilities,
                        HeadsOf<T> query_gradient, HeadsOf<T> key_gradient, HeadsOf<T> value_gradient) {
  const auto width = static_cast<std::int64_t>(call.width);
  const auto num_heads = static_cast<std::int64_t>(query.num_heads);
  const auto group = num_heads / static_cast<std::int64_t>(key.num_heads);
  const std::int64_t length = longest(call);
  const std::int64_t own = (std::max(width, length) + length) * length;
  for_segments(call, static_cast<std::size_t>(own) + copies<T>(7, length, width), [&](const Segment& segment,
                                                                                      float* memory) {
    const std::int64_t area = segment.num_queries * round_up(segment.num_keys);
    const std::int64_t first = segment.query_start, queries = segment.num_queries;
    const std::int64_t first_key = segment.key_start, keys = segment.num_keys;
    for (std::int64_t shared = 0; shared < num_heads / group; ++shared) {
      // What the query heads of a group add to is rounded once, at the end.
      Scratch scratch{memory + own};
      const ConstMatrix k = read(key, first_key, shared, keys, width, scratch);
      const ConstMatrix v = read(value, first_key, shared, keys, width, scratch);
      const Matrix dk = place(key_gradient, first_key, shared, keys, width, scratch);
      const Matrix dv = place(value_gradient, first_key, shared, keys, width, scratch);
      for (std::int64_t head = shared * group; head < (shared + 1) * group; ++head) {
        Scratch of_head = scratch;
        const Matrix dq = place(query_gradient, first, head, queries, width, of_head);
        backward_head(read(gradient, first, head, queries, width, of_head),
                      read(query, first, head, queries, width, of_head), k, v,
                      probabilities + segment.probabilities * num_heads + head * area, {dq, dk, dv}, memory, queries,
                      keys, width, call.scale, head % group != 0);
        finish(query_gradient, first, head, queries, width, dq);
      }
      finish(key_gradient, first_key, shared, keys, width, dk);
      finish(value_gradient, first_key, shared, keys, width, dv);
    }
  });
}

#define MEGASEQ_ATTENTION(T)                                                                                         \
  template void attention_forward<T>(const AttentionCall&, HeadsOf<const T>, HeadsOf<const T>, HeadsOf<const T>,      \
                                     HeadsOf<T>, float*);                                                            \
  template void attention_backward<T>(const AttentionCall&, HeadsOf<const T>, HeadsOf<const T>, HeadsOf<const T>,     \
                                      HeadsOf<const T>, const float*, HeadsOf<T>, HeadsOf<T>, HeadsOf<T>);
MEGASEQ_ATTENTION(float)
MEGASEQ_ATTENTION(std::uint16_t)
#undef MEGASEQ_ATTENTION

}  // namespace megaseq
