// Python bindings. All arrays are contiguous, on the CPU and passed without a copy; every function releases the GIL.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>

#include "dropout.h"
#include "order.h"
#include "packing.h"

namespace nb = nanobind;

namespace {

// Equal to INTERFACE_VERSION in base/native.py.
constexpr int kInterfaceVersion = 2;

// Any shape, elements in order: NumPy arrays and, through DLPack, torch tensors.
template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

void permute(Array<std::int64_t> values, std::uint64_t key, std::uint64_t size, std::uint64_t start) {
  require(size > 0 && start <= size && values.size() <= size - start,
          "_csrc.permute: must end inside [0, size), but does not. Shorten values.");
  nb::gil_scoped_release release;
  megaseq::permute(values.data(), values.size(), key, size, start);
}

std::size_t pack(Array<const std::int32_t> source, Array<const std::int32_t> target, std::int32_t source_row,
                 std::int32_t target_row, std::size_t lookahead, Array<std::int64_t> offsets,
                 Array<std::int64_t> examples) {
  const std::size_t count = source.size();
  require(target.size() == count && examples.size() == count && offsets.size() == count + 1 && lookahead > 0,
          "_csrc.pack: must have arrays of fitting sizes and lookahead > 0, but has not. Use pack_rows.");
  nb::gil_scoped_release release;
  return megaseq::pack({source.data(), target.data(), count}, {source_row, target_row}, lookahead, offsets.data(),
                       examples.data());
}

void dropout_mask(Array<std::uint8_t> mask, std::uint64_t key, std::uint64_t offset, std::uint32_t threshold) {
  nb::gil_scoped_release release;
  megaseq::dropout_mask(mask.data(), mask.size(), {key, offset, threshold});
}

void dropout_apply(Array<const float> input, Array<float> output, std::uint64_t key, std::uint64_t offset,
                   std::uint32_t threshold, float scale) {
  require(input.size() == output.size(), "_csrc.dropout_apply: must have as many outputs as inputs, but has not.");
  nb::gil_scoped_release release;
  megaseq::dropout_apply(input.data(), output.data(), input.size(), {key, offset, threshold}, scale);
}

void dropout_apply_bfloat16(Array<const std::uint16_t> input, Array<std::uint16_t> output, std::uint64_t key,
                            std::uint64_t offset, std::uint32_t threshold, float scale) {
  require(input.size() == output.size(),
          "_csrc.dropout_apply_bfloat16: must have as many outputs as inputs, but has not.");
  nb::gil_scoped_release release;
  megaseq::dropout_apply_bfloat16(input.data(), output.data(), input.size(), {key, offset, threshold}, scale);
}

}  // namespace

NB_MODULE(_csrc, module) {
  using namespace nb::literals;
  module.doc() = "megaseq's C++: epoch order, packing, dropout. Import it through megaseq.base.native only.";
  module.def("interface_version", [] { return kInterfaceVersion; });
  module.def("permute", &permute, "values"_a.noconvert(), "key"_a, "size"_a, "start"_a);
  module.def("pack", &pack, "source"_a.noconvert(), "target"_a.noconvert(), "source_row"_a, "target_row"_a,
             "lookahead"_a, "offsets"_a.noconvert(), "examples"_a.noconvert());
  module.def("dropout_mask", &dropout_mask, "mask"_a.noconvert(), "key"_a, "offset"_a, "threshold"_a);
  module.def("dropout_apply", &dropout_apply, "input"_a.noconvert(), "output"_a.noconvert(), "key"_a, "offset"_a,
             "threshold"_a, "scale"_a);
  module.def("dropout_apply_bfloat16", &dropout_apply_bfloat16, "input"_a.noconvert(), "output"_a.noconvert(),
             "key"_a, "offset"_a, "threshold"_a, "scale"_a);
}
