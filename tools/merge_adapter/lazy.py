"""Tensors that read their file when an operation needs their values, in blocks of rows."""

import contextlib
import functools

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

BLOCK = 2**21  # elements of a weight that are in memory at a time: 8 MB in 32 bits


class Lazy(torch.Tensor):
    """A tensor that computes its values again whenever an operation needs them.

    While `Lazy.recording` is set, operations return further Lazy tensors and read nothing.
    Otherwise they read their operands and compute.

    Attributes:
        make: function of `rows`, a slice or None; returns those rows, or the full tensor.
        native: dtype in the file.
        adapted: whether the adapter changes this tensor.
    """

    recording = False

    @staticmethod
    def __new__(cls, shape, dtype, make, native, adapted):
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        tensor.make, tensor.native, tensor.adapted = make, native, adapted
        return tensor

    def __deepcopy__(self, memo):
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in IN_BLOCKS and not cls.recording:
            return IN_BLOCKS[func](*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.set_.source_Tensor and args[0].make is args[1].make:
            return args[0]  # PEFT's parametrization of experts sets each parameter to itself
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would be lost: it changes a tensor that lies in a file")
        lazies = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Lazy)]
        native, adapted = lazies[0].native, any(tensor.adapted for tensor in lazies)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Lazy(lazies[0].shape, lazies[0].dtype, lazies[0].make, native, adapted)
        if not cls.recording or func is torch.ops.aten.equal.default:
            return func(*values(args), **values(kwargs))
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, without_values, (args, kwargs))
        if "device" in meta_kwargs:
            meta_kwargs["device"] = "meta"
        outputs = func(*meta_args, **meta_kwargs)
        if isinstance(outputs, torch.Tensor):
            make = functools.partial(compute, func, args, kwargs, None)
            return Lazy(outputs.shape, outputs.dtype, make, native, adapted)
        makes = [functools.partial(compute, func, args, kwargs, i) for i in range(len(outputs))]
        return [Lazy(o.shape, o.dtype, make, native, adapted) for o, make in zip(outputs, makes)]


def values(tree, rows=None):
    """Return nested arguments with the values of their Lazy tensors, in full or some rows."""
    return tree_map_only(Lazy, lambda tensor: tensor.make(rows), tree)


def without_values(tensor):
    """Return a tensor of the same shape and dtype on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def recording():
    """Record the operations on Lazy tensors inside the `with` block instead of computing them."""
    Lazy.recording = True
    try:
        yield
    finally:
        Lazy.recording = False


def compute(func, args, kwargs, output, rows=None):
    """Return the result of an operation, in full or some of its rows.

    Casting, and fusing and splitting experts, as transformers does on loading, read only the rows
    that are asked for. Other operations read their operands in full.

    Args:
        output: index of the output of an operation that returns several; None for one output.
        rows: slice of the output's rows; None for all.
    """
    aten, first = torch.ops.aten, args[0]
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    dim = named.get("dim", 0) % (first.dim() if isinstance(first, Lazy) else first[0].dim())
    if func is aten.split.Tensor and dim == 0:
        start = output * args[1]
        stop = min(start + args[1], len(first))
        if rows is not None:
            start, stop = start + rows.start, start + rows.stop
        return take(first, slice(start, stop))
    if rows is not None and func is aten.stack.default and dim == 0:
        return torch.stack([take(tensor) for tensor in first[rows]])
    keeps_rows = func in (aten.cat.default, aten.split.Tensor) and dim > 0
    by_rows = func is aten._to_copy.default or keeps_rows
    result = func(*values(args, rows if by_rows else None), **values(kwargs))
    return take(result if output is None else result[output], None if by_rows else rows)


def take(tensor, rows=None):
    """Return some rows of a tensor, or all of it if `rows` is None."""
    if isinstance(tensor, Lazy):
        return tensor.make(rows)
    return tensor if rows is None else tensor[rows]


def blocks(tensor, rows=None):
    """Yield slices of at most BLOCK elements, but of at least one row, that cover the rows.

    Args:
        rows: slice of rows to cover; None for all.
    """
    if tensor.dim() == 0:
        yield None
        return
    start, stop = (0, len(tensor)) if rows is None else (rows.start, rows.stop)
    count = max(1, BLOCK * len(tensor) // max(1, tensor.numel()))
    for first in range(start, stop, count):
        yield slice(first, min(first + count, stop))


def equal(a, b):
    """Return whether two Lazy tensors have the same shape and values."""
    return a.shape == b.shape and all(torch.equal(a.make(rows), b.make(rows)) for rows in blocks(a))


# Operations that read a weight block by block -----------------------------------------------------
def linear(x, weight, bias=None):
    """Stand in for `F.linear`."""
    result = torch.cat([F.linear(x, take(weight, rows)) for rows in blocks(weight)], dim=-1)
    return result if bias is None else result + take(bias)


def addmm(bias, x, weight):
    """Stand in for `torch.addmm`, called as GPT-2's Conv1D calls it."""
    return take(bias) + sum(x[:, rows] @ take(weight, rows) for rows in blocks(weight))


def embedding(ids, weight, *options, **more):
    """Stand in for `F.embedding`; its options matter in training only."""
    unique, positions = ids.unique(return_inverse=True)
    return torch.cat([take(weight, slice(row, row + 1)) for row in unique.tolist()])[positions]


def getitem(tensor, index):
    """Stand in for `tensor[index]`; one expert is read alone."""
    is_one = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0)
    if is_one:
        return take(tensor, slice(int(index), int(index) + 1))[0]
    return take(tensor)[index]


IN_BLOCKS = {
    F.linear: linear,
    F.embedding: embedding,
    torch.addmm: addmm,
    torch.Tensor.__getitem__: getitem,
}
