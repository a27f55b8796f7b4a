"""Puts the arithmetic and the watch over memory into Triton's interpreter: of this process, once, for good.

Also: kernels run in debug mode, in which the interpreter itself finds int32 that overflow and `tl.device_assert`; a
masked load without `other=` gives NaN or a huge integer where the mask is false, as that is undefined on a GPU; and
`triton.language` is as it was after each launch, where the interpreter would leave it changed.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.interpreter import arithmetic
from tests.kernels.interpreter.memory import Memory

# Kept with the interpreter, as this module may be imported under two names.
_INSTALLED = "_megaseq_memory"
_ACQUIRING = ("ACQUIRE", "ACQUIRE_RELEASE")
_RELEASING = ("RELEASE", "ACQUIRE_RELEASE")


def install() -> Memory:
    """Changes the interpreter, if that has not been done; returns the watch over its memory."""
    if not hasattr(interpreter, _INSTALLED):
        memory = Memory()
        setattr(interpreter, _INSTALLED, memory)
        arithmetic.install()
        _install_launches(memory)
        _install_accesses(memory)
        _install_atomics(memory)
        _install_language()
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, debug=True)
    found: Memory = getattr(interpreter, _INSTALLED)
    return found


def undefined(shape: tuple[int, ...], *, kind: Any) -> interpreter.TensorHandle:
    """What a masked load gives that does not say: NaN, a huge integer, a pointer to nowhere."""
    array = interpreter._get_np_dtype(kind)
    if isinstance(kind, tl.pointer_type):
        return interpreter.TensorHandle(np.zeros(shape, array), kind)
    if kind in arithmetic.TORCH_TYPES:
        return interpreter.TensorHandle(arithmetic.as_array(torch.full(shape, float("nan")), kind=kind), kind)
    value = True if array == np.bool_ else np.iinfo(array).max // 3
    return interpreter.TensorHandle(np.full(shape, value, array), kind)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _install_launches(memory: Memory) -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    stock_call, stock_grid, stock_convert = executor.__call__, builder.set_grid_idx, interpreter._implicit_cvt
    names: dict[tuple[int, tuple[int, ...]], str] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}
        names.clear()
        for name, value in inspect.getcallargs(self.fn, *args, **known).items():
            tensor = getattr(value, "base", None) if not isinstance(value, torch.Tensor) else value
            if isinstance(tensor, torch.Tensor):
                names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        memory.begin(self.fn.__name__)
        with np.errstate(all="ignore"):
            return stock_call(self, *args, **kwargs)

    def grid_index(self: Any, x: int, y: int, z: int) -> None:
        stock_grid(self, x, y, z)
        memory.enter((x, y, z))

    def convert(argument: Any) -> Any:
        value = stock_convert(argument)
        tensor = getattr(argument, "base", None) if not isinstance(argument, torch.Tensor) else argument
        if isinstance(tensor, torch.Tensor) and hasattr(argument, "data_ptr"):
            low = tensor.data_ptr()
            name = names.get((low, tuple(tensor.shape)), "an argument")
            mark = memory.add(name, low=low, high=low + _extent(tensor), item_size=tensor.element_size())
            value.handle.data = value.handle.data + np.uint64(mark)
        return value

    executor.__call__ = call
    builder.set_grid_idx = grid_index
    interpreter._implicit_cvt = convert


def _install_accesses(memory: Memory) -> None:
    builder = interpreter.InterpreterBuilder
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_atomic_load = getattr(builder, "create_atomic_load", None)
    stock_atomic_store = getattr(builder, "create_atomic_store", None)
    stock_barrier = builder.create_barrier
    atomic = {"now": False}

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        mask = _mask(mask)
        addresses = memory.access(pointers, mask=mask.data, what="atomic" if atomic["now"] else "load")
        if other is None and not mask.data.all():
            other = undefined(addresses.shape, kind=pointers.get_element_ty())
        return stock_load(self, _plain(pointers, addresses), mask, other, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        mask = _mask(mask)
        addresses = memory.access(pointers, mask=mask.data, what="atomic" if atomic["now"] else "store")
        active = np.broadcast_to(mask.data, addresses.shape)
        memory.check_duplicates(addresses[active], values=np.broadcast_to(value.data, addresses.shape)[active])
        return stock_store(self, _plain(pointers, addresses), value, mask, *rest, **named)

    def marked_atomic(stock: Any) -> Any:
        def access(self: Any, *arguments: Any) -> Any:
            atomic["now"] = True
            try:
                return stock(self, *arguments)
            finally:
                atomic["now"] = False

        return access

    def barrier(self: Any) -> Any:
        memory.advance()
        return stock_barrier(self)

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_barrier = barrier
    for name, stock in (("create_atomic_load", stock_atomic_load), ("create_atomic_store", stock_atomic_store)):
        if stock is not None:
            setattr(builder, name, marked_atomic(stock))


def _install_atomics(memory: Memory) -> None:
    builder = interpreter.InterpreterBuilder
    stock_update, stock_swap = builder.create_atomic_rmw, builder.create_atomic_cas

    def update(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        addresses = memory.access(pointer, mask=mask.data, what="atomic")
        plain = _plain(pointer, addresses)
        if value.dtype.scalar == tl.bfloat16:
            result = _bf16_update(self, operation=operation, pointer=plain, value=value, mask=mask)
        else:
            result = stock_update(self, operation, plain, value, mask, sem, scope)
        _synchronise(memory, addresses, sem=sem)
        return result

    def swap(self: Any, pointer: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        addresses = memory.access(pointer, mask=np.ones(pointer.data.shape, bool), what="atomic")
        result = stock_swap(self, _plain(pointer, addresses), expected, value, sem, scope)
        _synchronise(memory, addresses, sem=sem)
        return result

    builder.create_atomic_rmw, builder.create_atomic_cas = update, swap


def _synchronise(memory: Memory, addresses: np.ndarray, *, sem: Any) -> None:
    # Blocks of atomics accumulate; a lock or a counter is a scalar.
    if addresses.size == 1 and sem.name != "RELAXED":
        memory.synchronise(int(addresses.item()), acquire=sem.name in _ACQUIRING, release=sem.name in _RELEASING)


def _bf16_update(self: Any, *, operation: Any, pointer: Any, value: Any, mask: Any) -> interpreter.TensorHandle:
    """Adds lane after lane, rounding each sum: the interpreter has no bf16 atomics."""
    if operation.name not in ("ADD", "FADD"):
        raise NotImplementedError(f"atomic {operation.name} of bf16")
    before = np.zeros(pointer.data.shape, np.uint16)
    active = np.broadcast_to(mask.data, pointer.data.shape)
    values = arithmetic.as_tensor(np.broadcast_to(value.data, pointer.data.shape), kind=tl.bfloat16)
    for index in map(tuple, np.argwhere(active)):
        address, yes = pointer.data[index].reshape(1), np.ones(1, bool)
        old = interpreter._interpreter.load(address, yes, np.zeros(1, np.uint16), np.dtype(np.uint16))
        new = arithmetic.as_tensor(old, kind=tl.bfloat16) + values[index]
        interpreter._interpreter.store(address, arithmetic.as_array(new, kind=tl.bfloat16), yes)
        before[index] = old[0]
    return interpreter.TensorHandle(before, tl.bfloat16)


def _mask(mask: Any) -> interpreter.TensorHandle:
    """In Triton 3.6 the mask of a descriptor is a plain array."""
    return interpreter.TensorHandle(mask, tl.int1) if isinstance(mask, np.ndarray) else mask


def _plain(pointers: Any, addresses: np.ndarray) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(addresses, pointers.dtype)


def _install_language() -> None:
    """`triton.language` is changed once for a launch, with what it calls, and changed back behind it."""
    stock_patch, stock_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    inside = types.SimpleNamespace(launch=False)

    class Scope:
        def __init__(self) -> None:
            self.changed = None if inside.launch else stock_patch(everything)
            inside.launch = True

        def restore(self) -> None:
            if self.changed is not None:
                self.changed.restore()
                inside.launch = False

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock_tensor(tensor, scope)
        # Triton 3.6 cannot count to a tensor with NumPy 2.4, which converts no array of one dimension to a number.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang = lambda fn: Scope()
    interpreter._patch_lang_tensor = patch_tensor
