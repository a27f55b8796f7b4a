// The C++ alone, without Python: run it under sanitizers. Prints what fails and returns the number of failures.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "dropout.h"
#include "order.h"
#include "packing.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, std::size_t detail) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s (%zu)\n", what, detail);
}

void test_permute() {
  for (const std::size_t size : {1, 2, 3, 4, 5, 8, 9, 255, 256, 257, 4097}) {
    std::vector<std::int64_t> values(size);
    megaseq::permute(values.data(), size, 0xFEDCBA9876543210, size, 0);
    std::vector<std::int64_t> part(size / 2);
    megaseq::permute(part.data(), part.size(), 0xFEDCBA9876543210, size, size - part.size());
    expect(std::equal(part.begin(), part.end(), values.end() - static_cast<std::ptrdiff_t>(part.size())),
           "permute: part equals the whole's part", size);
    std::sort(values.begin(), values.end());
    std::vector<std::int64_t> identity(size);
    std::iota(identity.begin(), identity.end(), 0);
    expect(values == identity, "permute: bijection", size);
  }
}

void test_pack(std::size_t count, megaseq::RowRoom room, std::size_t lookahead) {
  std::vector<std::int32_t> source(count), target(count);
  std::uint32_t state = 1;
  const auto next = [&state](std::int32_t limit) {
    state = state * 1664525 + 1013904223;
    return static_cast<std::int32_t>((state >> 8) % static_cast<std::uint32_t>(limit + 1));
  };
  for (std::size_t i = 0; i < count; ++i) source[i] = next(room.source), target[i] = next(room.target);
  std::vector<std::int64_t> offsets(count + 1), examples(count);
  const std::size_t rows =
      megaseq::pack({source.data(), target.data(), count}, room, lookahead, offsets.data(), examples.data());
  expect(rows <= count && offsets[rows] == static_cast<std::int64_t>(count), "pack: all examples placed", count);
  for (std::size_t row = 0; row < rows; ++row) {
    std::int64_t source_sum = 0, target_sum = 0;
    for (std::int64_t place = offsets[row]; place < offsets[row + 1]; ++place) {
      source_sum += source[static_cast<std::size_t>(examples[static_cast<std::size_t>(place)])];
      target_sum += target[static_cast<std::size_t>(examples[static_cast<std::size_t>(place)])];
    }
    expect(offsets[row] < offsets[row + 1], "pack: no empty row", row);
    expect(source_sum <= room.source && target_sum <= room.target, "pack: no row too full", row);
  }
  std::sort(examples.begin(), examples.end());
  for (std::size_t i = 0; i < count; ++i) {
    expect(examples[i] == static_cast<std::int64_t>(i), "pack: every example once", i);
  }
}

void test_dropout() {
  // Any part of the stream equals that part of the whole, also where the index's low word wraps.
  const megaseq::DropoutStream stream{0x0123456789ABCDEF, (std::uint64_t{1} << 32) - 100, 1u << 31};
  std::vector<std::uint8_t> whole(333);
  megaseq::dropout_mask(whole.data(), whole.size(), stream);
  for (std::size_t first = 0; first < whole.size(); first += 37) {
    std::vector<std::uint8_t> part(whole.size() - first);
    megaseq::dropout_mask(part.data(), part.size(), {stream.key, stream.offset + first, stream.threshold});
    expect(std::equal(part.begin(), part.end(), whole.begin() + static_cast<std::ptrdiff_t>(first)),
           "dropout: part equals the whole's part", first);
  }
  std::vector<float> ones(whole.size(), 1.0f);
  megaseq::dropout_apply(ones.data(), ones.data(), ones.size(), stream, 2.0f);
  std::vector<std::uint16_t> halves(whole.size(), 0x3F80);
  megaseq::dropout_apply_bfloat16(halves.data(), halves.data(), halves.size(), stream, 2.0f);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    expect(ones[i] == (whole[i] ? 2.0f : 0.0f), "dropout: float", i);
    expect(halves[i] == (whole[i] ? 0x4000 : 0), "dropout: bfloat16", i);
  }
}

}  // namespace

int main() {
  test_permute();
  test_pack(0, {5, 5}, 4);
  test_pack(1, {5, 5}, 64);
  test_pack(777, {50, 70}, 1);
  test_pack(777, {65536, 65536}, 64);
  test_pack(20011, {300, 200}, 64);
  test_pack(9000, {300, 200}, 1500);
  test_dropout();
  return failures;
}
