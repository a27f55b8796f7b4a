"""Arithmetic of Triton's interpreter as a GPU does it: bf16, fp8 and tf32.

The interpreter keeps bf16 and fp8 numbers as the bits of unsigned integers, and computes with those integers in many
places: a product of bf16 matrices multiplies the bits. It also truncates where a GPU rounds to nearest even, and lets
fp8 overflow where a GPU saturates. Here each operation widens to float32, computes, and rounds once, as PTX says:
`cvt.rn.bf16.f32`, `cvt.rn.satfinite.e4m3x2.f32`. A product of float32 matrices with "tf32" loses the bits that
the tensor core ignores, so that a kernel which forgot input_precision="ieee" fails its float32 tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
AS_BITS = frozenset({tl.bfloat16, tl.float8e4nv, tl.float8e5})
"""Types that the interpreter keeps as the bits in unsigned integers."""
LARGEST_FP8 = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Handle = interpreter.TensorHandle


def as_tensor(data: np.ndarray, *, kind: Any) -> torch.Tensor:
    """The numbers that the interpreter's array stands for."""
    return torch.from_numpy(np.array(data, order="C", ndmin=1)).view(TORCH_TYPES[kind]).reshape(data.shape)


def as_array(numbers: torch.Tensor, *, kind: Any) -> np.ndarray:
    """The array in which the interpreter keeps these numbers."""
    flat = numbers.to(TORCH_TYPES[kind]).contiguous().reshape(-1)
    bits = flat.view(INTEGERS[flat.element_size()]).numpy()
    return bits.view(interpreter._get_np_dtype(kind)).reshape(tuple(numbers.shape))


def round_float(numbers: torch.Tensor, *, kind: Any) -> torch.Tensor:
    """Rounds to the nearest number of `kind`, ties to even; fp8 takes its largest number instead of overflowing."""
    if kind in LARGEST_FP8:
        largest = LARGEST_FP8[kind]
        numbers = torch.where(numbers.isnan(), numbers, numbers.clamp(-largest, largest))
    return numbers.to(TORCH_TYPES[kind])


def towards_zero(numbers: torch.Tensor, *, kind: Any) -> torch.Tensor:
    """Rounds to the next number of `kind` that is not larger in magnitude."""
    rounded = round_float(numbers, kind=kind)
    bits = rounded.view(INTEGERS[rounded.element_size()])
    larger = rounded.double().abs() > numbers.double().abs()
    return torch.where(larger, bits - 1, bits).view(rounded.dtype)


def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Takes the place of the interpreter's conversion between floating-point types."""
    if source not in TORCH_TYPES or target not in TORCH_TYPES:
        return _stock_convert(data, source, target, rounding)
    numbers = as_tensor(data, kind=source)
    cut = rounding is not None and rounding == interpreter._ir.ROUNDING_MODE.RTZ
    return as_array((towards_zero if cut else round_float)(numbers, kind=target), kind=target)


_stock_convert = interpreter._convert_float


def widen(handle: Handle) -> Handle:
    """float32 in place of bits; other handles as they are."""
    kind = handle.dtype.scalar
    if kind not in AS_BITS:
        return handle
    return Handle(as_tensor(handle.data, kind=kind).float().numpy(), tl.float32)


def narrow(handle: Handle, *, kind: Any) -> Handle:
    """Rounds a float32 result to `kind`. What is a truth value becomes one by its type too."""
    if handle.data.dtype == np.bool_:
        return Handle(handle.data, tl.int1)
    if kind not in AS_BITS:
        return handle
    return Handle(convert(handle.data.astype(np.float32), tl.float32, kind, None), kind)


def tensor_core_tf32(data: np.ndarray) -> np.ndarray:
    """The float32 numbers that a tensor core sees of these: it ignores the last 13 bits of the fraction."""
    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def dot(self: Any, a: Handle, b: Handle, accumulator: Handle, precision: Any, *_: Any) -> Handle:
    """`a` @ `b` + `accumulator`; summed in float32 at least."""
    left, right, total = widen(a).data, widen(b).data, accumulator.data
    if np.issubdtype(left.dtype, np.integer):
        # Exact: a product of int8 matrices stays far below 2^53.
        product = np.matmul(left.astype(np.float64), right.astype(np.float64)).astype(np.int64)
        return Handle((product + total).astype(total.dtype), accumulator.dtype.scalar)
    if left.dtype == np.float32 and a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
        left, right = tensor_core_tf32(left), tensor_core_tf32(right)
    wide = np.float64 if total.dtype == np.float64 else np.float32
    total = widen(accumulator).data.astype(wide)
    kind = accumulator.dtype.scalar
    result = np.matmul(left.astype(wide), right.astype(wide)) + total
    if kind in AS_BITS:
        return narrow(Handle(result, tl.float32), kind=kind)
    return Handle(result.astype(accumulator.data.dtype), kind)


def cast(self: Any, source: Handle, target: Any) -> Handle:
    """Any cast between standard types, with bf16 and fp8 among them."""
    source_kind, kind = source.dtype.scalar, target.scalar
    if source_kind in TORCH_TYPES and kind in TORCH_TYPES:
        return Handle(convert(source.data, source_kind, kind, None), kind)
    if kind in AS_BITS:
        return narrow(Handle(source.data.astype(np.float32), tl.float32), kind=kind)
    return Handle(widen(source).data.astype(interpreter._get_np_dtype(target)), kind)


def fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
    """x * y + z; double's room makes one rounding of it in all but a few ties."""
    kind = z.dtype.scalar
    if not kind.is_floating() or kind == tl.float64:
        return Handle(x.data * y.data + z.data, kind)
    x, y, z = widen(x), widen(y), widen(z)
    result = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return narrow(Handle(result.astype(z.data.dtype), z.dtype.scalar), kind=kind)


def widened(stock: Callable[..., Handle]) -> Callable[..., Handle]:
    """An elementwise operation of the interpreter that computes bf16 and fp8 in float32."""

    def operation(self: Any, *arguments: Any) -> Handle:
        *handles, function = arguments
        if function is np.where:  # Moves bits, computes nothing.
            return stock(self, *arguments)
        kind = handles[-1].dtype.scalar
        return narrow(stock(self, *map(widen, handles), function), kind=kind)

    return operation


def rounded_sum(data: np.ndarray, *, kind: Any, axis: int) -> np.ndarray:
    """Sums numbers of a type below 32 bits in that type: half with half, as the lanes of a warp do, rounding each."""
    total = np.moveaxis(data, axis, 0)
    while len(total) > 1:
        half = len(total) // 2
        halves = [as_tensor(part, kind=kind).float() for part in (total[:half], total[half : 2 * half])]
        total = np.concatenate([as_array(round_float(halves[0] + halves[1], kind=kind), kind=kind), total[2 * half :]])
    return total[0]


def _sum(stock: Callable[..., Any]) -> Callable[..., Any]:
    def total(self: Any, values: Any) -> Any:
        kind = values.dtype.scalar
        if kind not in AS_BITS and kind != tl.float16:
            return stock(self, values)
        data, axis = values.handle.data, self.axis
        result = rounded_sum(data.reshape(-1) if axis is None else data, kind=kind, axis=axis or 0)
        if self.keep_dims:
            result = result.reshape([1] * data.ndim) if axis is None else np.expand_dims(result, axis)
        return self.to_tensor(result, values.dtype)

    return total


def _extremum(stock: Callable[..., Any]) -> Callable[..., Any]:
    def extremum(self: Any, values: Any, *operations: Any, **named: Any) -> Any:
        values = values[0] if isinstance(values, tuple) else values
        kind = values.dtype.scalar
        if kind not in AS_BITS:
            return stock(self, values, *operations, **named)
        wide = tl.core.tensor(widen(values.handle), tl.block_type(tl.float32, list(values.shape)))
        found = stock(self, wide, *operations, **named)
        parts = found if isinstance(found, tuple) else (found,)
        back = tuple(_retyped(part, kind=kind) if part.dtype == tl.float32 else part for part in parts)
        return back if isinstance(found, tuple) else back[0]

    return extremum


def _retyped(values: Any, *, kind: Any) -> Any:
    """A tensor of float32 as one of `kind`, which can hold its values."""
    shape = list(getattr(values.type, "shape", ()))
    return tl.core.tensor(narrow(values.handle, kind=kind), tl.block_type(kind, shape) if shape else kind)


def _running_sum(stock: Callable[..., Any]) -> Callable[..., Any]:
    def running_sum(self: Any, values: Any) -> Any:
        kind = values.dtype.scalar
        if kind not in AS_BITS:
            return stock(self, values)
        steps = as_tensor(np.moveaxis(values.handle.data, self.axis, 0), kind=kind).float()
        for row in range(1, len(steps)):
            steps[row] = round_float(steps[row - 1] + steps[row], kind=kind).float()
        return [self.to_tensor(np.moveaxis(as_array(steps, kind=kind), 0, self.axis), values.dtype)]

    return running_sum


def all_ones(self: Any, kind: Any) -> Handle:
    """All bits set, for `~x`. Triton 3.6 asks NumPy for -1 as an unsigned integer, which NumPy refuses."""
    return Handle(np.invert(np.zeros(1, interpreter._get_np_dtype(kind))), kind.scalar)


def install() -> None:
    """Puts all of it into the interpreter."""
    reductions, scans = interpreter.ReduceOps, interpreter.ScanOps
    reductions.sum, reductions.min_max = _sum(reductions.sum), _extremum(reductions.min_max)
    scans.cumsum = _running_sum(scans.cumsum)
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = convert
    builder.cast_impl = cast
    builder.create_dot = dot
    builder.create_fma = fma
    builder.get_all_ones_value = all_ones
    # Triton 3.6 would give NaN where either is one; a GPU gives the other.
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, widened(getattr(builder, name)))
