#include "decoding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "vector.h"

namespace megaseq {
namespace {

constexpr std::size_t kColumns = 64;  // Of which the largest is kept, to find the best of a row without sorting it.
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Runs work(first, last) on parts of [0, count).
template <typename Work>
void in_parts(std::size_t count, std::size_t num_threads, Work work) {
  num_threads = std::max<std::size_t>(1, std::min(num_threads, count));
  const auto bound = [=](std::size_t part) { return count * part / num_threads; };
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < num_threads; ++i) threads.emplace_back([&, i] { work(bound(i), bound(i + 1)); });
  work(bound(0), bound(1));
  for (auto& thread : threads) thread.join();
}

MEGASEQ_INLINE float dot(const float* a, const float* b, std::int64_t width) {
  Vector total = load(a) * load(b);
  for (std::int64_t i = kLanes; i < width; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

// output[vectors * kLanes] = sum of weights[j] * rows[j]; the sums stay in registers.
template <int vectors, typename Row>
MEGASEQ_INLINE void weighted_sum(const float* weights, Row row, std::int64_t count, float* output) {
  Vector sums[vectors] = {};
  for (std::int64_t j = 0; j < count; ++j) {
    const float* values = row(j);
    for (int k = 0; k < vectors; ++k) sums[k] += load(values + k * kLanes) * weights[j];
  }
  for (int k = 0; k < vectors; ++k) store(output + k * kLanes, sums[k]);
}

// Turns scores into weights that add up to one.
MEGASEQ_INLINE void softmax(float* scores, std::int64_t count) {
  float top = -kInfinity;
  for (std::int64_t j = 0; j < count; ++j) top = std::max(top, scores[j]);
  float total = 0.0f;
  for (std::int64_t j = 0; j < count; ++j) scores[j] = exponential(scores[j] - top);
  for (std::int64_t j = 0; j < count; ++j) total += scores[j];
  const float inverse = 1.0f / total;
  for (std::int64_t j = 0; j < count; ++j) scores[j] *= inverse;
}

MEGASEQ_CLONES
void attend_one(const PlacesCall& call, std::int64_t index, ConstHeads query, ConstHeads key, ConstHeads value,
                const float* bias, std::int64_t bias_stride, Heads output, float* scores) {
  const std::int64_t source = index / call.group;
  const std::int64_t count = call.counts == nullptr ? call.length : call.counts[source];
  const std::int64_t* places = call.places == nullptr ? nullptr : call.places + index * call.places_stride;
  const auto place = [=](std::int64_t j) { return places == nullptr ? source * call.length + j : places[j]; };
  const auto num_heads = static_cast<std::int64_t>(query.num_heads);
  const std::int64_t share = num_heads / static_cast<std::int64_t>(key.num_heads);
  const float* q = query.data + index * query.token_stride;
  float* out = output.data + index * output.token_stride;
  // The heads of one key are neighbours, so keys come first and heads second.
  for (std::int64_t j = 0; j < count; ++j) {
    const float* k = key.data + place(j) * key.token_stride;
    for (std::int64_t head = 0; head < num_heads; ++head) {
      const float score = dot(q + head * query.head_stride, k + head / share * key.head_stride, call.width);
      scores[head * call.length + j] = score * call.scale + (bias == nullptr ? 0.0f : bias[head * bias_stride + j]);
    }
  }
  for (std::int64_t head = 0; head < num_heads; ++head) {
    float* weights = scores + head * call.length;
    softmax(weights, count);
    const float* v = value.data + head / share * value.head_stride;
    float* to = out + head * output.head_stride;
    const auto row = [=](std::int64_t j) { return v + place(j) * value.token_stride; };
    std::int64_t first = 0;
    for (; first + 8 * kLanes <= call.width; first += 8 * kLanes) {
      weighted_sum<8>(weights, [=](std::int64_t j) { return row(j) + first; }, count, to + first);
    }
    for (; first < call.width; first += kLanes) {
      weighted_sum<1>(weights, [=](std::int64_t j) { return row(j) + first; }, count, to + first);
    }
  }
}

MEGASEQ_INLINE float largest(const float* values, std::size_t count) {
  float top = values[0];
  std::size_t j = 0;
  if (count >= kLanes) {
    Vector tops = load(values);
    for (j = kLanes; j + kLanes <= count; j += kLanes) tops = larger(tops, load(values + j));
    for (int lane = 0; lane < kLanes; ++lane) top = std::max(top, tops[lane]);
  }
  for (; j < count; ++j) top = std::max(top, values[j]);
  return top;
}

MEGASEQ_INLINE float sum_of_exponentials(const float* values, std::size_t count, float top) {
  Vector sums[2] = {};
  std::size_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    sums[0] += exponential(load(values + j) - top);
    sums[1] += exponential(load(values + j + kLanes) - top);
  }
  float total = sum(sums[0] + sums[1]);
  for (; j < count; ++j) total += exponential(values[j] - top);
  return total;
}

MEGASEQ_CLONES
void top_of_row(const float* row, std::size_t columns, std::size_t count, float* tops, float* values,
                std::int64_t* ids, float* shifts) {
  const std::size_t blocks = (columns + kColumns - 1) / kColumns;
  float top = -kInfinity;
  for (std::size_t i = 0; i < blocks; ++i) {
    tops[i] = largest(row + i * kColumns, std::min(kColumns, columns - i * kColumns));
    top = std::max(top, tops[i]);
  }
  const bool dead = top == -kInfinity;
  float total = 0.0f;
  for (std::size_t i = 0; i < blocks; ++i) {
    total += sum_of_exponentials(row + i * kColumns, std::min(kColumns, columns - i * kColumns), dead ? 0.0f : top);
  }
  const bool broken = std::isnan(total);
  const float shift = dead ? 0.0f : std::log(total);
  shifts[0] = broken ? total : dead ? 0.0f : top;
  shifts[1] = shift;
  std::size_t found = 0;
  if (dead || broken) {
    for (; found < count; ++found) {
      values[found] = broken ? total : -kInfinity;
      ids[found] = static_cast<std::int64_t>(found);
    }
    return;
  }
  if (count == 0) return;
  // Columns come in rising order and must be strictly better, so that the lower one stays first among equals. Rounding
  // keeps the order of logits but makes equal what is not, so values and not logits are compared.
  for (std::size_t i = 0; i < blocks; ++i) {
    if (found == count && (tops[i] - top) - shift <= values[count - 1]) continue;
    const std::size_t end = std::min(columns, (i + 1) * kColumns);
    for (std::size_t j = i * kColumns; j < end; ++j) {
      const float value = (row[j] - top) - shift;
      if (found == count && value <= values[count - 1]) continue;
      std::size_t place = found < count ? found++ : count - 1;
      for (; place > 0 && values[place - 1] < value; --place) {
        values[place] = values[place - 1];
        ids[place] = ids[place - 1];
      }
      values[place] = value;
      ids[place] = static_cast<std::int64_t>(j);
    }
  }
}

}  // namespace

void attend_places(const PlacesCall& call, ConstHeads query, ConstHeads key, ConstHeads value, const float* bias,
                   std::int64_t bias_stride, Heads output) {
  in_parts(static_cast<std::size_t>(call.num_queries), call.num_threads, [&](std::size_t first, std::size_t last) {
    std::vector<float> scores(query.num_heads * static_cast<std::size_t>(call.length));
    for (std::size_t i = first; i < last; ++i) {
      attend_one(call, static_cast<std::int64_t>(i), query, key, value, bias, bias_stride, output, scores.data());
    }
  });
}

void log_softmax_top(const TopCall& call, const float* logits, float* values, std::int64_t* columns, float* shifts) {
  in_parts(call.rows, call.num_threads, [&](std::size_t first, std::size_t last) {
    std::vector<float> tops((call.columns + kColumns - 1) / kColumns);
    for (std::size_t i = first; i < last; ++i) {
      top_of_row(logits + i * call.columns, call.columns, call.count, tops.data(), values + i * call.count,
                 columns + i * call.count, shifts + 2 * i);
    }
  });
}

}  // namespace megaseq
