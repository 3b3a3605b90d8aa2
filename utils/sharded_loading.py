"""Load a model for ZeRO-3 or FSDP: the weights stay in their files until they are sharded.

transformers maps the files of a checkpoint into memory, and the system reads a page when it is
used. That ends as soon as a weight is cast to another dtype, or gathered by ZeRO-3: every process
then holds a copy of the full model. `load_sharded` builds the model by transformers' own code, but
no weight is read or cast until the strategy takes the slice of the process.
"""

import contextlib
import functools
import math
import os

import torch
from accelerate.state import AcceleratorState
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, modeling_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.deepspeed import deepspeed_config, unset_hf_deepspeed_config
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from utils.errors import say

aten = torch.ops.aten
VIEWS = {  # operations whose result is a part of the tensor, or has another shape or order
    *(aten.detach.default, aten.alias.default, aten.view.default, aten._unsafe_view.default),
    *(aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.t.default, aten.transpose.int, aten.permute.default),
    *(aten.as_strided.default, aten.expand.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default),
}
CREATES = {  # operations that read only shape, dtype and device
    *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default),
    *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default),
}


# The weights --------------------------------------------------------------------------------------
class FileTensor(torch.Tensor):
    """A weight in a file, as a tensor of another dtype that holds no memory of its own.

    A part or a view of it is one, too. Every other operation reads the values and casts them, and
    its result is an ordinary tensor. Writing in place raises RuntimeError. `.data = value` turns
    the weight into an ordinary tensor.

    Args:
        stored: the tensor that the file holds, mapped into memory.
        dtype: the dtype that the weight has.
    """

    @staticmethod
    def __new__(cls, stored, dtype):
        like = {"strides": stored.stride(), "device": stored.device, "dtype": dtype}
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, **like)

    def __init__(self, stored, dtype):
        self.stored = stored

    def read(self):
        """Return the values as an ordinary tensor, which may share the memory of the file."""
        return self.stored.to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, cls):
            if func in VIEWS:
                views = func(first.stored, *args[1:], **kwargs)
                return tree_map_only(torch.Tensor, lambda view: cls(view, first.dtype), views)
            if func in CREATES:
                return func(first.stored, *args[1:], **{"dtype": first.dtype, **kwargs})
            if func is aten._to_copy.default and first.stored.dtype == first.dtype:
                return cast(first.stored, **kwargs)
        if any(isinstance(one, cls) for one in tree_leaves(written(func, args, kwargs))):
            raise RuntimeError(
                f"{func} writes to a weight that is still in its file: load the model with "
                "from_pretrained, or write after accelerator.prepare"
            )
        if func is aten.cat.default and len(args) == 1 and not kwargs:
            return join(first)  # FSDP1 flattens a unit so
        if func is aten.copy_.default and args[1].dtype in (first.dtype, args[1].stored.dtype):
            return first.copy_(args[1].stored)  # reads and casts without a temporary tensor
        return func(*tree_map_only(cls, cls.read, args), **tree_map_only(cls, cls.read, kwargs))

    # libraries replace the values of a parameter by `.data =`, which must keep its identity
    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad))

    def data_ptr(self):
        # accelerate tells the parameters of FSDP2 apart by it; no address, for none has this dtype
        return -self.stored.data_ptr()

    def __deepcopy__(self, memo):
        copy = torch.nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __repr__(self):
        return f"FileTensor({tuple(self.shape)}, {self.stored.dtype} -> {self.dtype})"

    # FSDP2 swaps parameters of such classes when it moves them to a GPU
    def __tensor_flatten__(self):
        return ["stored"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, tensors, dtype, size, stride):
        return cls(tensors["stored"], dtype)


def written(func, args, kwargs):
    """Return the arguments that an operation writes to; a collective may write to all."""
    if func.namespace == "c10d":
        return args, kwargs
    names = enumerate(func._schema.arguments)
    pairs = [
        (place, one.name) for place, one in names if one.alias_info and one.alias_info.is_write
    ]
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in pairs]


def cast(stored, dtype=None, device=None, **options):
    """Return a stored tensor in another dtype, still in its file, or on another device."""
    if torch.device(device or "cpu").type == "cpu":
        return FileTensor(stored, dtype or stored.dtype)
    return stored.to(device=device, dtype=dtype)


def join(parts):
    """Return `torch.cat(parts)`, without a cast copy of each part."""
    size = (sum(map(len, parts)), *parts[0].shape[1:])
    dtypes = [part.dtype for part in parts]
    joined = torch.empty(size, dtype=functools.reduce(torch.promote_types, dtypes))
    for place, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        place.copy_(part)
    return joined


class SafetensorsFile:
    """An open safetensors file with the methods that transformers calls to load a model."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_slice(self, name):
        return SafetensorsSlice(self.file.get_slice(name))


class SafetensorsSlice:
    """A tensor of an open safetensors file."""

    def __init__(self, stored):
        self.stored = stored

    def __getattr__(self, name):
        return getattr(self.stored, name)

    def __getitem__(self, index):
        values = self.stored[index]
        return FileTensor(values, values.dtype)


@contextlib.contextmanager
def leaving_in_files():
    """Let transformers load models whose weights stay in their files."""
    safe_open = modeling_utils.safe_open
    modeling_utils.safe_open = lambda *args, **options: SafetensorsFile(safe_open(*args, **options))
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open


# The model ----------------------------------------------------------------------------------------
def load_sharded(auto_class, name, **options):
    """Return `auto_class.from_pretrained(name, **options)`, with the weights still in their files.

    The weights are those of from_pretrained, bit for bit. Under FSDP, `accelerator.prepare` reads
    the slices of the process. Under ZeRO-3, `configure_deepspeed` does, by `shard_from_files`.
    Missing and unexpected weights are treated and named by transformers. Weights that it makes or
    converts, and the embedding that new tokens enlarge, are ordinary tensors in every process.

    A quantized model, a strategy that shards no weights, and under ZeRO-3 a model whose weights
    change their form (`is_converted`) get from_pretrained itself.

    Args:
        auto_class: AutoModelForCausalLM or another one, or a class of models.
        name: folder or Hub id of the model, with safetensors.
        options: options of from_pretrained.
    """
    is_zero3 = is_deepspeed_zero3_enabled()
    if not is_zero3 and os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return auto_class.from_pretrained(name, **options)
    config = AutoConfig.from_pretrained(name)
    if "quantization_config" in options or hasattr(config, "quantization_config"):
        return auto_class.from_pretrained(name, **options)
    if is_zero3 and is_converted(config):
        say(
            f"The weights of {name} change their form while they load: transformers loads them "
            "under zero.Init, where the first process reads all of them."
        )
        return auto_class.from_pretrained(name, **options)
    dtype = options.get("dtype", "auto")
    if is_zero3:
        options["dtype"] = engine_dtype(deepspeed_config())
        unset_hf_deepspeed_config()  # else transformers builds the model under zero.Init
    else:
        read_in_every_process()
    with leaving_in_files():
        model = auto_class.from_pretrained(name, **options)
    say_copies(model)
    leave_file(model, keep=is_zero3)
    if is_zero3 and dtype != "auto":
        set_config_dtype(model.config, getattr(torch, str(dtype).removeprefix("torch.")))
    return model


def is_converted(config):
    """Return whether transformers joins or splits weights of this model, such as experts.

    It makes ordinary tensors of them, all before the first is sharded. zero.Init takes less memory.
    """
    kinds = {config.model_type, config.get_text_config().model_type}
    rules = [rule for kind in kinds for rule in get_checkpoint_conversion_mapping(kind) or ()]
    return any(isinstance(rule, WeightConverter) for rule in rules)


def read_in_every_process():
    """Let every process read the weights itself, instead of getting them from the first one."""
    plugin = AcceleratorState().fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        say(
            "fsdp_cpu_ram_efficient_loading is turned off: every process reads the weights itself, "
            "unit by unit."
        )
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers reads it


def engine_dtype(settings):
    """Return the dtype in which DeepSpeed's engine holds the weights, by its config."""
    for block, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.get(block, {}).get("enabled") is True:
            return dtype
    return torch.float32


def set_config_dtype(config, dtype):
    """Write a dtype into a model's config, as from_pretrained does for the one that it is given."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            set_config_dtype(part, dtype)


def say_copies(model):
    """Print how many weights every process holds in full until they are sharded, if there are."""
    copies = [weight for weight in model.parameters() if not isinstance(weight, FileTensor)]
    if copies:
        size = sum(weight.numel() * weight.element_size() for weight in copies)
        say(
            f"{len(copies)} weights, {size:,} bytes, are new or differ in form from the files: "
            "every process holds them in full until they are sharded."
        )


def leave_file(model, keep):
    """Turn buffers, and weights of the file's own dtype, into ordinary tensors.

    Args:
        keep: leave these weights as they are.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(buffer, FileTensor):
                module._buffers[name] = buffer.read()
    for weight in model.parameters():
        if isinstance(weight, FileTensor) and weight.stored.dtype == weight.dtype and not keep:
            weight.data = weight.stored


# ZeRO-3 -------------------------------------------------------------------------------------------
def shard_from_files(accelerator, model):
    """Shard the weights that are still in their files with ZeRO-3's `zero.Init`.

    Every process reads its own slice of each weight. DeepSpeed's engine shards the other
    parameters, such as LoRA matrices, when it is made.
    """
    in_files = [weight for weight in model.parameters() if isinstance(weight, FileTensor)]
    if not in_files:
        return
    import deepspeed  # a large import

    # undoes unset_hf_deepspeed_config: transformers must know that ZeRO-3 is on
    accelerator.deepspeed_plugin.set_deepspeed_weakref()
    init = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=deepspeed_config())
    for weight in in_files:
        shard_from_file(init, weight)
    for module in model.modules():  # zero.Init would have made the buffers there
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(accelerator.device)


def shard_from_file(init, weight):
    """Read this process's slice of a weight into it, and partition it among the processes."""
    stored = weight.stored
    dtype = init.dtype if stored.is_floating_point() else stored.dtype
    # only the slice is written, and a page that is not written takes no memory on a CPU
    weight.data = torch.empty(stored.shape, dtype=dtype, device=init.local_device)
    init._convert_to_deepspeed_param(weight)
    size = math.ceil(weight.ds_numel / weight.ds_zero_partition_world_size)
    own = slice(size * weight.ds_zero_partition_rank, size * (weight.ds_zero_partition_rank + 1))
    if weight.ds_zero_param_process_group is not None:
        own = slice(None)  # hpZ keeps a second slice
    weight.data.view(-1)[own] = stored.reshape(-1)[own]
    weight.partition()
