"""What one process of a cell of the compatibility table does: train and save, or reload and merge.

The training loop, the gathering and the saving are short versions of those in examples/.
measure.py starts the processes.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes  # noqa: F401 imports of this file happen once, before the forks
import deepspeed  # noqa: F401
import peft
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    GatheredParameters,
    gather_object,
    set_seed,
)
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper
from peft.utils.other import fsdp_auto_wrap_policy
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tools.compatibility.rows import SLICE
from utils.engine import bytes_held, held_part, stepping_optimizer
from utils.environment import launched_strategy
from utils.launch import start_accelerator
from utils.nvme import VARIABLE, nvme_parts
from utils.results import WeightFiles
from utils.saving import plain_name

VOCABULARY = 256
ROWS_PER_UPDATE = 16  # the full data set, so that the losses of all updates can be compared
ACCUMULATION = 2
UPDATES = 5
MAX_GRAD_NORM = 0.5  # low enough to clip
BUFFER = 2**16  # elements, more than those of the largest slice
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")


def main(step, job):
    """Run a step of a cell in this process; write an error, and the check it belongs to, to a file.

    Args:
        step: "make_model", "train", "reload" or "state".
        job: the dict that measure.py makes.
    """
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    folder, rank = Path(job["folder"]), job["rank"]
    found, check = {}, "starts"

    def enter(name):
        nonlocal check
        check = name
        if rank == 0:
            (folder / "check.txt").write_text(name)

    code = 0
    steps = {"make_model": make_model, "train": train, "reload": reload, "state": save_state}
    try:
        steps[step](job, found, enter)
    except BaseException as error:  # whatever a library raises is what is being measured
        traceback.print_exc()
        code = 1
        message = f"{type(error).__name__}: {error}"
        content = {"check": check, "message": message, "time": time.time()}
        (folder / f"error-{rank}.json").write_text(json.dumps(content))
    if rank == 0:
        (folder / f"found-{step}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skip exit handlers: they may wait for a process that has failed


def make_model(job, found, enter):
    """Write the base model of all cells."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(job["model"])


def set_environment(job):
    """Set the variables that `accelerate launch` and torchrun would set for this process."""
    command = [*job["launch"], "--main_process_port", "0", "script.py"]
    args = launch_command_parser().parse_args(command)
    args, defaults, precision_from_file = _validate_launch_command(args)
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if precision_from_file else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
    os.environ |= environment
    os.environ[VARIABLE] = job["folder"]  # read where the launch config offloads to NVMe
    if job["world"] > 1:
        rank, world = str(job["rank"]), str(job["world"])
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}


def build_base(row, folder):
    """Return the base model of a row, in float32 or quantized."""
    options = {"dtype": "float32"}
    if row.base == "8-bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif row.base == "4-bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="float32",
            bnb_4bit_quant_storage="float32",
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if row.new_tokens:
        model.resize_token_embeddings(VOCABULARY + row.new_tokens, mean_resizing=False)
    return model


def make_data(row):
    """Return (token ids, length of the prompt) of sequences of different lengths.

    A prompt is random, its answer one of a few.
    """
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for number in range(ROWS_PER_UPDATE):
        length = 5 + number % 7
        prompt = torch.randint(3, 100, (length,), generator=generator).tolist()
        prompt[1] = VOCABULARY + number % row.new_tokens if row.new_tokens else prompt[1]
        answer = [200 + number % 4] * (1 + number % 3) + [2]
        sequences.append((prompt + answer, len(prompt)))
    return sequences


def collate(rows):
    """Return a batch, padded on the right, with label -100 (no loss) for prompts and padding."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.where(mask.bool(), ids, -100)
    for label, (_, prompt) in zip(labels, rows):
        label[:prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def probe_batch():
    """Return the token ids, without padding, whose logits are compared."""
    return torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(2))


def swap_small_slices(plugin):
    """Let DeepSpeed swap slices from SLICE bytes on: by default it keeps those below 1 MiB."""
    for module in (partitioned_param_swapper, optimizer_utils):
        module.MIN_AIO_BYTES = SLICE
    content = plugin.deepspeed_config
    content["aio"]["block_size"] = SLICE
    zero = content["zero_optimization"]
    zero["offload_param"]["buffer_size"] = BUFFER
    # weights below this number of elements are never sharded again; by default these are smaller
    # than what is swapped
    zero["stage3_param_persistence_threshold"] = 0
    plugin.set_deepspeed_weakref()  # zero.Init reads a copy


def build_optimizer(row, parameters):
    """Return the row's optimizer, with weight decay, in which Adam and AdamW differ."""
    module, _, name = row.optimizer.rpartition(".")
    optimizer = getattr(sys.modules[module], name)
    return optimizer(parameters, lr=row.learning_rate, weight_decay=0.1, **row.optimizer_options)


def update(job, found, enter):
    """Train as the scripts do.

    Returns:
        the accelerator, the prepared model, the names of the trainable parameters, and the files.
    """
    row = SimpleNamespace(**job["row"])
    set_environment(job)
    torch.set_num_threads(1)
    accelerator = start_accelerator(ACCUMULATION)
    if accelerator.deepspeed_plugin is not None:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            gradient_accumulation_steps=ACCUMULATION, gradient_clipping=MAX_GRAD_NORM
        )
        if nvme_parts(accelerator.deepspeed_plugin.deepspeed_config):
            swap_small_slices(accelerator.deepspeed_plugin)
    set_seed(0)
    model = build_base(row, job["model"])
    peft_config = getattr(peft, row.config)(task_type="CAUSAL_LM", **row.options)
    model = peft.get_peft_model(model, peft_config)
    target = SimpleNamespace(output_dir=Path(job["folder"]) / "adapter")
    files = WeightFiles(accelerator, target, model, tokenizer=None)
    _, full = bytes_held(list(model.parameters()))  # before FSDP1 replaces them by shards
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    data = make_data(row)
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(data, num_samples=UPDATES * len(data), generator=generator)
    micro_batch = ROWS_PER_UPDATE // ACCUMULATION // accelerator.num_processes
    loader = DataLoader(data, micro_batch, sampler=sampler, collate_fn=collate)
    model, optimizer, loader = prepare(accelerator, row, model, loader)
    held, _ = bytes_held(list(accelerator.unwrap_model(model).parameters()))
    found["whole"] = sum(full.values())
    found["optimizer"] = type(stepping_optimizer(optimizer)).__name__
    found["bytes"] = [sum(sizes.values()) for sizes in held]

    enter("learns")
    losses, norms = [], []
    model.train()
    batches = iter(loader)
    for _ in range(UPDATES):
        micro_batches = [next(batches) for _ in range(ACCUMULATION)]
        counts = [batch["labels"].ne(-100).sum() for batch in micro_batches]
        step_tokens = accelerator.reduce(sum(counts))
        step_loss = torch.zeros((), device=accelerator.device)
        for batch, count in zip(micro_batches, counts):
            with accelerator.accumulate(model):
                loss = model(**batch, use_cache=False).loss * count / step_tokens
                step_loss += loss.detach()
                accelerator.backward(loss * ACCUMULATION * accelerator.num_processes)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(accelerator.reduce(step_loss).item())
        norms.append(float(norm))
    copies = gather_object([kept_copies(model)])
    found["bytes"] = [sum(pair) for pair in zip(found["bytes"], copies)]
    found["losses"], found["grad_norms"] = losses, norms
    found["graphs"] = counters["stats"]["unique_graphs"]  # made by torch.compile
    return accelerator, model, names, files


def kept_copies(model):
    """Return the bytes of full 8-bit weights that bitsandbytes keeps here beside the parameters."""
    modules = [module for module in model.modules() if hasattr(module, "state")]
    modules = [module for module in modules if getattr(module.state, "CB", None) is not None]
    owned = {held_part(module.weight).untyped_storage().data_ptr() for module in modules}
    weights = [module.state.CB for module in modules]
    copies = [full for full in weights if full.untyped_storage().data_ptr() not in owned]
    return sum(full.numel() for full in copies)


def train(job, found, enter):
    """Train, and save the adapter, and its logits and tensors for the comparison."""
    accelerator, model, names, files = update(job, found, enter)
    enter("reloads")
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=probe_batch().to(accelerator.device)).logits.cpu()
    state_dict = gather(accelerator, model, names)
    if accelerator.is_main_process:
        files.target.mkdir()
        files.write(files.target, state_dict)
        files.check(files.target)
        torch.save({"logits": logits, "trained": state_dict}, Path(job["folder"]) / "compare.pt")
        (Path(job["folder"]) / "saved").touch()
    accelerator.wait_for_everyone()


def prepare(accelerator, row, model, loader):
    """Prepare model, optimizer and loader in the order that the strategy needs."""
    if launched_strategy() == "fsdp1":
        plugin = accelerator.state.fsdp_plugin
        # one unit per trainable matrix or prompt
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model = accelerator.prepare(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(row, trainable)
    if launched_strategy() == "fsdp1":
        return model, *accelerator.prepare(optimizer, loader)
    return accelerator.prepare(model, optimizer, loader)


def gather(accelerator, model, names):
    """Return name -> full tensor, on the CPU, of the trainable parameters. Collective."""
    if launched_strategy() == "fsdp1":
        state_dict = gather_fsdp1(accelerator, model)
        return {name: state_dict[name] for name in names}
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    trained = {
        plain_name(name): parameter
        for name, parameter in unwrapped.named_parameters()
        if parameter.requires_grad
    }
    if launched_strategy() == "zero3":
        with GatheredParameters(list(trained.values())):
            return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
    return {name: parameter.detach().cpu().clone() for name, parameter in full.items()}


def gather_fsdp1(accelerator, model):
    """Return name -> full tensor, on the CPU, of at least the trainable parameters. Collective."""
    # with original parameters a unit may mix frozen and trainable ones: gather the full model
    mixed = accelerator.state.fsdp_plugin.use_orig_params
    state_dict = {}
    for path, unit in model.named_modules():
        if not isinstance(unit, FSDP):
            continue
        if mixed or all(parameter.requires_grad for parameter in unit.parameters()):
            with FSDP.summon_full_params(unit, writeback=False, recurse=mixed):
                for name, parameter in unit.module.named_parameters(plain_name(path)):
                    state_dict[plain_name(name)] = parameter.detach().cpu().clone()
        if mixed:
            return state_dict  # the root came first
    return state_dict


def save_state(job, found, enter):
    """Train again, and write a checkpoint with the optimizer's state, by accelerate."""
    accelerator, model, *_ = update(job, {}, enter)
    enter("state")
    if launched_strategy() == "fsdp1":
        state = FSDP.optim_state_dict(model, accelerator._optimizers[0].optimizer)
        values = [value for entry in state["state"].values() for value in entry.values()]
        if any(isinstance(value, dict) for value in values):
            raise ValueError(
                "FSDP gathers no tensors that lie in a dict, "
                "each process would save its slice alone"
            )
    options = {}
    if accelerator.deepspeed_plugin is not None:
        options["exclude_frozen_parameters"] = True
    accelerator.save_state(Path(job["folder"]) / "state", **options)
    accelerator.wait_for_everyone()
    found["state"] = True


def reload(job, found, enter):
    """Load the saved adapter with plain peft, compare it with the trained one, and merge it."""
    row = SimpleNamespace(**job["row"])
    enter("reloads")
    torch.set_num_threads(1)
    device = start_accelerator().device
    folder = Path(job["folder"])
    kept = torch.load(folder / "compare.pt")
    model = peft.PeftModel.from_pretrained(build_base(row, job["model"]), folder / "adapter")
    model = model.to(device).eval()
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters()}
    # the file of a prompt holds the output of the encoder, not the encoder
    is_prompt = model.peft_config["default"].peft_type in PROMPTS
    compared = {} if is_prompt else kept["trained"]
    missing = [name for name in compared if name not in parameters]
    loaded = [name for name in compared if name in parameters]
    unequal = [name for name in loaded if not torch.equal(compared[name], parameters[name])]
    with torch.no_grad():
        logits = model(input_ids=probe_batch().to(device)).logits.cpu()
        found["reload"] = {
            "tensors": len(kept["trained"]),
            "missing": missing,
            "unequal": unequal,
            "logits": (logits - kept["logits"]).abs().max().item(),
        }
        if row.merges:
            enter("merges")
            merged = model.merge_and_unload()
            difference = merged(input_ids=probe_batch().to(device)).logits.cpu() - logits
            found["merge"] = difference.abs().max().item()
