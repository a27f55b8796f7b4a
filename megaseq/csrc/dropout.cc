#include "dropout.h"

#include <algorithm>
#include <bit>

#include "clones.h"

namespace megaseq {
namespace {

// All indices of a block have the same high word, so only 32-bit arithmetic is left in the loops.
struct Block {
  std::uint32_t low;       // lo * 0x9E3779B1 + key_lo of the block's first element.
  std::uint32_t high;      // w.
  std::uint32_t threshold;
};

constexpr std::uint32_t kStride = 0x9E3779B1;

inline std::uint32_t hash(const Block& block, std::uint32_t element) {
  std::uint32_t h = block.low + element * kStride;
  h = (h ^ (h >> 16) ^ block.high) * 0x7FEB352Du;
  return (h ^ (h >> 15)) * 0x846CA68Bu;
}

std::uint32_t mix_high(std::uint32_t key_high, std::uint32_t high) {
  std::uint32_t w = key_high + high * 0x27D4EB2Fu;
  w = (w ^ (w >> 16)) * 0x85EBCA6Bu;
  w = (w ^ (w >> 13)) * 0xC2B2AE35u;
  return w ^ (w >> 16);
}

// Calls work(block, first element, count) for each part of the stream with one high word.
template <typename Work>
void for_blocks(std::size_t count, const DropoutStream& stream, Work work) {
  const auto key_low = static_cast<std::uint32_t>(stream.key);
  const auto key_high = static_cast<std::uint32_t>(stream.key >> 32);
  std::size_t first = 0;
  while (first < count) {
    const std::uint64_t index = stream.offset + first;
    const auto low = static_cast<std::uint32_t>(index);
    const auto high = static_cast<std::uint32_t>(index >> 32);
    const std::uint64_t until_wrap = (std::uint64_t{1} << 32) - low;
    const auto size = static_cast<std::size_t>(std::min<std::uint64_t>(count - first, until_wrap));
    work(Block{low * kStride + key_low, mix_high(key_high, high), stream.threshold}, first, size);
    first += size;
  }
}

MEGASEQ_CLONES
void mask_block(std::uint8_t* mask, std::size_t count, Block block) {
  for (std::size_t j = 0; j < count; ++j) mask[j] = hash(block, static_cast<std::uint32_t>(j)) >= block.threshold;
}

MEGASEQ_CLONES
void apply_block(const float* input, float* output, std::size_t count, Block block, float scale) {
  for (std::size_t j = 0; j < count; ++j) {
    // All bits or none, by arithmetic: GCC does not vectorise a choice between floats for AVX2.
    const std::uint32_t keep = 0u - static_cast<std::uint32_t>(hash(block, static_cast<std::uint32_t>(j)) >=
                                                               block.threshold);
    output[j] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(input[j] * scale) & keep);
  }
}

MEGASEQ_CLONES
void apply_block_bfloat16(const std::uint16_t* input, std::uint16_t* output, std::size_t count, Block block,
                          float scale) {
  for (std::size_t j = 0; j < count; ++j) {
    const bool keep = hash(block, static_cast<std::uint32_t>(j)) >= block.threshold;
    const float scaled = std::bit_cast<float>(static_cast<std::uint32_t>(input[j]) << 16) * scale;
    const auto bits = std::bit_cast<std::uint32_t>(scaled);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    // Rounding would carry a NaN's bits into the sign or make it an infinity; its quiet bit alone keeps it one.
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    const std::uint32_t value = (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
    output[j] = static_cast<std::uint16_t>(keep ? value : 0u);
  }
}

}  // namespace

void dropout_mask(std::uint8_t* mask, std::size_t count, DropoutStream stream) {
  for_blocks(count, stream, [=](const Block& block, std::size_t first, std::size_t size) {
    mask_block(mask + first, size, block);
  });
}

void dropout_apply(const float* input, float* output, std::size_t count, DropoutStream stream, float scale) {
  for_blocks(count, stream, [=](const Block& block, std::size_t first, std::size_t size) {
    apply_block(input + first, output + first, size, block, scale);
  });
}

void dropout_apply_bfloat16(const std::uint16_t* input, std::uint16_t* output, std::size_t count,
                            DropoutStream stream, float scale) {
  for_blocks(count, stream, [=](const Block& block, std::size_t first, std::size_t size) {
    apply_block_bfloat16(input + first, output + first, size, block, scale);
  });
}

}  // namespace megaseq
