// Python bindings. All arrays are contiguous, on the CPU and passed without a copy; every function releases the GIL.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "attention.h"
#include "decoding.h"
#include "dropout.h"
#include "order.h"
#include "packing.h"
#include "vector.h"

namespace nb = nanobind;

namespace {

// Equal to INTERFACE_VERSION in base/native.py.
constexpr int kInterfaceVersion = 8;

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

// A part of a larger tensor that is not one run of its elements: runs of equal length, each with the number of its first.
template <typename T, typename Apply>
void dropout_runs(const Array<const T>& input, const Array<T>& output, const Array<const std::int64_t>& offsets,
                  Apply apply) {
  const std::size_t runs = offsets.size();
  require(input.size() == output.size() && (runs == 0 ? input.size() == 0 : input.size() % runs == 0),
          "_csrc.dropout_apply_runs: must have runs of equal length and as many outputs as inputs, but has not.");
  nb::gil_scoped_release release;
  const std::size_t width = runs == 0 ? 0 : input.size() / runs;
  for (std::size_t run = 0; run < runs; ++run) {
    apply(input.data() + run * width, output.data() + run * width, width,
          static_cast<std::uint64_t>(offsets.data()[run]));
  }
}

void dropout_apply_runs(Array<const float> input, Array<float> output, std::uint64_t key,
                        Array<const std::int64_t> offsets, std::uint32_t threshold, float scale) {
  dropout_runs(input, output, offsets, [=](const float* from, float* to, std::size_t width, std::uint64_t offset) {
    megaseq::dropout_apply(from, to, width, {key, offset, threshold}, scale);
  });
}

void dropout_apply_runs_bfloat16(Array<const std::uint16_t> input, Array<std::uint16_t> output, std::uint64_t key,
                                 Array<const std::int64_t> offsets, std::uint32_t threshold, float scale) {
  dropout_runs(input, output, offsets,
               [=](const std::uint16_t* from, std::uint16_t* to, std::size_t width, std::uint64_t offset) {
                 megaseq::dropout_apply_bfloat16(from, to, width, {key, offset, threshold}, scale);
               });
}

// Tokens, heads, width of a head, with any strides but neighbouring elements in a head.
template <typename T>
using HeadsArray = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;

template <typename T>
megaseq::HeadsOf<T> heads(const HeadsArray<T>& array) {
  require(array.shape(2) <= 1 || array.stride(2) == 1,
          "_csrc.attention: must have neighbouring elements within a head, but has not. Make the tensor contiguous.");
  return {array.data(), array.shape(1), array.stride(0), array.stride(1)};
}

// Key, threshold, scale, first element of each row, and the lengths of the rows of queries and keys.
using DropoutArguments =
    std::tuple<std::uint64_t, std::uint32_t, float, Array<const std::int64_t>, std::int64_t, std::int64_t>;
// [heads, distances] and the first distance.
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BiasArguments = std::tuple<Table, std::int64_t>;

// An AttentionCall with all that it points to.
struct CallOwner {
  megaseq::AttentionCall call;
  megaseq::WeightDropout dropout;
  megaseq::DistanceBias bias;
  CallOwner(const CallOwner&) = delete;

  CallOwner(const Array<const std::int64_t>& segments, std::size_t width, bool causal, float scale,
            std::size_t num_threads, const std::optional<DropoutArguments>& dropped,
            const std::optional<BiasArguments>& by_distance, std::size_t num_heads) {
    require(width % megaseq::kAttentionBlock == 0, "_csrc.attention: must have heads of a width that 16 divides.");
    static_assert(sizeof(megaseq::Segment) == 5 * sizeof(std::int64_t));
    call = {reinterpret_cast<const megaseq::Segment*>(segments.data()), segments.size() / 5, width, causal, scale,
            num_threads, nullptr, nullptr};
    if (dropped) {
      const auto& [key, threshold, kept_scale, starts, query_length, key_length] = *dropped;
      for (std::size_t i = 0; i < call.num_segments; ++i) {
        require(call.segments[i].query_start / query_length < static_cast<std::int64_t>(starts.size()),
                "_csrc.attention: must have a start of dropout for each row, but has not.");
      }
      dropout = {key, threshold, kept_scale, starts.data(), query_length, key_length};
      call.dropout = &dropout;
    }
    if (by_distance) {
      const auto& [table, first] = *by_distance;
      require(table.shape(0) == num_heads && table.shape(1) > 0,
              "_csrc.attention: must have a bias for each head and some distance, but has not.");
      bias = {table.data(), first, static_cast<std::int64_t>(table.shape(1))};
      call.bias = &bias;
    }
  }
};

template <typename T>
void attention_forward(HeadsArray<const T> query, HeadsArray<const T> key, HeadsArray<const T> value,
                       HeadsArray<T> output, Array<float> probabilities, Array<const std::int64_t> segments,
                       bool causal, float scale, std::size_t num_threads, std::optional<DropoutArguments> dropped,
                       std::optional<BiasArguments> by_distance) {
  const CallOwner owner(segments, query.shape(2), causal, scale, num_threads, dropped, by_distance, query.shape(1));
  const auto q = heads(query), k = heads(key), v = heads(value);
  const auto out = heads(output);
  nb::gil_scoped_release release;
  megaseq::attention_forward<T>(owner.call, q, k, v, out, probabilities.data());
}

template <typename T>
void attention_backward(HeadsArray<const T> gradient, HeadsArray<const T> query, HeadsArray<const T> key,
                        HeadsArray<const T> value, Array<const float> probabilities, HeadsArray<T> query_gradient,
                        HeadsArray<T> key_gradient, HeadsArray<T> value_gradient,
                        Array<const std::int64_t> segments, float scale, std::size_t num_threads,
                        std::optional<DropoutArguments> dropped, std::optional<BiasArguments> by_distance,
                        Array<float> table_gradient) {
  const CallOwner owner(segments, query.shape(2), false, scale, num_threads, dropped, by_distance, query.shape(1));
  require(!by_distance || table_gradient.size() == std::get<0>(*by_distance).size(),
          "_csrc.attention: must have a gradient as large as the bias's table, but has not.");
  const auto g = heads(gradient), q = heads(query), k = heads(key), v = heads(value);
  const auto dq = heads(query_gradient), dk = heads(key_gradient), dv = heads(value_gradient);
  nb::gil_scoped_release release;
  megaseq::attention_backward<T>(owner.call, g, q, k, v, probabilities.data(), dq, dk, dv, table_gradient.data());
}

template <typename T>
void define_attention(nb::module_& module, const char* forward, const char* backward) {
  using namespace nb::literals;
  module.def(forward, &attention_forward<T>, "query"_a.noconvert(), "key"_a.noconvert(),
             "value"_a.noconvert(), "output"_a.noconvert(), "probabilities"_a.noconvert(), "segments"_a.noconvert(),
             "causal"_a, "scale"_a, "num_threads"_a, "dropout"_a.none(), "bias"_a.none());
  module.def(backward, &attention_backward<T>, "gradient"_a.noconvert(), "query"_a.noconvert(),
             "key"_a.noconvert(), "value"_a.noconvert(), "probabilities"_a.noconvert(),
             "query_gradient"_a.noconvert(), "key_gradient"_a.noconvert(), "value_gradient"_a.noconvert(),
             "segments"_a.noconvert(), "scale"_a, "num_threads"_a, "dropout"_a.none(), "bias"_a.none(),
             "bias_gradient"_a.noconvert());
}

// `places` [queries, any] says which tokens each query sees; empty, query i sees the i / group-th `length` of them.
void attend_places(HeadsArray<const float> query, HeadsArray<const float> key, HeadsArray<const float> value,
                   HeadsArray<float> output, nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> places,
                   Array<const std::int64_t> counts, nb::ndarray<const float, nb::ndim<2>, nb::device::cpu> bias,
                   std::size_t length, std::size_t group, float scale, std::size_t num_threads) {
  const std::size_t queries = query.shape(0), width = query.shape(2);
  require(width % megaseq::kLanes == 0 && group > 0 && queries % group == 0,
          "_csrc.attend_places: must have heads of a width that 8 divides and whole groups, but has not.");
  require(places.size() == 0 || (places.shape(0) == queries && places.shape(1) >= length),
          "_csrc.attend_places: must have `length` places for each query, but has not.");
  require(counts.size() == 0 || counts.size() == queries / group,
          "_csrc.attend_places: must have a count for each group, but has not.");
  require(bias.size() == 0 || (bias.shape(0) == query.shape(1) && bias.shape(1) >= length && bias.stride(1) == 1),
          "_csrc.attend_places: must have a bias for each head and place, but has not.");
  const megaseq::PlacesCall call{places.size() ? places.data() : nullptr, static_cast<std::int64_t>(places.shape(1)),
                                 counts.size() ? counts.data() : nullptr, static_cast<std::int64_t>(group),
                                 static_cast<std::int64_t>(length), static_cast<std::int64_t>(queries),
                                 static_cast<std::int64_t>(width), scale, num_threads};
  const auto q = heads(query), k = heads(key), v = heads(value);
  const auto out = heads(output);
  const float* biases = bias.size() ? bias.data() : nullptr;
  const std::int64_t stride = bias.stride(0);
  nb::gil_scoped_release release;
  megaseq::attend_places(call, q, k, v, biases, stride, out);
}

void log_softmax_top(nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> logits, Array<float> values,
                     Array<std::int64_t> columns, Array<float> shifts, std::size_t num_threads) {
  const std::size_t rows = logits.shape(0), size = logits.shape(1), count = rows ? values.size() / rows : 0;
  require(count <= size && values.size() == rows * count && columns.size() == rows * count && shifts.size() == 2 * rows,
          "_csrc.log_softmax_top: must have arrays of fitting sizes, but has not. Use log_softmax_topk.");
  nb::gil_scoped_release release;
  megaseq::log_softmax_top({rows, size, count, num_threads}, logits.data(), values.data(), columns.data(), shifts.data());
}

}  // namespace

NB_MODULE(_csrc, module) {
  using namespace nb::literals;
  module.doc() = "megaseq's C++: epoch order, packing, dropout, attention within segments, steps of decoding. Import it through megaseq.base.native only.";
  module.def("interface_version", [] { return kInterfaceVersion; });
  module.def("permute", &permute, "values"_a.noconvert(), "key"_a, "size"_a, "start"_a);
  module.def("pack", &pack, "source"_a.noconvert(), "target"_a.noconvert(), "source_row"_a, "target_row"_a,
             "lookahead"_a, "offsets"_a.noconvert(), "examples"_a.noconvert());
  module.def("dropout_mask", &dropout_mask, "mask"_a.noconvert(), "key"_a, "offset"_a, "threshold"_a);
  module.def("dropout_apply", &dropout_apply, "input"_a.noconvert(), "output"_a.noconvert(), "key"_a, "offset"_a,
             "threshold"_a, "scale"_a);
  module.def("dropout_apply_bfloat16", &dropout_apply_bfloat16, "input"_a.noconvert(), "output"_a.noconvert(),
             "key"_a, "offset"_a, "threshold"_a, "scale"_a);
  module.def("dropout_apply_runs", &dropout_apply_runs, "input"_a.noconvert(), "output"_a.noconvert(), "key"_a,
             "offsets"_a.noconvert(), "threshold"_a, "scale"_a);
  module.def("dropout_apply_runs_bfloat16", &dropout_apply_runs_bfloat16, "input"_a.noconvert(),
             "output"_a.noconvert(), "key"_a, "offsets"_a.noconvert(), "threshold"_a, "scale"_a);
  define_attention<float>(module, "attention_forward", "attention_backward");
  define_attention<std::uint16_t>(module, "attention_forward_bfloat16", "attention_backward_bfloat16");
  module.def("attend_places", &attend_places, "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(),
             "output"_a.noconvert(), "places"_a.noconvert(), "counts"_a.noconvert(), "bias"_a.noconvert(), "length"_a,
             "group"_a, "scale"_a, "num_threads"_a);
  module.def("log_softmax_top", &log_softmax_top, "logits"_a.noconvert(), "values"_a.noconvert(),
             "columns"_a.noconvert(), "shifts"_a.noconvert(), "num_threads"_a);
}
