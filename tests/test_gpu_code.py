"""Tests of GPU code on a CPU. The tensors only pretend to be on a GPU."""

import ast
import inspect
import json
import os
import random
import textwrap
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as launch_command
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from examples import chat_sft
from utils import checkpoint, environment, launch, packing, process_group, results
from utils.chat import checkpoints, flops, run_log, signals
from utils.chat import settings as chat_settings
from utils.chat import token_loss as loss

SIZE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROTARY = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3"]
# operations that make the CPU wait for the GPU
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.item")


class Stop(BaseException):
    pass


class NoWaits(TorchDispatchMode):
    """Raise if the CPU would wait for a GPU: for a value, or for a shape that depends on values."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "item", "numpy", "cpu"):
            self.patch.setattr(torch.Tensor, name, self.refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def refuse(self, *args):
        raise AssertionError("a read waits for the GPU")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = name.startswith("aten.index.") and args[1][0].dtype == torch.bool
        if by_mask or name.startswith(WAITS):
            raise AssertionError(f"{name} waits for the GPU")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Make every tensor pretend to be on a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture
def varlen(monkeypatch):
    """Replace varlen_attn by a stub with the signature of torch 2.11; yield the list of its calls.

    That version has no argument enable_gqa.
    """
    calls = []

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1),
    ):  # fmt: skip
        calls.append((query, key, value, max_q, scale, window_size))
        return query.clone()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    packing.varlen_attention.cache_clear()
    yield calls
    packing.varlen_attention.cache_clear()


def make_documents(lengths=(9, 5, 14)):
    draw = random.Random(0)
    rows = [[draw.randrange(3, 300) for _ in range(length)] for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def make_causal(architecture, **settings):
    config = AutoConfig.for_model(architecture, **SIZE, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=packing.NAME)
    loss.add_token_loss(model)
    return model


def devices(batch):
    return {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)}


# Devices and waits --------------------------------------------------------------------------------
@pytest.mark.parametrize("calls", [1, 4])
def test_the_check_of_the_loss_moves_its_batches(calls):
    """Three forwards get a batch of several documents, the others one document each."""
    pair = make_documents((9, 5))
    model, forwards = make_causal("llama"), []

    def forward(**batch):
        forwards.append(devices(batch))
        if len(forwards) == calls:
            raise Stop
        return loss_of_one

    loss_of_one = {"loss": torch.ones(())}
    model.forward = forward
    accelerator = SimpleNamespace(device=torch.device("meta"), unwrap_model=lambda model: model)
    with pytest.raises(Stop):
        batches = packing.join(pair), [packing.join([document]) for document in pair]
        loss.check_token_loss(accelerator, model, *batches)
    assert forwards == [{"meta"}] * calls


@pytest.mark.parametrize("architecture", ROTARY)
@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_forward_never_waits_for_the_gpu(fake_gpu, varlen, monkeypatch, capability, architecture):
    """The forward uses bf16 autocast of float32 weights.

    An H100 (9.0) runs the varlen kernel, a T4 (7.5) computes one document after the other.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    model = make_causal(architecture)
    batch = packing.join(make_documents())
    with NoWaits(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
        outputs["loss"].backward()
    # the kernel does not support the soft cap of Gemma 2
    uses_kernel = capability == (9, 0) and architecture != "gemma2"
    assert len(varlen) == 2 * uses_kernel
    for query, key, value, *_ in varlen:
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16


def test_a_wait_is_found():
    batch = packing.join(make_documents())
    for part in ("label_positions", "document_lengths"):
        model = make_causal("llama")
        with NoWaits(), pytest.raises(AssertionError, match="waits"):
            model(**{name: value for name, value in batch.items() if name != part})


def test_an_evaluation_moves_its_batches():
    def model(**batch):
        assert devices(batch) == {"meta"}
        raise Stop

    model.eval = lambda: None
    with pytest.raises(Stop):
        accelerator = SimpleNamespace(device=torch.device("meta"))
        chat_sft.evaluate(accelerator, model, [packing.join(make_documents())])


def read_calls(body):
    """Return the calls in a syntax tree that read the value of a tensor."""
    reads = []
    for node in ast.walk(body):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_number = name in ("float", "int", "bool") and isinstance(node.func, ast.Name)
            # progress.log reads all numbers of an update at once
            is_log = ast.unparse(node.func) == "progress.log"
            if name in ("item", "tolist", "read_numbers", "cpu", "numpy") or is_number or is_log:
                reads.append(node)
    return reads


TRAINING = [file for file in (ROOT / "examples").glob("*.py") if "backward(" in file.read_text()]


@pytest.mark.parametrize("script", sorted(file.stem for file in TRAINING))
def test_an_update_reads_from_the_device_once(script):
    tree = ast.parse((ROOT / "examples" / f"{script}.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    kinds = (ast.For, ast.While)
    loop = next(
        node for node in ast.walk(functions["main"])
        if isinstance(node, kinds) and any(is_backward(inner) for inner in ast.walk(node))
    )  # fmt: skip
    parts = [part.test if is_occasional(part) else part for part in loop.body]
    # the functions of section 3 that the loop calls
    parts += [functions["compute_loss"], functions["count_targets"]]
    reads = [ast.unparse(read) for part in parts for read in read_calls(part)]
    on_cpu = ("int(targets)", "int(inputs)", "float(len(signals))")
    reads = [read for read in reads if read not in on_cpu]
    assert len(reads) == 1 and reads[0].startswith(("read_numbers(", "progress.log(")), reads


def is_backward(node):
    return isinstance(node, ast.Attribute) and node.attr == "backward"


def is_occasional(node):
    """Return whether a statement runs in some updates only, like a log, an evaluation, a save."""
    return isinstance(node, ast.If)


# function that an update calls -> the calls in it that read a tensor
READS = {
    packing.attend: ["starts.diff().tolist()"],  # only for batches that `join` has not made
    packing.document_by_document: [],
    packing.one_document: [],
    packing.fits_varlen: [],
    loss.HeadLoss: [],
    # the last two only if the head is not a linear layer
    loss.add_token_loss: [],
    loss.chunk_rows: ["int(limit / 4 / vocabulary)"],
    loss.loss_of_chunks: ["int(chunks)", "int(chunks)"],
    results.read_numbers: ["torch.hstack(values).tolist()"],
    results.Progress.print_epoch: [],
    run_log.RunLog.check_last_update: [],
    run_log.RunLog.begin_update: [],
    run_log.RunLog.end_update: [],
    run_log.RunLog.is_due: [],
    run_log.RunLog.is_evaluation_due: [],
    run_log.is_due: [],
    checkpoints.Checkpoints.is_due: [],
    checkpoints.Checkpoints.is_kept: [],
    signals.StopSignals.flags: ["float(number in self.received)"],  # numbers of the CPU
    results.Progress.log: ["read_numbers(self.accelerator.device, *tensors.values())"],
}


@pytest.mark.parametrize("function", READS)
def test_functions_of_an_update_read_nothing_else(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    assert [ast.unparse(read) for read in read_calls(tree)] == READS[function]


# Attention ----------------------------------------------------------------------------------------
def attend(query_heads=4, key_heads=2, size=64, dtype=torch.bfloat16, mixed=False, **options):
    """Call `packing.attend` on a packed batch and check shape and dtype of its output.

    Args:
        size: the head size.
        mixed: whether queries and keys are float32 beside values of `dtype`.
    """
    shape = (1, query_heads, 28, size)
    query = torch.ones(shape, dtype=torch.float32 if mixed else dtype)
    key = torch.ones(1, key_heads, *shape[2:], dtype=query.dtype)
    value = torch.ones(1, key_heads, *shape[2:], dtype=dtype)
    batch = packing.join(make_documents())
    module = SimpleNamespace(is_causal=True)
    output, _ = packing.attend(module, query, key, value, None, size**-0.5, **batch, **options)
    assert output.shape == (1, 28, query_heads, size) and output.dtype == dtype


def test_the_kernel_of_torch_2_11_takes_grouped_queries(fake_gpu, varlen):
    attend()
    (query, key, value, longest, scale, window), = varlen  # fmt: skip
    assert query.shape == (28, 4, 64) and key.shape == value.shape == (28, 2, 64)
    assert (longest, scale, window) == (14, 0.125, (-1, 0))


def test_newer_kernels_are_asked_for_grouped_queries(fake_gpu, monkeypatch):
    asked = []

    def varlen_attn(*rows, scale, window_size, enable_gqa=False):
        asked.append((enable_gqa, window_size))
        return torch.empty_like(rows[0])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    attend()
    attend(key_heads=4, sliding_window=7)
    assert asked == [(True, (-1, 0)), (False, (6, 0))]


def test_rotated_queries_are_cast_to_the_values(fake_gpu, varlen):
    attend(mixed=True)
    assert [tensor.dtype for tensor in varlen[0][:3]] == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "fits"),
    [
        ((7, 0), 64, torch.float16, False),  # V100
        ((7, 5), 64, torch.float16, False),  # T4
        ((8, 0), 64, torch.float16, True),  # A100
        ((8, 0), 64, torch.float32, False),
        ((8, 0), 256, torch.bfloat16, True),
        ((8, 0), 264, torch.bfloat16, False),
        ((8, 0), 80, torch.bfloat16, True),
        ((8, 0), 84, torch.bfloat16, False),
        ((8, 6), 192, torch.bfloat16, True),  # RTX 3090
        ((8, 9), 200, torch.bfloat16, False),  # L40S
        ((9, 0), 128, torch.bfloat16, True),  # H100
        ((10, 0), 128, torch.bfloat16, True),  # B200
    ],
)
def test_kernel_by_its_limits(fake_gpu, varlen, monkeypatch, capability, size, dtype, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    attend(size=size, dtype=dtype)
    assert len(varlen) == fits


def test_the_kernel_is_for_gpus_alone(varlen):
    tensors = [torch.randn(1, 2, 28, 64, dtype=torch.bfloat16) for _ in range(3)]
    batch = packing.join(make_documents())
    packing.attend(SimpleNamespace(is_causal=True), *tensors, None, 0.125, **batch)
    assert not varlen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_sdpa_gets_as_many_keys_as_queries(fake_gpu, varlen, monkeypatch, window, dtype):
    """With grouped queries, SDPA would compute the full attention matrix in float32 or with a mask.

    So keys and values are repeated before the call.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    real, seen = functional.scaled_dot_product_attention, []

    def sdpa(query, key, value, mask, dropout, causal, **options):
        seen.append((query.shape[1], key.shape[1], value.shape[1], options["enable_gqa"]))
        return real(query, key, value, mask, dropout, causal, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", sdpa)
    attend(dtype=dtype, sliding_window=window)
    assert seen == [(4, 4, 4, False)] * 3


def test_compiled_layers_are_compiled_once():
    """The number of documents does not matter, although attention runs once per document."""
    model, graphs = make_causal("llama"), []
    torch._dynamo.reset()
    counters.clear()
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="eager")
    for count in (3, 2, 7, 12):
        batch = packing.join(make_documents([5 + count + number for number in range(count)]))
        model(**batch)["loss"].backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1], graphs


@pytest.mark.parametrize("strategy", ["fsdp1", "zero3"])
def test_compiling_is_refused_where_hooks_break_the_graphs(monkeypatch, capsys, strategy):
    monkeypatch.setattr(chat_settings, "launched_strategy", lambda: strategy)
    with pytest.raises(SystemExit):
        chat_settings.resolve(chat_sft.Config(torch_compile=True))
    error = capsys.readouterr().err
    assert error.startswith("error: --torch_compile") and "configs/fsdp2.yaml" in error


def test_liger_is_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(chat_settings, "uses_gpu", lambda: False)
    with pytest.raises(SystemExit):
        chat_settings.resolve(chat_sft.Config(use_liger_kernel=True))
    assert "error: --use_liger_kernel needs a GPU" in capsys.readouterr().err


# Loss ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("is_cuda", "megabytes"), [(False, 64), (True, 512)])
def test_the_chunk_of_the_loss_is_chosen_by_device(varlen, monkeypatch, is_cuda, megabytes):
    chunks = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)

    def apply(hidden, weight, bias, labels, scale, softcap, chunk, gradients):
        chunks.append(chunk)
        return hidden.sum(), hidden.sum()

    monkeypatch.setattr(loss, "HeadLoss", SimpleNamespace(apply=apply))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    make_causal("llama")(**packing.join(make_documents()))
    assert chunks == [megabytes * 2**20 // 4 // 300]


# Optimizers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adamw_is_fused_on_a_gpu(monkeypatch, device):
    state = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(launch, "PartialState", lambda: state)
    weight = torch.nn.Parameter(torch.ones(3))
    assert launch.adamw("adamw_torch")([weight], lr=0.1).defaults["fused"] == (device == "cuda")


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_step_is_on_the_device_that_the_optimizer_needs(fused):
    weight = torch.nn.Parameter(torch.ones(3, device="meta"))
    groups = [{"params": [weight], "fused": fused}]
    optimizer = SimpleNamespace(param_groups=groups, state={weight: {}})
    parts = {"distributed_type": "NO", "scaler": None}
    tensors = {"0.value": torch.ones(3), "0.step": torch.tensor(4.0), "0.exp_avg": torch.ones(3)}
    checkpoint.restore_training_state(SimpleNamespace(**parts), optimizer, tensors, {})
    state = optimizer.state[weight]
    assert state["exp_avg"].is_meta and state["step"].is_meta == fused


def test_every_script_fuses_its_optimizer_on_a_gpu():
    assert len(TRAINING) > 10
    for file in TRAINING:
        text = file.read_text()
        is_fused = 'fused=accelerator.device.type == "cuda"' in text
        of_config = "DummyOptim(" in text  # DeepSpeed's config names the optimizer
        assert is_fused or of_config or "adamw(config.optim)" in text, file


def test_a_setting_added_later_does_not_stop_a_resume_while_it_is_off():
    then, now = {"seed": 1}, {"seed": 1, "tf32": False}
    checkpoint.check_same_run("folder", then, now)
    with pytest.raises(checkpoint.CheckpointError, match="tf32"):
        checkpoint.check_same_run("folder", then, now | {"tf32": True})


# Precision ----------------------------------------------------------------------------------------
def test_scripts_ask_for_the_launched_precision():
    """They must not read the flags: `accelerate launch --mixed_precision` sets it, too."""
    for file in sorted((ROOT / "examples").glob("*.py")):
        tree = ast.parse(file.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            asks = map(ast.unparse, nodes)
            if {"config.fp16", "config.bf16"} & set(asks):
                assert function.name == "resolve", f"{file.name}: {function.name}"


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "words"),
    [
        ("cuda", "no", False, ["no TF32", "--mixed_precision bf16", "--tf32"]),
        ("cuda", "no", True, []),
        ("cuda", "bf16", False, []),
        ("cpu", "no", False, []),
        ("cpu", "no", True, ["--tf32", "unused"]),
    ],
)
def test_a_slow_precision_gets_a_hint(device, precision, tf32, words):
    text = launch.precision_hint(device, precision, tf32)
    assert bool(text) == bool(words) and all(word in text for word in words)


# Utilisation --------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["full", "frozen", "new tokens"])
def test_flop_per_token_counts_the_matrix_products(tied, kind):
    """Compare with torch's count in a forward and a backward; attention scores are left out."""
    size = SIZE | {"vocab_size": 3000, "hidden_size": 256, "intermediate_size": 700, "head_dim": 64}
    config = AutoConfig.for_model("llama", **size, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=packing.NAME)
    if kind != "full":
        model.enable_input_require_grads()
        ends = ["embed_tokens", "lm_head"] if kind == "new tokens" else None
        lora = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=ends)
        model = get_peft_model(model, lora)
    loss.add_token_loss(model)
    documents = make_documents((40, 50))
    documents[0]["labels"] = [-100] * 30 + documents[0]["labels"][30:]
    batch = packing.join(documents)
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    body, head = flops.flop_per_token(model)
    counted = body * batch["labels"].numel() + head * len(batch["label_positions"])
    # torch counts attention scores, too, and no input gradient of a full model's first layer
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.06)


# Launch -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", sorted(map(str, (ROOT / "configs").glob("zero*.yaml"))))
def test_on_two_machines_every_machine_starts_its_own_processes(config):
    """Without deepspeed_multinode_launcher, accelerate would start `deepspeed --launcher pdsh`."""
    parser = launch_command.launch_command_parser()
    flags = ["--config_file", config, "--num_machines", "2", "--machine_rank", "1"]
    flags += ["--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    flags += ["--num_processes", "4"]
    arguments = parser.parse_args([*flags, "script.py"])
    arguments, defaults, _ = launch_command._validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    command, _ = prepare_deepspeed_cmd_env(arguments)
    assert command is None  # so torch's launcher starts the processes
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "2", 1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero", "gloo for a test"])
def test_the_gpu_is_set_before_the_group_and_the_group_before_the_accelerator(monkeypatch, kind):
    calls = []

    def accelerator(**kwargs):
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_device = lambda device: calls.append(("set_device", device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(
        process_group, "PartialState", lambda **options: calls.append(("group", options))
    )
    monkeypatch.setattr(launch, "Accelerator", accelerator)
    monkeypatch.setattr(launch, "use_all_cores", lambda: None)
    environ = os.environ | {"LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(os, "environ", environ)
    if kind == "fsdp":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    if kind == "zero":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if kind == "gloo for a test":
        os.environ["TESTS_GPU_BACKEND"] = "gloo"
    with pytest.raises(Stop):
        launch.start_accelerator()
    (first, device), (second, options) = calls
    assert (first, device, second) == ("set_device", 1, "group")
    assert options.pop("timeout").total_seconds() >= 3600
    others = {"zero": {}, "gloo for a test": {"backend": "gloo"}}
    assert options == others.get(kind, {"device_id": torch.device("cuda", 1)})
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_a_users_allocator_setting_is_kept(monkeypatch):
    def accelerator(**kwargs):
        raise Stop

    monkeypatch.setattr(launch, "Accelerator", accelerator)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setattr(os, "environ", {**os.environ, name: "max_split_size_mb:64"})
        with pytest.raises(Stop):
            launch.start_accelerator()
        settings = {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key}
        assert set(settings.values()) == {"max_split_size_mb:64"}


@pytest.mark.parametrize(("told", "expected"), [(None, True), ("False", True), ("True", False)])
def test_use_cpu_of_the_launch_config_is_respected(monkeypatch, told, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if told:  # spelled as accelerate spells it
        monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    assert environment.uses_gpu() == expected


@pytest.mark.parametrize(
    ("given", "processes", "threads"), [(None, 2, 4), (None, 16, 1), (None, 1, 8), ("3", 2, 3)]
)
def test_with_a_gpu_the_processes_share_the_cores(monkeypatch, given, processes, threads):
    assert_threads(monkeypatch, given, {"LOCAL_RANK": "0"}, processes, threads)


@pytest.mark.cases
@pytest.mark.parametrize("launched", [{"LOCAL_RANK": "0"}, {"ACCELERATE_DYNAMO_BACKEND": "no"}, {}])
def test_one_thread_that_the_user_asked_for_is_kept(monkeypatch, launched):
    assert_threads(monkeypatch, "1", launched, 1, 1)


def assert_threads(monkeypatch, given, launched, processes, threads):
    """Check `use_all_cores` on 8 cores where the user, not the launcher, gave OMP_NUM_THREADS."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    of_user = {"OMP_NUM_THREADS": given} if given else {}
    monkeypatch.setattr(environment, "launcher", lambda: ([], of_user))
    of_process = {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": given or "1"} | launched
    monkeypatch.setattr(os, "environ", of_process)
    assert process_group.use_all_cores() == (0 if given else threads)
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    assert found == ([] if given else [threads])


@pytest.mark.parametrize(
    ("settings", "trained", "size"),
    [({}, 7, 8), ({}, 144, 144), ({}, 10**9, 500_000_000), ({"reduce_bucket_size": 1000}, 7, 1000)],
)
def test_buckets_are_as_large_as_the_trainable_parameters(settings, trained, size):
    config = {"zero_optimization": {"stage": 3, **settings}}
    plugin = SimpleNamespace(
        deepspeed_config=config, zero_stage=3, set_deepspeed_weakref=lambda: None
    )
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.empty(trained, device="meta"))
    model.frozen = torch.nn.Parameter(torch.empty(99, device="meta"), requires_grad=False)
    script = SimpleNamespace(gradient_accumulation_steps=3, max_grad_norm=0.5)
    launch.configure_deepspeed(SimpleNamespace(deepspeed_plugin=plugin), script, model, more=1)
    assert config["zero_optimization"]["reduce_bucket_size"] == size
    assert config["zero_optimization"]["allgather_bucket_size"] == min(trained + trained % 2, 5e8)
    told = {name: config[name] for name in config if name != "zero_optimization"}
    assert told == {"gradient_accumulation_steps": 3, "gradient_clipping": 0.5, "more": 1}
    launch.configure_deepspeed(SimpleNamespace(deepspeed_plugin=None), script, model)


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3", "fsdp1", "fsdp2_hybrid"])
def test_groups_wait_for_hours(launch, tmp_path, config):
    """No process group times out within an hour, whichever library created it."""
    processes = 4 if "hybrid" in config else 2
    file = tmp_path / "groups.json"
    driver = ROOT / "tests/group_driver.py"
    launch(driver, config, file, processes=processes, PYTHONPATH=str(ROOT))
    facts = json.loads(file.read_text())
    assert len(facts["seconds"]) >= (2 if config in ("zero2", "zero3", "fsdp2_hybrid") else 1)
    assert min(facts["seconds"]) >= 3600
    if config.startswith("zero"):
        assert facts["bucket"] == facts["trained"] + facts["trained"] % 2


def test_data_is_encoded_once_per_machine():
    """Machines may have separate caches, so one process of each machine fills its cache."""
    for file in sorted((ROOT / "examples").glob("*.py")):
        assert ".main_process_first()" not in file.read_text(), file


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_weights_are_loaded_to_the_device_that_needs_them(monkeypatch, strategy):
    device = torch.device("cuda", 1)
    monkeypatch.setattr(launch, "PartialState", lambda: SimpleNamespace(device=device))
    monkeypatch.setattr(launch, "is_deepspeed_zero3_enabled", lambda: strategy == "zero3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(strategy == "fsdp2").lower())
    assert launch.device_map() == ({"": device} if strategy == "ddp" else None)
