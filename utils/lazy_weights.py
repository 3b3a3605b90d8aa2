"""Weights whose values are not in memory yet: they are in a file, or still to be drawn at random.

`load_sharded` (sharded_loading.py) builds models of them. ZeRO-3 and FSDP take a slice of such a
weight as of any other tensor, and only then are its values read or drawn.
"""

import contextlib
import functools
import mmap

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
VIEWS = {  # operations whose result is a part of the tensor, or has another shape or order
    *(aten.detach.default, aten.alias.default, aten.lift_fresh.default),
    *(aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default),
    *(aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.t.default, aten.transpose.int, aten.permute.default),
    *(aten.as_strided.default, aten.expand.default, aten.diagonal.default, aten.unfold.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
}
SHARES = {  # operations whose result shares memory, although their schema does not say so
    *(aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default),
}
CREATES = {  # operations that read only shape, dtype and device
    *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default),
    *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default),
}
MAKES = {  # operations that make a tensor -> the number in every element
    aten.empty.memory_format: None,
    aten.zeros.default: 0,
    aten.ones.default: 1,
}
REPLACES = {  # operations that write every element of a tensor and read none
    *(aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.copy_.default),
    *(aten.fill_.Scalar, aten.fill_.Tensor),
}


# The most steps of a recipe of up to a MB, and of a larger one. If there are more, the values are
# kept in memory. Otherwise code that writes and reads in a loop could take hours.
MOST_STEPS = (20, 1000)


class LazyTensor(torch.Tensor):
    """A weight that holds no memory of its own. Its values are read or made when they are needed.

    A part or a view of it is one, too. Every other operation takes the values and casts them, and
    its result is an ordinary tensor. `.data = value` turns the weight into an ordinary tensor.

    A subclass has three methods. `values` returns the values before they are cast, as an ordinary
    tensor. `like(stored, dtype)` returns a weight of a view of `stored`, or a copy in a dtype.
    `write(func, args, kwargs)` applies an operation that writes to the weight in place.

    Args:
        stored: a tensor with the shape and strides of the weight, and with the dtype that the
            values have before they are cast.
        dtype: the dtype of the weight.
    """

    @staticmethod
    def __new__(cls, stored, dtype, *source):
        like = {"strides": stored.stride(), "device": "cpu", "dtype": dtype}
        with torch.inference_mode(False):  # else a view of the weight fails in this mode
            return torch.Tensor._make_wrapper_subclass(cls, stored.shape, **like)

    def read(self):
        """Return the values as an ordinary tensor, which may share the memory of `stored`."""
        return self.values().to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, first = kwargs or {}, args[0] if args else None
        # under inference_mode `to`, `chunk` and others come here whole
        if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
            return result
        if isinstance(first, LazyTensor):
            if func in VIEWS:
                views = func(first.stored, *args[1:], **kwargs)
                return tree_map_only(torch.Tensor, first.like, views)
            if func in CREATES:
                like = {"dtype": first.dtype, "device": first.device}
                return func(first.stored, *args[1:], **like | kwargs)
            if func is aten._to_copy.default and first.stored.dtype == first.dtype:
                device = torch.device(kwargs.get("device") or "cpu")
                dtype = kwargs.get("dtype") or first.dtype
                if device.type == "cpu":
                    return first.like(first.stored, dtype)
                return first.values().to(device, dtype)
            if isinstance(first, DrawnTensor) and (func.is_view or func in SHARES):
                first.refuse(func)  # a write to the result would be lost
        places = tree_leaves(written(func, args, kwargs))
        if lazy := [one for one in places if isinstance(one, LazyTensor)]:
            if len(places) > 1 or lazy[0] is not first or "out" in kwargs:
                lazy[0].refuse(func)
            first.write(func, args[1:], kwargs)
            return first
        if func is aten.cat.default and len(args) == 1 and not kwargs:
            return join(first)  # FSDP1 flattens a unit so
        if func is aten.copy_.default and args[1].dtype in (first.dtype, args[1].stored.dtype):
            return first.copy_(args[1].values())  # casts without a temporary tensor
        return func(*read_all(args), **read_all(kwargs))

    # libraries replace the values of a parameter by `.data =`, which must keep its identity
    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad))

    def __deepcopy__(self, memo):
        copy = torch.nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __repr__(self):
        dtypes = f"{self.stored.dtype} -> {self.dtype}"
        return f"{type(self).__name__}({tuple(self.shape)}, {dtypes})"


def read_all(tree):
    """Return nested arguments with ordinary tensors in place of lazy ones."""
    return tree_map_only(LazyTensor, LazyTensor.read, tree)


def written(func, args, kwargs):
    """Return the arguments that an operation writes to; a collective may write to all."""
    if func.namespace == "c10d":
        return args, kwargs
    names = enumerate(func._schema.arguments)
    pairs = [
        (place, one.name) for place, one in names if one.alias_info and one.alias_info.is_write
    ]
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in pairs]


def join(parts):
    """Return `torch.cat(parts)`, without a cast copy of each part."""
    size = (sum(map(len, parts)), *parts[0].shape[1:])
    dtypes = [part.dtype for part in parts]
    joined = torch.empty(size, dtype=functools.reduce(torch.promote_types, dtypes))
    for place, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        place.copy_(part)
    return joined


# In a file ----------------------------------------------------------------------------------------
class FileTensor(LazyTensor):
    """A weight in a file, as a tensor of another dtype. Writing in place raises RuntimeError.

    Args:
        stored: the tensor that the file holds, mapped into memory.
        dtype: the dtype of the weight.
    """

    def __init__(self, stored, dtype):
        self.stored = stored

    def values(self):
        return self.stored

    def like(self, stored, dtype=None):
        return FileTensor(stored, dtype or self.dtype)

    def write(self, func, args, kwargs):
        self.refuse(func)

    def refuse(self, func):
        raise RuntimeError(
            f"{func} writes to a weight that is still in its file: assign `weight.data = values` "
            "instead, or load the model with from_pretrained"
        )

    def data_ptr(self):
        # accelerate tells the parameters of FSDP2 apart by it; no address, for none has this dtype
        return -self.stored.data_ptr()

    # FSDP2 swaps parameters of such classes when it moves them to a GPU
    def __tensor_flatten__(self):
        return ["stored"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, tensors, dtype, size, stride):
        return cls(tensors["stored"], dtype)


# To be drawn --------------------------------------------------------------------------------------
class DrawnTensor(LazyTensor):
    """A new weight. A recipe makes its values each time that they are needed. They are then freed.

    Args:
        stored: the recipe's empty tensor, or a view of it.
        dtype: the dtype of the weight.
        recipe: what makes the values, shared by all views of the weight.
    """

    def __init__(self, stored, dtype, recipe):
        self.stored, self.recipe = stored, recipe

    def values(self):
        return self.recipe.make().as_strided(*geometry(self.stored))

    def like(self, stored, dtype=None):
        if dtype is None:
            return DrawnTensor(stored, self.dtype, self.recipe)
        now = Recipe(self.recipe.empty, self.recipe.steps)  # a copy keeps the values of now
        return DrawnTensor(stored, dtype, now)

    def write(self, func, args, kwargs):
        if self.dtype != self.stored.dtype or torch.Tag.inplace_view in func.tags:
            self.refuse(func)
        # clones, because a tensor that is copied from may change before the values are made
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, read_all((args, kwargs)))
        self.recipe.add(self.stored, func, args, kwargs)

    def refuse(self, func):
        raise RuntimeError(
            f"{func} needs the memory of a weight that is not drawn yet: assign "
            "`weight.data = values` instead"
        )

    def data_ptr(self):
        return -id(self.recipe)  # see FileTensor

    def __tensor_flatten__(self):
        return ["stored"], (self.dtype, self.recipe)

    @classmethod
    def __tensor_unflatten__(cls, tensors, source, size, stride):
        return cls(tensors["stored"], *source)


class Recipe:
    """The operations that write to a new weight, in their order.

    A random operation is kept with the state of torch's generator before it. It also draws at once,
    into memory that is then freed, so that the next one finds the generator as without a recipe.

    Args:
        empty: a tensor on the meta device with the shape, strides and dtype of the weight.
        steps: the operations: (geometry of what it writes to, function, arguments, random state).
    """

    def __init__(self, empty, steps=()):
        self.empty, self.steps = empty, list(steps)

    def add(self, view, func, args, kwargs, draws_all=False):
        """Add an operation that writes to a view of the weight.

        Args:
            view: has the shape, strides and offset of what is written to.
            func: an operation of torch, or a Python function.
            draws_all: func is a Python function that draws every element.
        """
        state = None
        if draws_all or torch.Tag.nondeterministic_seeded in func.tags:
            if kwargs.get("generator") is not None:
                raise NotImplementedError(f"{func} draws from a generator of its own")
            state = torch.get_rng_state()
            shape, stride, _ = geometry(view)
            place = zeros(self.empty).as_strided(shape, stride)
            func(place, *args, **kwargs)
        replaces = draws_all or func in REPLACES
        if replaces and geometry(view) == geometry(self.empty):
            self.steps.clear()
        self.steps.append((geometry(view), func, (args, kwargs), state))
        if len(self.steps) > MOST_STEPS[self.empty.nbytes > 2**20]:
            self.steps = [(geometry(self.empty), aten.copy_.default, ((self.make(),), {}), None)]

    def make(self):
        """Return the values. The state of the generator stays as it is."""
        values = zeros(self.empty)
        now = torch.get_rng_state()
        for view, func, (args, kwargs), state in self.steps:
            if state is not None:
                torch.set_rng_state(state)
            func(values.as_strided(*view), *args, **kwargs)
        torch.set_rng_state(now)
        return values

    def num_bytes(self):
        """Return the bytes of the tensors that the operations copy from."""
        arguments = tree_leaves([step[2] for step in self.steps])
        return sum(one.nbytes for one in arguments if isinstance(one, torch.Tensor))


def zeros(empty):
    """Return zeros like a tensor without gaps, in memory that goes back to the system when freed.

    glibc may take blocks of up to 32 MB from its heap. There the small tensors that stay, such as
    random states, would use part of the memory of each freed weight. The next weight would not fit
    into the rest, and the heap would grow by every weight.
    """
    if not empty.numel():
        return torch.zeros(empty.shape, dtype=empty.dtype)
    memory = mmap.mmap(-1, empty.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=empty.dtype).view(empty.shape)


def geometry(tensor):
    """Return shape, strides and offset of a tensor, as `as_strided` takes them."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


class Drawing(TorchDispatchMode):
    """A context in which a new tensor on the CPU is a DrawnTensor, if MAKES names what makes it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        is_strided = kwargs.get("layout") in (None, torch.strided)
        if func not in MAKES or not on_cpu or not is_strided:
            return func(*args, **kwargs)
        empty = func(*args, **kwargs | {"device": "meta"})
        recipe = Recipe(empty)
        if MAKES[func] is not None:
            recipe.add(empty, aten.fill_.Scalar, (MAKES[func],), {})
        return DrawnTensor(empty, empty.dtype, recipe)


class Assigning(TorchFunctionMode):
    """A context in which `.data =` an ordinary tensor can take a lazy one, and makes it lazy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__ and isinstance(args[1], LazyTensor):
            return LazyTensor.data.__set__(*args)  # torch's own would leave it without memory
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def drawing():
    """A context in which the weights of a new model are DrawnTensors.

    trunc_normal_ draws into other tensors until every number is in range, and copies the result to
    the weight. A recipe would keep this copy in memory. So it takes the function as one operation.
    """
    truncate = init._no_grad_trunc_normal_

    def add(tensor, *args, **kwargs):
        if not isinstance(tensor, DrawnTensor):
            return truncate(tensor, *args, **kwargs)
        if tensor.dtype != tensor.stored.dtype:
            tensor.refuse("trunc_normal_")
        tensor.recipe.add(tensor.stored, truncate, args, kwargs, draws_all=True)
        return tensor

    init._no_grad_trunc_normal_ = add
    try:
        with Drawing(), Assigning():
            yield
    finally:
        init._no_grad_trunc_normal_ = truncate
