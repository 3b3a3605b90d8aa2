"""What happens to the files of a run: checked, kept if a check fails, moved to their place."""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from utils.engine import full_shape
from utils.errors import fail, refuse
from utils.heartbeat import SAVING
from utils.run_files import write_beside

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PROMPT = "prompt_encoder.default."  # begins the names of a prompt method's parameters
PROMPT_KEY = "prompt_embeddings"


# What PEFT saves ----------------------------------------------------------------------------------
def plain_name(name):
    """Return a parameter's name without the wrappers of FSDP1, checkpointing and torch.compile."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class AdapterLayout:
    """What PEFT saves of a model's adapter, read before `prepare`; and the content of the file.

    Attributes:
        num_bytes: size of all tensors of the file.
        shapes: key in the file -> full shape.
        names: key -> name of the trained parameter.
        fixed: key -> tensor that is saved but not trained, on the CPU.
        before: key -> `fingerprint` of the trained parameter.
        encoder: what `encode_prompt` needs, for a prompt method; else None.
        is_converted: whether the method saves tensors by a rule of its own.
    """

    def __init__(self, model):
        from peft import get_peft_model_state_dict  # a large import

        self.model = model
        state = model.state_dict(keep_vars=True)
        saved = get_peft_model_state_dict(
            model, state_dict=dict(state), save_embedding_layers=False
        )
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        known = set(map(id, state.values()))
        sizes = (math.prod(full_shape(one)) * one.element_size() for one in saved.values())
        self.num_bytes = sum(sizes)
        self.shapes = {key: full_shape(tensor) for key, tensor in saved.items()}
        self.names = {k: trained[id(one)] for k, one in saved.items() if id(one) in trained}
        self.before = {key: fingerprint(saved[key]) for key in self.names}
        others = {key: one for key, one in saved.items() if key not in self.names}
        self.fixed = {k: v.detach().cpu().clone() for k, v in others.items() if id(v) in known}
        self.encoder = copy_encoder(model)
        self.is_converted = set(others) - set(self.fixed) - {PROMPT_KEY} != set()
        lost = sorted(set(trained.values()) - set(self.names.values()))
        if lost and self.encoder is None and not self.is_converted:
            refuse(
                f"{len(lost)} trainable parameters are not part of the adapter that PEFT saves, "
                f"the first is {lost[0]}: freeze them, or name their layers in modules_to_save"
            )

    def file_content(self, state_dict):
        """Return key -> tensor, for the file of the adapter.

        Args:
            state_dict: `plain_name` -> full trained parameter.
        """
        from peft import get_peft_model_state_dict  # a large import

        state_dict = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
        if self.is_converted:
            tensors = get_peft_model_state_dict(
                self.model, state_dict=state_dict, save_embedding_layers=False
            )
        else:
            # a missing one is for `check_adapter` to name, after the others were written
            names = {key: name for key, name in self.names.items() if name in state_dict}
            tensors = {key: state_dict[name] for key, name in names.items()} | self.fixed
        if self.encoder is not None:
            tensors[PROMPT_KEY] = encode_prompt(self.encoder, state_dict)
        # clones: safetensors refuses tensors that share their memory
        return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def copy_encoder(model):
    """Return what `encode_prompt` needs of a model with a prompt method; None for other models."""
    config = model.peft_config["default"]
    if not config.is_prompt_learning:
        return None
    encoder = copy.deepcopy(model.prompt_encoder["default"]).cpu()
    tokens = {"default": model.prompt_tokens["default"].cpu()}
    parts = {"prompt_encoder": {"default": encoder}, "prompt_tokens": tokens}
    return SimpleNamespace(**parts, peft_config={"default": config})


def encode_prompt(encoder, state_dict):
    """Return the prompt that PEFT saves: the output of its encoder with the trained weights.

    Computed on a copy of the encoder. The one in the model may be sharded.

    Args:
        encoder: from `copy_encoder`.
        state_dict: name -> full trained parameter.
    """
    values = {
        name.removeprefix(PROMPT): value.detach().cpu()
        for name, value in state_dict.items()
        if name.startswith(PROMPT)
    }
    from peft import PeftModel  # a large import

    encoder.prompt_encoder["default"].load_state_dict(values, strict=False)
    return PeftModel.get_prompt_embedding_to_save(encoder, "default")


def fingerprint(tensor):
    """Return two sums that almost surely change if the tensor changes; None for a shard."""
    if not tensor.numel() or hasattr(tensor, "ds_shape") or tensor.is_meta:
        return None
    values = tensor.detach().cpu().double()  # on one device, so that equal tensors have equal sums
    return values.sum().item(), values.abs().sum().item()


# Checks -------------------------------------------------------------------------------------------
def check_adapter(folder, layout, learning_rates=()):
    """Open the written adapter and fail unless it holds all that was trained.

    Prints a warning that names the trained tensors that did not change.

    Args:
        folder: where adapter_model.safetensors was written.
        layout: the `AdapterLayout`.
        learning_rates: those of all updates.
    """
    same = []
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        for key, shape in layout.shapes.items():
            if key not in keys:
                fail(f"the written adapter lacks {key}: every process must gather before one saves")
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != tuple(shape):
                fail(
                    f"the written adapter's {key} has shape {tuple(tensor.shape)}, not "
                    f"{tuple(shape)}: gather it before saving"
                )
            if not torch.isfinite(tensor).all():
                fail(f"the written adapter has NaN or infinity in {key}: lower --learning_rate")
            if layout.before.get(key) is not None and fingerprint(tensor) == layout.before[key]:
                same.append(key)
    # in the first update of LoRA, lora_A has no gradient, because lora_B is 0
    if same and sum(rate > 0 for rate in learning_rates) > 1:
        told = ", ".join(same[:5]) + (", ..." if len(same) > 5 else "")
        print(
            f"Warning: {len(same)} of {len(layout.before)} trained tensors did not change: {told}"
        )


def check_model(folder, num_elements):
    """Open the written model and fail unless it holds every parameter, and all are finite."""
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                found += tensor.numel()
                if not torch.isfinite(tensor).all():
                    fail(f"the written model has NaN or infinity in {key}: lower --learning_rate")
    if found < num_elements:  # saved buffers are counted, too
        fail(
            f"the written model holds {found} of {num_elements} elements: every process must "
            "gather before one saves"
        )


# Folders ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def holding_signals():
    """Run the body to its end, although a signal arrives or a machine is lost; then handle that.

    The signals are SIGINT and SIGTERM. `utils/heartbeat.py` ends the run for a lost machine.
    """
    received = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {one: signal.signal(one, lambda one, _: received.append(one)) for one in numbers}
    try:
        with SAVING:
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        name = signal.Signals(received[0]).name
        print(f"{name} arrived while the run was saved, and is handled now.", file=sys.stderr)
        sys.stderr.flush()
        os.kill(os.getpid(), received[0])


def keep_unchecked(folder, target, metrics, progress, with_log):
    """Keep the weights of a run that failed while it was saved; print and return the folder."""
    kept = target.with_name(f"{target.name}.unchecked")
    if kept.exists():
        kept = target.with_name(f"{kept.name}.{os.getpid()}")
    folder.replace(kept)
    with contextlib.suppress(Exception):  # write as much beside them as possible
        write_beside(kept, metrics, progress, with_log)
    print(f"The files are kept, unchecked, in {kept}", file=sys.stderr, flush=True)
    return kept


def has_weights(folder):
    """Return whether a .safetensors file in the folder is complete, judged by its header."""
    for file in folder.rglob("*.safetensors"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt"):
            return True
    return False


def move_into_place(folder, target, overwrite):
    """Rename the folder to the target, or replace the files of the run that the target holds."""
    share(folder)
    if not target.exists():
        folder.replace(target)
        return
    if not overwrite:
        spare = folder.replace(target.with_name(f"{target.name}.{os.getpid()}"))
        fail(f"another process created {target} during the run, the results are in {spare}")
    for name in (*earlier_files(target), "metrics.json"):
        (target / name).unlink(missing_ok=True)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        file.replace(target / file.relative_to(folder))
    shutil.rmtree(folder)


def share(folder):
    """Give the files the mode of new files under the umask; safetensors writes them with 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for file in Path(folder).rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def earlier_files(target):
    """Return the files that an earlier run lists as its own; none in an empty folder."""
    metrics = target / "metrics.json"
    return json.loads(metrics.read_text())["saved"] if metrics.is_file() else ()


def free_bytes(path):
    """Return the free bytes of the disk that holds a path, which need not exist yet."""
    path = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
    return shutil.disk_usage(path).free
