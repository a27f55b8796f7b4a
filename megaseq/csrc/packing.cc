#include "packing.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <numeric>
#include <vector>

#include "clones.h"

namespace megaseq {
namespace {

constexpr std::size_t kLane = 4096;
constexpr std::int32_t kEmpty = 65536 + 1;  // The length of an empty place in the pool: fits no row.
constexpr std::int32_t kWeight = 4096;
constexpr std::int32_t kNoFit = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// Where finished rows are appended.
struct Output {
  std::int64_t* offsets;
  std::int64_t* examples;
  std::size_t rows = 0;
  std::size_t placed = 0;
};

// What a token left free costs on each side: rows of unequal length count alike.
struct Weights {
  std::int32_t source;
  std::int32_t target;
};

// Scores every candidate for a row with room `left`; lower is better. Returns the lowest score, kNoFit if none fits.
MEGASEQ_CLONES
std::int32_t score_all(const std::int32_t* source, const std::int32_t* target, std::int32_t* score, std::size_t size,
                       RowRoom left, Weights weights) {
  std::int32_t least = kNoFit;
  for (std::size_t slot = 0; slot < size; ++slot) {
    const std::int32_t source_left = left.source - source[slot];
    const std::int32_t target_left = left.target - target[slot];
    const std::int32_t source_cost = source_left * weights.source;
    const std::int32_t target_cost = target_left * weights.target;
    const std::int32_t difference = source_cost - target_cost;
    const std::int32_t value = 2 * (difference < 0 ? -difference : difference) + source_cost + target_cost;
    score[slot] = (source_left | target_left) < 0 ? kNoFit : value;
    least = std::min(least, score[slot]);
  }
  return least;
}

// The candidates for the next place, as arrays so that the compiler vectorises the scan over them.
class Pool {
 public:
  Pool(const Pairs& pairs, RowRoom room, std::size_t lookahead)
      : pairs_(pairs), room_(room), source_(lookahead), target_(lookahead), score_(lookahead), index_(lookahead) {
    const std::int32_t longest = std::max(room.source, room.target);
    weights_.source = std::max(1, static_cast<std::int32_t>(std::int64_t{room.target} * kWeight / longest));
    weights_.target = std::max(1, static_cast<std::int32_t>(std::int64_t{room.source} * kWeight / longest));
  }

  // Packs waiting[first, last). With `drain`, all of it; otherwise it stops at the first row boundary after the input
  // has run out and appends the candidates that are left to `leftover`, oldest first.
  void pack_lane(const std::vector<std::int64_t>& waiting, std::size_t first, std::size_t last, bool drain,
                 Output& output, std::vector<std::int64_t>& leftover) {
    next_ = first;
    last_ = last;
    for (std::size_t slot = 0; slot < source_.size(); ++slot) refill(waiting, slot);
    RowRoom left{-1, -1};
    while (true) {
      std::size_t slot = best(left);
      if (slot == source_.size()) {
        if (next_ >= last_ && !drain) break;
        slot = static_cast<std::size_t>(std::min_element(index_.begin(), index_.end()) - index_.begin());
        if (index_[slot] == kNever) break;
        output.offsets[output.rows++] = static_cast<std::int64_t>(output.placed);
        left = room_;
      }
      left.source -= source_[slot];
      left.target -= target_[slot];
      output.examples[output.placed++] = waiting[static_cast<std::size_t>(index_[slot])];
      refill(waiting, slot);
    }
    std::vector<std::int64_t> rest;
    std::copy_if(index_.begin(), index_.end(), std::back_inserter(rest), [](std::int64_t i) { return i != kNever; });
    std::sort(rest.begin(), rest.end());
    for (const std::int64_t index : rest) leftover.push_back(waiting[static_cast<std::size_t>(index)]);
  }

 private:
  void refill(const std::vector<std::int64_t>& waiting, std::size_t slot) {
    if (next_ < last_) {
      const auto example = static_cast<std::size_t>(waiting[next_]);
      source_[slot] = pairs_.source[example];
      target_[slot] = pairs_.target[example];
      index_[slot] = static_cast<std::int64_t>(next_++);
    } else {
      source_[slot] = target_[slot] = kEmpty;
      index_[slot] = kNever;
    }
  }

  // The first candidate that leaves the least room in even proportion, or the pool's size when none fits.
  std::size_t best(RowRoom left) {
    const std::size_t size = source_.size();
    const std::int32_t least = score_all(source_.data(), target_.data(), score_.data(), size, left, weights_);
    if (least == kNoFit) return size;
    std::size_t slot = 0;
    while (score_[slot] != least) ++slot;
    return slot;
  }

  const Pairs& pairs_;
  RowRoom room_;
  Weights weights_;
  std::vector<std::int32_t> source_;
  std::vector<std::int32_t> target_;
  std::vector<std::int32_t> score_;
  std::vector<std::int64_t> index_;  // Place in `waiting`; the smallest is the oldest.
  std::size_t next_ = 0;
  std::size_t last_ = 0;
};

}  // namespace

std::size_t pack(const Pairs& pairs, RowRoom room, std::size_t lookahead, std::int64_t* offsets,
                 std::int64_t* examples) {
  Output output{offsets, examples};
  Pool pool(pairs, room, lookahead);
  std::vector<std::int64_t> waiting(pairs.count);
  std::iota(waiting.begin(), waiting.end(), std::int64_t{0});
  while (!waiting.empty()) {
    const std::size_t enough = waiting.size() / std::max(kLane, 4 * lookahead);
    const bool drain = enough < 2;
    const std::size_t lanes = drain ? 1 : enough;
    std::vector<std::int64_t> leftover;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const std::size_t first = waiting.size() * lane / lanes;
      const std::size_t last = waiting.size() * (lane + 1) / lanes;
      pool.pack_lane(waiting, first, last, drain, output, leftover);
    }
    waiting.swap(leftover);
  }
  output.offsets[output.rows] = static_cast<std::int64_t>(output.placed);
  return output.rows;
}

}  // namespace megaseq
