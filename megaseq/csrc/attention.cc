#include "attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

#include "dropout.h"
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

// Turns a row of the probabilities' gradient into that of the scores. `weights` are the probabilities as they met the
// values, so with dropout some are 0 and the others larger; the sign of a probability says nothing here.
MEGASEQ_INLINE void softmax_row_gradient(const float* probabilities, const float* weights, float* gradient,
                                         std::int64_t padded) {
  float sums[kBlock] = {};
  for (std::int64_t j = 0; j < padded; j += kBlock) {
    for (std::int64_t k = 0; k < kBlock; ++k) sums[k] += weights[j + k] * gradient[j + k];
  }
  float mean = 0.0f;
  for (std::int64_t k = 0; k < kBlock; ++k) mean += sums[k];
  for (std::int64_t j = 0; j < padded; ++j) {
    gradient[j] = weights[j] * gradient[j] - std::fabs(probabilities[j]) * mean;
  }
}

// target = the probabilities that are kept, scaled, and 0 for the others, which have their sign turned.
MEGASEQ_INLINE void keep(const float* probabilities, std::int64_t count, float scale, float* target) {
  for (std::int64_t j = 0; j < count; ++j) {
    const auto bits = std::bit_cast<std::uint32_t>(probabilities[j]);
    const std::uint32_t kept = (bits >> 31) - 1u;  // All bits where the sign is not set.
    target[j] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(probabilities[j] * scale) & kept);
  }
}

constexpr std::int64_t round_up(std::int64_t length) { return (length + kBlock - 1) / kBlock * kBlock; }

// One head of one segment.
struct Head {
  std::int64_t num_queries, num_keys, width;
  bool causal;
  float scale;
  const WeightDropout* dropout;
  std::int64_t first_weight;  // Number of the weight of the first query and key in dropout's stream.
  const float* bias;          // Null, or that of distances 1 - num_queries to num_keys - 1.
  std::int64_t padded() const { return round_up(num_keys); }
  std::int64_t area() const { return num_queries * padded(); }
};

MEGASEQ_CLONES
void forward_head(const Head& head, ConstMatrix query, ConstMatrix key, ConstMatrix value, Matrix output,
                  float* probabilities, float* scratch, std::uint8_t* mask) {
  const std::int64_t padded = head.padded();
  transpose(key, head.num_keys, head.width, padded, scratch);
  product(query, {scratch, padded}, {probabilities, padded}, head.num_queries, padded, head.width, false);
  for (std::int64_t i = 0; i < head.num_queries; ++i) {
    float* row = probabilities + i * padded;
    const std::int64_t seen = head.causal ? std::min(i + 1, head.num_keys) : head.num_keys;
    float scale = head.scale;
    if (head.bias != nullptr) {
      const float* bias = head.bias + head.num_queries - 1 - i;
      for (std::int64_t j = 0; j < seen; ++j) row[j] = row[j] * scale + bias[j];
      scale = 1.0f;
    }
    softmax_row(row, seen, padded, scale);
    if (head.dropout != nullptr) {
      const auto first = static_cast<std::uint64_t>(head.first_weight + i * head.dropout->key_length);
      dropout_mask(mask, static_cast<std::size_t>(seen), {head.dropout->key, first, head.dropout->threshold});
      for (std::int64_t j = 0; j < seen; ++j) {
        const std::uint32_t turned = (mask[j] ^ 1u) << 31;
        row[j] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(row[j]) | turned);
      }
    }
  }
  const float* weights = probabilities;
  if (head.dropout != nullptr) {
    keep(probabilities, head.area(), head.dropout->scale, scratch);
    weights = scratch;
  }
  product({weights, padded}, value, output, head.num_queries, head.width, head.num_keys, false);
}

struct HeadGradients {
  Matrix query, key, value;
  float* bias;  // Null, or added to: one for each of the head's distances.
};

MEGASEQ_CLONES
void backward_head(const Head& head, ConstMatrix gradient, ConstMatrix query, ConstMatrix key, ConstMatrix value,
                   const float* probabilities, HeadGradients out, float* scratch, bool add) {
  const std::int64_t num_queries = head.num_queries, num_keys = head.num_keys, width = head.width;
  const std::int64_t padded = head.padded(), padded_queries = round_up(num_queries);
  float* turned = scratch;                                             // [width, padded], then [keys, queries].
  float* scores = turned + std::max(width, padded_queries) * padded;   // [queries, padded].
  const float* weights = probabilities;
  if (head.dropout != nullptr) {
    float* kept = scores + head.area();
    keep(probabilities, head.area(), head.dropout->scale, kept);
    weights = kept;
  }
  transpose(value, num_keys, width, padded, turned);
  product(gradient, {turned, padded}, {scores, padded}, num_queries, padded, width, false);
  for (std::int64_t i = 0; i < num_queries; ++i) {
    float* row = scores + i * padded;
    softmax_row_gradient(probabilities + i * padded, weights + i * padded, row, padded);
    if (out.bias != nullptr) {
      float* bias = out.bias + num_queries - 1 - i;
      for (std::int64_t j = 0; j < num_keys; ++j) bias[j] += row[j];
    }
    for (std::int64_t j = 0; j < padded; ++j) row[j] *= head.scale;
  }
  product({scores, padded}, key, out.query, num_queries, width, num_keys, false);
  transpose({scores, padded}, num_queries, num_keys, padded_queries, turned);
  product({turned, padded_queries}, query, out.key, num_keys, width, num_queries, add);
  transpose({weights, padded}, num_queries, num_keys, padded_queries, turned);
  product({turned, padded_queries}, gradient, out.value, num_keys, width, num_queries, add);
}

constexpr std::size_t kBatch = 8;

std::size_t num_batches(const AttentionCall& call) { return (call.num_segments + kBatch - 1) / kBatch; }

// Runs work(segment, number of its batch, scratch) for all segments on several threads, each with `scratch_size` floats
// of its own; the segments of a batch come one after the other.
template <typename Work>
void for_segments(const AttentionCall& call, std::size_t scratch_size, Work work) {
  std::atomic<std::size_t> next{0};
  const std::size_t batches = num_batches(call);
  const auto run = [&] {
    std::vector<float> scratch(scratch_size);
    for (std::size_t batch; (batch = next.fetch_add(1)) < batches;) {
      const std::size_t last = std::min((batch + 1) * kBatch, call.num_segments);
      for (std::size_t i = batch * kBatch; i < last; ++i) work(call.segments[i], batch, scratch.data());
    }
  };
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

// The place in the table of a bias where distance `number` + 1 - num_queries of a segment is found.
std::int64_t place_of(const DistanceBias& bias, const Segment& segment, std::int64_t number) {
  const std::int64_t distance = segment.key_start - segment.query_start + number + 1 - segment.num_queries;
  return std::clamp(distance - bias.first, std::int64_t{0}, bias.count - 1);
}

// The head's part of the table of a bias, spread out over the segment's distances.
const float* spread(const AttentionCall& call, const Segment& segment, std::int64_t number, float* bias) {
  if (call.bias == nullptr) return nullptr;
  const float* table = call.bias->table + number * call.bias->count;
  for (std::int64_t i = 0; i < segment.num_queries + segment.num_keys - 1; ++i) {
    bias[i] = table[place_of(*call.bias, segment, i)];
  }
  return bias;
}

Head head_of(const AttentionCall& call, const Segment& segment, std::int64_t number, const float* bias) {
  Head head{segment.num_queries, segment.num_keys, static_cast<std::int64_t>(call.width), call.causal, call.scale,
            call.dropout, 0, bias};
  if (const WeightDropout* dropout = call.dropout) {
    const std::int64_t row = segment.query_start / dropout->query_length;
    const std::int64_t query = number * dropout->query_length + segment.query_start % dropout->query_length;
    head.first_weight =
        dropout->starts[row] + query * dropout->key_length + segment.key_start % dropout->key_length;
  }
  return head;
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
  // Keys turned around or weights; the bias of all distances; a mask of bytes.
  const std::int64_t own = std::max(width, call.dropout != nullptr ? length : 0) * length + 3 * length;
  const std::size_t scratch_size = static_cast<std::size_t>(own) + copies<T>(4, length, width);
  for_segments(call, scratch_size, [&](const Segment& segment, std::size_t, float* memory) {
    const std::int64_t first = segment.query_start, queries = segment.num_queries;
    const std::int64_t first_key = segment.key_start, keys = segment.num_keys;
    float* bias = memory + own - 3 * length;
    auto* mask = reinterpret_cast<std::uint8_t*>(memory + own - length);
    for (std::int64_t number = 0; number < num_heads; ++number) {
      const Head head = head_of(call, segment, number, spread(call, segment, number, bias));
      Scratch scratch{memory + own};
      const Matrix out = place(output, first, number, queries, width, scratch);
      forward_head(head, read(query, first, number, queries, width, scratch),
                   read(key, first_key, number / group, keys, width, scratch),
                   read(value, first_key, number / group, keys, width, scratch), out,
                   probabilities + segment.probabilities * num_heads + number * head.area(), memory, mask);
      finish(output, first, number, queries, width, out);
    }
  });
}

template <typename T>
void attention_backward(const AttentionCall& call, HeadsOf<const T> gradient, HeadsOf<const T> query,
                        HeadsOf<const T> key, HeadsOf<const T> value, const float* probabilities,
                        HeadsOf<T> query_gradient, HeadsOf<T> key_gradient, HeadsOf<T> value_gradient,
                        float* bias_gradient) {
  const auto width = static_cast<std::int64_t>(call.width);
  const auto num_heads = static_cast<std::int64_t>(query.num_heads);
  const auto group = num_heads / static_cast<std::int64_t>(key.num_heads);
  const std::int64_t length = longest(call);
  const std::int64_t own = (std::max(width, length) + (call.dropout != nullptr ? 2 : 1) * length) * length + 2 * length;
  // Each batch of segments has a table of its own; their sum does not depend on which thread took which batch.
  const std::int64_t table_size = call.bias != nullptr ? num_heads * call.bias->count : 0;
  std::vector<float> tables(num_batches(call) * static_cast<std::size_t>(table_size));
  const std::size_t scratch_size = static_cast<std::size_t>(own) + copies<T>(7, length, width);
  for_segments(call, scratch_size, [&](const Segment& segment, std::size_t batch, float* memory) {
    const std::int64_t first = segment.query_start, queries = segment.num_queries;
    const std::int64_t first_key = segment.key_start, keys = segment.num_keys;
    float* distances = call.bias != nullptr ? memory + own - 2 * length : nullptr;
    for (std::int64_t shared = 0; shared < num_heads / group; ++shared) {
      // What the query heads of a group add to is rounded once, at the end.
      Scratch scratch{memory + own};
      const ConstMatrix k = read(key, first_key, shared, keys, width, scratch);
      const ConstMatrix v = read(value, first_key, shared, keys, width, scratch);
      const Matrix dk = place(key_gradient, first_key, shared, keys, width, scratch);
      const Matrix dv = place(value_gradient, first_key, shared, keys, width, scratch);
      for (std::int64_t number = shared * group; number < (shared + 1) * group; ++number) {
        Scratch of_head = scratch;
        // The scores are not computed again, so there is no bias to add to them.
        const Head head = head_of(call, segment, number, nullptr);
        const Matrix dq = place(query_gradient, first, number, queries, width, of_head);
        if (distances != nullptr) std::fill_n(distances, queries + keys - 1, 0.0f);
        backward_head(head, read(gradient, first, number, queries, width, of_head),
                      read(query, first, number, queries, width, of_head), k, v,
                      probabilities + segment.probabilities * num_heads + number * head.area(),
                      {dq, dk, dv, distances}, memory, number % group != 0);
        finish(query_gradient, first, number, queries, width, dq);
        if (distances != nullptr) {
          float* table = tables.data() + static_cast<std::int64_t>(batch) * table_size +
                         number * call.bias->count;
          for (std::int64_t i = 0; i < queries + keys - 1; ++i) table[place_of(*call.bias, segment, i)] += distances[i];
        }
      }
      finish(key_gradient, first_key, shared, keys, width, dk);
      finish(value_gradient, first_key, shared, keys, width, dv);
    }
  });
  std::fill_n(bias_gradient, table_size, 0.0f);
  for (std::size_t batch = 0; table_size != 0 && batch < num_batches(call); ++batch) {
    const float* table = tables.data() + batch * static_cast<std::size_t>(table_size);
    for (std::int64_t i = 0; i < table_size; ++i) bias_gradient[i] += table[i];
  }
}

#define MEGASEQ_ATTENTION(T)                                                                                         \
  template void attention_forward<T>(const AttentionCall&, HeadsOf<const T>, HeadsOf<const T>, HeadsOf<const T>,      \
                                     HeadsOf<T>, float*);                                                            \
  template void attention_backward<T>(const AttentionCall&, HeadsOf<const T>, HeadsOf<const T>, HeadsOf<const T>,     \
                                      HeadsOf<const T>, const float*, HeadsOf<T>, HeadsOf<T>, HeadsOf<T>, float*);
MEGASEQ_ATTENTION(float)
MEGASEQ_ATTENTION(std::uint16_t)
#undef MEGASEQ_ATTENTION

}  // namespace megaseq
