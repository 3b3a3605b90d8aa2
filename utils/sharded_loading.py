"""Load a model for ZeRO-3 or FSDP: the weights are read, or drawn, when they are sharded.

transformers maps the files of a checkpoint into memory, and the system reads a page when it is
used. That ends as soon as a weight is cast to another dtype, or gathered by ZeRO-3: every process
then holds a copy of the full model. `load_sharded` builds the model by transformers' own code, but
no weight is read or cast until the strategy takes the slice of the process. With a config it makes
a new model: each weight is drawn when it is sharded, from the random numbers that it would have got
in one process. A process holds one weight at a time in full.
"""

import contextlib
import copy
import functools
import hashlib
import math
import os
import random
import weakref

import numpy
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from transformers import AutoConfig, PreTrainedConfig, modeling_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.deepspeed import deepspeed_config, unset_hf_deepspeed_config
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from utils.errors import first_line, refuse, say
from utils.lazy_weights import DrawnTensor, FileTensor, LazyTensor, drawing

IN_FULL = weakref.WeakSet()  # new models that could not be drawn weight by weight


# Files that stay open -----------------------------------------------------------------------------
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

    With a config instead of a name the model is new: see `draw_sharded`, which is collective.

    The weights are those of from_pretrained, bit for bit. Under FSDP, `accelerator.prepare` reads
    the slices of the process. Under ZeRO-3, `configure_deepspeed` does, by `shard_from_files`.
    Missing and unexpected weights are treated and named by transformers. Weights that it makes or
    converts, and the embedding that new tokens enlarge, are ordinary tensors in every process.

    A quantized model, a strategy that shards no weights, and under ZeRO-3 a model whose weights
    change their form (`is_converted`) get from_pretrained itself.

    Args:
        auto_class: AutoModelForCausalLM or another one, or a class of models.
        name: folder or Hub id of the model, with safetensors; or a config of transformers.
        options: options of from_pretrained.
    """
    if isinstance(name, PreTrainedConfig):
        return draw_sharded(auto_class, name, **options)
    is_zero3 = is_deepspeed_zero3_enabled()
    if not is_zero3 and not is_fsdp():
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
        use_every_process("reads")
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


def is_fsdp():
    """Return whether FSDP, 1 or 2, was launched."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def use_every_process(verb):
    """Let every process read or draw the weights itself, and get none from the first one."""
    plugin = AcceleratorState().fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        say(
            f"fsdp_cpu_ram_efficient_loading is turned off: every process {verb} the weights "
            "itself, unit by unit."
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
    read = functools.cache(LazyTensor.read)  # modules that share a buffer still do
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, LazyTensor):
                module._buffers[name] = read(buffer)
    for weight in model.parameters():
        if isinstance(weight, FileTensor) and weight.stored.dtype == weight.dtype and not keep:
            weight.data = weight.stored


# A new model --------------------------------------------------------------------------------------
def draw_sharded(auto_class, config, **options):
    """Return `auto_class.from_config(config, **options)`, with the weights still to be drawn.

    The weights are those that from_config draws in one process with the same random state, bit for
    bit. Under ZeRO-3 they are then cast to the engine's dtype. torch's generator is left in the
    state in which from_config leaves it. If the model's code does something that a DrawnTensor
    cannot do, every process makes the full model, and this is printed. Collective.

    Args:
        auto_class: AutoModelForCausalLM or another one, or a class of models.
        config: the config of the model.
        options: options of from_config. Two of from_pretrained may stay: use_safetensors, which has
            no effect because no file is read, and a device_map of one device.
    """
    options.pop("use_safetensors", None)
    device = only_device(options.pop("device_map", None))
    if options.get("dtype") == "auto":
        del options["dtype"]  # from_config takes the config's
    make = getattr(auto_class, "from_config", None) or auto_class._from_config
    is_zero3 = is_deepspeed_zero3_enabled()
    if not is_zero3 and not is_fsdp():
        model = make(config, **options)
        return model.to(device)
    if device is not None:
        say("device_map: unused, because the strategy moves the slices of a new model itself.")
    check_random_state()
    if is_zero3:
        dtype = engine_dtype(deepspeed_config())
        unset_hf_deepspeed_config()  # else transformers draws in another order
    else:
        use_every_process("draws")
    model = draw(make, config, options)
    leave_file(model, keep=True)
    if is_zero3 and dtype != model.dtype:
        restore = remember_random_states()
        with torch.device("meta"):
            like = make(copy.deepcopy(config), **options | {"dtype": dtype})
        restore()
        cast_model(model, like)
    return model


def only_device(device_map):
    """Return the device that a device_map of one device names, or None."""
    device = device_map
    if isinstance(device_map, dict) and device_map.keys() == {""}:
        device = device_map[""]
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        refuse(
            f"device_map {device_map!r}: a new model is made on one device, so name that device or "
            "leave device_map out"
        )


def cast_weights(model, dtype):
    """Cast the weights that hold floating-point numbers."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def cast_model(model, like):
    """Cast the weights to the dtype of another model of the same config, the buffers to theirs."""
    cast_weights(model, like.dtype)
    dtypes = {name: one.dtype for name, one in like.named_buffers(remove_duplicate=False)}
    for name, buffer in model.named_buffers():
        buffer.data = buffer.to(dtypes[name])


def check_random_state():
    """Stop if the processes would draw different models, of which each would keep its slices."""
    state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    if torch.distributed.is_initialized() and len(set(gather_object([state]))) > 1:
        refuse(
            "a new model is drawn from torch's generator, whose state differs between the "
            "processes: call set_seed with the same seed in all of them before load_sharded"
        )


def remember_random_states():
    """Return a function that restores the random states of Python, numpy and torch's CPU."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    def restore():
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])

    return restore


def draw(make, config, options):
    """Return a new model, with lazy weights where its code allows it."""
    restore = remember_random_states()
    try:
        with drawing():
            model = make(config, **options)
    except Exception as error:  # an invalid config, or an operation that lazy weights do not have
        restore()
        say(
            f"The new model cannot be drawn weight by weight ({first_line(error)}): every process "
            "makes the full model, and holds it until it is sharded."
        )
        model = make(config, **options)
        IN_FULL.add(model)
        return model
    say_drawn(model)
    return model


def say_drawn(model):
    """Print how much of a new model every process holds in full, and which weights start at 0."""
    total, held, empty = 0, 0, []
    for name, weight in model.named_parameters():
        total += weight.numel() * weight.element_size()
        if isinstance(weight, DrawnTensor):
            held += weight.recipe.num_bytes()
            empty += [] if weight.recipe.steps else [name]
        else:
            held += weight.nbytes
    if held > total / 100:  # vectors of ones and zeros are less
        say(
            f"{held:,} bytes of values cannot be drawn weight by weight (the model has {total:,} "
            "bytes): every process holds them in full until they are sharded."
        )
    if empty:
        say(
            f"Weights to which the model's code gives no value start at 0: {len(empty)}, the first "
            f"is {empty[0]}."
        )


# ZeRO-3 -------------------------------------------------------------------------------------------
def shard_from_files(accelerator, model):
    """Shard the weights that are still in their files, or to be drawn, with ZeRO-3's `zero.Init`.

    Every process takes its own slice of each weight. DeepSpeed's engine shards the other
    parameters, such as LoRA matrices, when it is made. A new model that every process holds in full
    is sharded here, too: the engine would move all of it to every GPU first. Collective.
    """
    lazy = [weight for weight in model.parameters() if isinstance(weight, LazyTensor)]
    if not lazy and not any(module in IN_FULL for module in model.modules()):
        return
    import deepspeed  # a large import

    # undoes unset_hf_deepspeed_config: transformers must know that ZeRO-3 is on
    accelerator.deepspeed_plugin.set_deepspeed_weakref()
    if not lazy:
        cast_weights(model, engine_dtype(deepspeed_config()))  # zero.Init does not
    module = torch.nn.Module() if lazy else model
    init = deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
    for weight in lazy:
        shard_lazy(init, weight)
    for module in model.modules():  # zero.Init would have made the buffers there
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(accelerator.device)


def shard_lazy(init, weight):
    """Write this process's slice of a weight into it, and partition it among the processes."""
    values = weight.detach()
    dtype = init.dtype if values.is_floating_point() else values.dtype
    # only the slice is written, and a page that is not written takes no memory on a CPU
    weight.data = torch.empty(values.shape, dtype=dtype, device=init.local_device)
    init._convert_to_deepspeed_param(weight)
    size = math.ceil(weight.ds_numel / weight.ds_zero_partition_world_size)
    own = slice(size * weight.ds_zero_partition_rank, size * (weight.ds_zero_partition_rank + 1))
    if weight.ds_zero_param_process_group is not None:
        own = slice(None)  # hpZ keeps a second slice
    weight.data.view(-1)[own] = values.reshape(-1)[own]
    weight.partition()
