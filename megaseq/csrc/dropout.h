// Dropout without a stored mask: element i of a stream is kept or dropped by a hash of (key, i).
//
// With key_lo, key_hi the low and high 32 bits of `key`, lo and hi those of the index i, and all arithmetic modulo 2^32:
//
//   w = key_hi + hi * 0x27D4EB2F
//   w = (w ^ (w >> 16)) * 0x85EBCA6B
//   w = (w ^ (w >> 13)) * 0xC2B2AE35
//   w = w ^ (w >> 16)                      one word for 2^32 elements
//
//   h = lo * 0x9E3779B1 + key_lo
//   h = (h ^ (h >> 16) ^ w) * 0x7FEB352D
//   h = (h ^ (h >> 15)) * 0x846CA68B
//   element i is kept if h >= threshold, so it is dropped with probability threshold / 2^32.
//
// Two rounds after w, because with one the masks of two keys that differ in their high word are visibly correlated. There
// is no shift after the last product, as what is compared are its high bits: a step less for each element, of which a
// GPU takes as long for a weight of attention as for all else that is done with it. The rounds of w are those of
// MurmurHash3's finaliser (Austin Appleby, public domain), the multipliers of h those of lowbias32 (Chris Wellons, public
// domain). Element j of a call has index offset + j, so any part of a tensor can be computed on its own, and in any order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megaseq {

struct DropoutStream {
  std::uint64_t key;
  std::uint64_t offset;
  std::uint32_t threshold;
};

// mask[j] = 1 if element offset + j is kept, else 0.
void dropout_mask(std::uint8_t* mask, std::size_t count, DropoutStream stream);

// output[j] = input[j] * scale if element offset + j is kept, else 0. `output` may be `input`.
void dropout_apply(const float* input, float* output, std::size_t count, DropoutStream stream, float scale);

// The same on bfloat16, given by its bits; the product is rounded to nearest, ties to even.
void dropout_apply_bfloat16(const std::uint16_t* input, std::uint16_t* output, std::size_t count,
                            DropoutStream stream, float scale);

}  // namespace megaseq
