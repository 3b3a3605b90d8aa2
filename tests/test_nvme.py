"""Parameters and optimizer on NVMe: refusals without the extension, swap files, nothing left."""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ACCELERATE, ROOT
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero import parameter_offload
from models import make_data, make_model
from safetensors.torch import load_file

from tools import nvme as tool
from tools.compatibility.judge import judge, status
from tools.compatibility.results import RESULTS, cell_file
from utils import nvme

SCRIPT = "causal_lm_full_zero3"
BIG = {"hidden_size": 512, "intermediate_size": 2048}  # slices of 1 MiB in bf16: it swaps them
BIG |= {"num_attention_heads": 8, "num_key_value_heads": 8}
# biases of odd length: behind them, gradients do not lie where direct I/O could read them to
BIG |= {"attention_bias": True, "mlp_bias": True, "head_dim": 10}
UPDATES = 4
LIMIT = 600  # seconds
LIBAIO = ROOT / "tests/libaio/libaio.c"


def refusal(capsys, function, *args):
    """Return the one line with which a call stops."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


# The path -----------------------------------------------------------------------------------------
def test_a_path_is_needed(monkeypatch, capsys):
    monkeypatch.delenv(nvme.VARIABLE, raising=False)
    for block in ({}, {"nvme_path": None}, {"nvme_path": "none"}):
        error = refusal(capsys, nvme.find_base, "offload_param", block)
        assert "NVME_PATH is not set in the environment: set it to a folder" in error


def test_the_path_of_the_config_and_of_the_environment(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(nvme.VARIABLE, str(tmp_path))
    assert nvme.find_base("offload_param", {}) == tmp_path
    assert nvme.find_base("offload_param", {"nvme_path": str(tmp_path)}) == tmp_path
    error = refusal(capsys, nvme.find_base, "offload_param", {"nvme_path": "/elsewhere"})
    assert "nvme_path of offload_param is /elsewhere, and NVME_PATH" in error
    monkeypatch.delenv(nvme.VARIABLE)
    assert nvme.find_base("offload_param", {"nvme_path": str(tmp_path)}) == tmp_path
    assert [*tmp_path.iterdir()] == []


def test_a_path_that_is_no_folder_or_read_only(monkeypatch, capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "missing"):
        monkeypatch.setenv(nvme.VARIABLE, str(path))
        assert "is not a folder" in refusal(capsys, nvme.find_base, "offload_param", {})
    monkeypatch.setenv(nvme.VARIABLE, "/proc")  # not even root can write there
    assert "NVME_PATH /proc cannot be written" in refusal(capsys, nvme.find_base, "x", {})


def test_fast_init_is_refused(monkeypatch, capsys, tmp_path):
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "fast_init": True}}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero}, zero_stage=3)
    monkeypatch.delenv(nvme.VARIABLE, raising=False)
    error = refusal(capsys, nvme.start_nvme, SimpleNamespace(deepspeed_plugin=plugin))
    assert "with fast_init of offload_optimizer DeepSpeed reads weights" in error


# The sizes ----------------------------------------------------------------------------------------
def plan(processes=2, **zero):
    """Return the plan of a model with one large and one small weight."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False), torch.nn.LayerNorm(8))
    return nvme.Plan({"zero_optimization": zero}, model, processes)


def test_sizes_of_buffers_and_files():
    half = 1024 * 1024 // 2
    one = plan()
    assert one.largest == half and one.swapped == [half]
    flat = half + 4 + 4
    padded = -(-4 * flat // 1024) * 1024
    parts = {"offload_optimizer": {"device": "nvme"}}
    assert one.pinned_bytes(parts) == 4 * padded
    assert one.file_bytes(parts) == 3 * padded + 4 * half  # three states, and the gradients
    parts = {"offload_param": {"buffer_size": one.largest, "max_in_cpu": 0, "buffer_count": 3}}
    whole = 4 * (1024 * 1024 + 16)
    assert one.pinned_bytes(parts) == 3 * 4 * half + -(-whole // 1024) * 1024
    assert one.file_bytes(parts) == 4 * half
    assert [len(group) for group in plan(sub_group_size=half).groups] == [1, 2]


@pytest.mark.parametrize(
    "own, total, kept",
    [
        ("auto", sys.maxsize, [500]),
        (2000, sys.maxsize, [1000, 1100, 500]),
        (2000, 2100, [1000, 1100]),
        (2000, 2099, [1000, 500]),  # the second does not fit, the fourth does
        (10**9, 0, []),
        (4000, 10**9, [1000, 1100, 3000, 500]),
    ],
)
def test_weights_that_stay_gathered(monkeypatch, own, total, kept):
    """As DeepSpeed's own function says."""
    monkeypatch.setattr(nvme, "PERSISTENT", 500)
    model = torch.nn.ParameterList(torch.zeros(size) for size in (1000, 1100, 3000, 500))
    zero = {"stage3_param_persistence_threshold": own, "stage3_model_persistence_threshold": total}
    one = nvme.Plan({"zero_optimization": zero}, model, 2)
    assert one.gathered([len(weight) for weight in model]) == kept
    for weight in model:
        weight.ds_numel = len(weight)
    monkeypatch.setattr(parameter_offload, "print_rank_0", lambda *_, **__: None)
    mark = parameter_offload.DeepSpeedZeRoOffload.mark_persistent_parameters
    mark(SimpleNamespace(module=model), 500 if own == "auto" else own, total)
    assert [len(weight) for weight in model if hasattr(weight, "ds_persist")] == kept


@pytest.fixture
def accelerator(tmp_path):
    """What fit_nvme reads of an Accelerator."""
    zero = {
        "offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "run"), "max_in_cpu": 0}
    }
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    return SimpleNamespace(deepspeed_plugin=plugin, num_processes=2, print=print)


def test_too_little_space_memory_or_buffer(accelerator, monkeypatch, capsys):
    model = torch.nn.Linear(1024, 1024)
    block = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["offload_param"]
    nvme.fit_nvme(accelerator, model)
    assert block["buffer_size"] == 1024 * 1024 // 2
    assert "bytes of pinned memory per process" in capsys.readouterr().out
    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(nvme.shutil, "disk_usage", lambda path: usage)
        assert "has 1,000 bytes free, and 1 process" in refusal(
            capsys, nvme.fit_nvme, accelerator, model
        )
    with monkeypatch.context() as patch:
        patch.setattr(nvme.os, "geteuid", lambda: 1000)
        patch.setattr(nvme.resource, "getrlimit", lambda kind: (8192, 8192))
        assert "`ulimit -l` allows 8,192" in refusal(capsys, nvme.fit_nvme, accelerator, model)
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 1024 * 1024
    error = refusal(capsys, nvme.fit_nvme, accelerator, model)
    assert "stage3_param_persistence_threshold keeps 1 weights on NVMe gathered" in error
    zero["stage3_model_persistence_threshold"] = 1024 * 1024 - 1
    nvme.fit_nvme(accelerator, model)
    zero["stage3_param_persistence_threshold"] -= 1
    del zero["stage3_model_persistence_threshold"]
    block["buffer_count"] = 10**9
    assert "bytes of memory each" in refusal(capsys, nvme.fit_nvme, accelerator, model)
    block |= {"buffer_count": 5, "buffer_size": 7}
    assert "buffer_size 7 of offload_param is too small" in refusal(
        capsys, nvme.fit_nvme, accelerator, model
    )


def test_fetching_ahead_is_off_unless_the_user_wants_it(capsys):
    zero = {"stage3_prefetch_bucket_size": 5}
    nvme.set_fetching(zero)
    assert zero == {"stage3_prefetch_bucket_size": 5, "stage3_max_reuse_distance": 0}
    assert "stage3_prefetch_bucket_size 5 with parameters on NVMe" in capsys.readouterr().out


def test_settings_of_the_drive_that_deepspeed_would_not_read(capsys):
    nvme.check_aio({"block_size": 2**20, "overlap_events": True})
    error = refusal(capsys, nvme.check_aio, {"num_threads": 4})
    assert "does not read aio.num_threads" in error and "now intra_op_parallelism" in error
    error = refusal(capsys, nvme.check_aio, {"single_submit": "false"})
    assert "aio.single_submit of DeepSpeed's config is 'false': it must be true or false" in error
    for value in (0, "8M", True, 1.5, 2**31):
        assert "a whole number" in refusal(capsys, nvme.check_aio, {"block_size": value})
    error = refusal(capsys, nvme.check_aio, {"block_size": 1000})
    assert "aio.block_size of DeepSpeed's config is 1000: it must be a multiple of 512" in error


def test_gradients_lie_where_direct_io_can_read_them(monkeypatch):
    name = "_adjust_for_misaligned_lengths"
    monkeypatch.setattr(OptimizerSwapper, name, getattr(OptimizerSwapper, name))  # restored later
    nvme.align_gradients()

    def is_swappable(tensor):
        return len(tensor) >= 512

    swapper = SimpleNamespace(numel_alignment=256, is_swappable_tensor=is_swappable)
    gradients = [torch.rand(length) for length in (5, 2000, 512, 300)]
    places = [0, 5, 2005, 2517]
    parts, offsets = getattr(OptimizerSwapper, name)(swapper, gradients, places)
    assert offsets == [0, *itertools.accumulate(map(len, parts))][:-1]
    assert torch.equal(torch.cat(parts), torch.cat(gradients))
    swapped = [pair for pair in zip(parts, offsets) if is_swappable(pair[0])]
    assert swapped and all(len(part) % 256 == offset % 256 == 0 for part, offset in swapped)


# The folder ---------------------------------------------------------------------------------------
HOLDER = """
import pathlib, signal, sys, time
from utils import nvme
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
folder = pathlib.Path(sys.argv[1])
nvme.make_folder(folder)
(folder / "weights").write_bytes(bytes(1000))
nvme.remove_at_end()
print("ready", flush=True)
time.sleep(1000)
"""


ENDS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *ENDS])
def test_the_folder_goes_with_its_run(tmp_path, capsys, number):
    folder = tmp_path / "run-1"
    command = [sys.executable, "-c", HOLDER, folder]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        assert process.stdout.readline() == b"ready\n"
        nvme.remove_left_behind(tmp_path)
        assert (folder / "weights").exists()  # the run lives
        process.send_signal(number)
        try:
            assert process.wait(60) == -number
        finally:
            process.kill()
    if number == signal.SIGKILL:
        assert folder.exists()
        nvme.remove_left_behind(tmp_path)
        assert "Removed 1 swap folder(s) of killed runs" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []


# Without the extension ----------------------------------------------------------------------------
def test_the_extension_is_not_built(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not nvme.is_built()
    error = refusal(capsys, nvme.load_extensions, None, {})
    assert "is not built: build it once with `python -m tools.nvme build`" in error
    assert "async_io is not built: build it" in refusal(capsys, tool.tune, tmp_path, "1M", None)


def test_the_build_names_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    error = refusal(capsys, tool.build, 1)
    assert "the build needs a C++ compiler, no-compiler (package g++)" in error
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(tool, "PROGRAM", "#include <no_libaio.h>")
    assert "libaio.h (package libaio-dev)" in refusal(capsys, tool.build, 1)
    monkeypatch.setattr(tool.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool.cpp_extension, "CUDA_HOME", None)
    assert "; the CUDA toolkit, whose folder CUDA_HOME names" in refusal(capsys, tool.build, 1)


def test_a_kernel_without_asynchronous_io(monkeypatch, tmp_path, capsys):
    source = tmp_path / "refusing.c"
    source.write_text("int io_queue_init(int n, void *c) { return -38; }")
    for name, value in libaio_variables(tmp_path, source).items():
        monkeypatch.setenv(name, value)
    error = refusal(capsys, tool.find_missing)
    assert "the kernel refuses io_setup (Function not implemented)" in error


def test_a_command_is_followed_and_ended(monkeypatch, capsys):
    monkeypatch.setattr(tool, "INTERVAL", 0)
    program = "import time; print('[1/4] c++', flush=True); time.sleep(1)"
    code, output = tool.run([sys.executable, "-c", program], tool.compiled)
    assert (code, output) == (0, "[1/4] c++\n")
    assert "s: compiling pin_memory, 1 of 4 steps\n" in capsys.readouterr().out
    assert tool.run([sys.executable, "-c", "input()"], tool.compiled, minutes=0) is None
    assert tool.compiled("[4/4] c++\nloaded\n") == "compiling async_io"
    assert tool.compiled("[4/4] c++\n[2/13] c++\n") == "compiling async_io, 2 of 13 steps"


def test_the_values_that_the_tuner_tries(tmp_path, capsys):
    file = tmp_path / "values.json"
    file.write_text('{"queue_depth": [8]}')
    assert tool.read_values(file) == tool.VALUES | {"queue_depth": [8]}
    for content in ('{"threads": [1]}', '{"queue_depth": 8}', '{"queue_depth": []}', "[1]"):
        file.write_text(content)
        assert "must hold a list of values" in refusal(capsys, tool.read_values, file)
    text = '{"block_size": ["8M", "512K", 4096, "4096"], "single_submit": [true]}'
    file.write_text(text)
    assert tool.read_values(file) == tool.VALUES | json.loads(text)
    faults = {
        "block_size": {
            "8G": "a whole number",
            "8MB": '"8M"',
            100: "a multiple of 512",
            None: '"8M"',
        },
        "queue_depth": {0: "a whole number", "32": "a whole number", True: "a whole number"},
        "io_parallel": {1.5: "a whole number", -1: "a whole number"},
        "single_submit": {"false": "true or false", 0: "true or false"},
        "sequential_requests": {"yes": "true or false"},
    }
    for key, values in faults.items():
        for value, told in values.items():
            file.write_text(json.dumps({key: [*tool.VALUES[key], value]}))
            error = refusal(capsys, tool.read_values, file)
            assert f"{key} {json.dumps(value)} in {file} must be" in error and told in error
    file.write_text("{")
    assert "values.json cannot be read" in refusal(capsys, tool.read_values, file)


@pytest.mark.parametrize(
    "size, parallel, told",
    [
        ("1G0", 1, "is no number of bytes"),
        ("1000", 1, "must be a multiple of 1024 bytes, for io_parallel 1"),
        ("400M", 3, "must be a multiple of 3072 bytes, for io_parallel 3"),
    ],
)
def test_the_size_that_the_tuner_reads(tmp_path, capsys, size, parallel, told):
    file = tmp_path / "values.json"
    file.write_text(json.dumps({"io_parallel": [1, parallel]}))
    assert f"--size {size} {told}" in refusal(capsys, tool.tune, tmp_path, size, file)


def test_a_launch_without_a_path(launch, tmp_path):
    output = launch(SCRIPT, "zero3_nvme", "--output_dir", tmp_path / "run", code=1).stdout
    assert output.count("error: ") == 1 and "NVME_PATH is not set" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launch_without_the_extension(launch, tmp_path):
    variables = {nvme.VARIABLE: str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}
    words = ("--output_dir", tmp_path / "run")
    output = launch(SCRIPT, "zero3_nvme", *words, code=1, real=True, **variables)
    assert output.stdout.count("error: ") == 1 and "tools.nvme build" in output.stdout
    assert not (tmp_path / "run").exists() and not [*tmp_path.glob("*run-*")]


def test_chat_sft_refuses_it(launch, tmp_path):
    output = launch("chat_sft", "zero3_nvme", "--output_dir", tmp_path / "run", code=1).stdout
    assert output.count("error: ") == 1
    assert "chat_sft's checkpoints cannot hold it" in output


# For real -----------------------------------------------------------------------------------------
def libaio_variables(folder, source=LIBAIO):
    """Compile a libaio; return the variables with which compilers and loaders find it."""
    for compiler in (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")):
        if shutil.which(compiler) is None:
            pytest.skip(f"needs a compiler, {compiler}")
    words = [os.environ.get("CC", "cc"), "-Wall", "-Werror", "-shared", "-fPIC", source]
    subprocess.run([*words, "-o", folder / "libaio.so"], check=True)
    places = {"CPATH": LIBAIO.parent, "LIBRARY_PATH": folder, "LD_LIBRARY_PATH": folder}
    return {
        name: os.pathsep.join(filter(None, (str(place), os.environ.get(name))))
        for name, place in places.items()
    }


@pytest.fixture(scope="module")
def built(environment, tmp_path_factory):
    """Build the extensions into the folder of the session, which takes minutes.

    The libaio is that of the machine, or our own where there is none.

    Returns:
        The environment variables with which the extensions are found.
    """
    variables, missing = {}, []
    with contextlib.suppress(SystemExit):  # the kernel refuses: so says the build below
        missing = tool.find_missing()
    if any("libaio" in one for one in missing):
        variables = libaio_variables(tmp_path_factory.mktemp("libaio"))
    command = [sys.executable, "-m", "tools.nvme", "build", "--minutes", "120"]
    streams = {"env": environment | variables, "cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(command, **streams)
    if "the kernel refuses io_setup" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"async_io\.so, [\d,]+ bytes\n", done.stdout) or "are built" in done.stdout
    return variables


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a model whose weights are large enough for DeepSpeed to swap, and its data."""
    folder = tmp_path_factory.mktemp("nvme")
    data = make_data(folder / "data", train=16, validation=4, noise=0.3)
    model = make_model(folder / "llama", "llama", **BIG)
    words = ("--model_name_or_path", model, "--dataset_name", data)
    return (*words, "--max_steps", UPDATES, "--per_device_train_batch_size", 2)


def write_config(folder, zero=None, **blocks):
    """Write a variant of configs/zero3_nvme.yaml; return its path."""
    name = "configs/deepspeed/zero3_nvme.json"
    content = json.loads((ROOT / name).read_text()) | blocks
    content["zero_optimization"] |= zero or {}
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(content))
    config = folder / "nvme.yaml"
    config.write_text((ROOT / "configs/zero3_nvme.yaml").read_text().replace(name, str(file)))
    return config


def read_run(folder):
    """Return the losses of a run, and its weights."""
    losses = json.loads((folder / "metrics.json").read_text())["losses"]
    return losses, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def reference(launch, flags, tmp_path_factory):
    """Return a function that trains with zero3_offload, once per precision."""

    @functools.cache
    def run(precision):
        folder = tmp_path_factory.mktemp("reference") / "run"
        words = {"flags": ("--mixed_precision", precision)}
        launch(SCRIPT, "zero3_offload", *flags, "--output_dir", folder, **words)
        return read_run(folder)

    return run


CPU, NONE = {"device": "cpu"}, {"device": "none"}
FEW = {"stage3_param_persistence_threshold": 10**9, "stage3_model_persistence_threshold": 10**5}
VARIANTS = {  # name -> precision, changes of zero_optimization
    "as shipped": ("no", {}),
    "bf16": ("bf16", {}),
    "optimizer alone": ("no", {"offload_param": NONE}),
    "optimizer alone, weights on the CPU": ("no", {"offload_param": CPU}),
    "weights alone, optimizer on the CPU": ("no", {"offload_optimizer": CPU}),
    "few weights stay gathered": ("no", FEW),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_like_zero3_offload(built, launch, flags, reference, tmp_path, variant):
    precision, changes = VARIANTS[variant]
    drive, facts = tmp_path / "drive", tmp_path / "facts.json"
    drive.mkdir()
    words = (facts, ROOT / f"examples/{SCRIPT}.py", *flags, "--output_dir", tmp_path / "run")
    options = {"flags": ("--mixed_precision", precision), "real": True, "NVME_PATH": str(drive)}
    config = write_config(tmp_path, changes) if changes else "zero3_nvme"
    output = launch(ROOT / "tests/nvme_driver.py", config, *words, **options, **built).stdout
    losses, tensors = read_run(tmp_path / "run")
    assert losses == pytest.approx(reference(precision)[0], rel=1e-6)
    for name, values in reference(precision)[1].items():
        torch.testing.assert_close(tensors[name], values, rtol=1e-5, atol=1e-6)
    found = json.loads(facts.read_text())
    assert len(found["folders"]) == 1 and [*drive.iterdir()] == []
    assert (found["on_drive"] >= 6) == ("offload_param" not in changes) and found["equal"]
    assert (found["states"] == 3) == ("offload_optimizer" not in changes)
    if found["states"]:
        own = found["own_bytes"]
        assert all(own <= size <= own + 1024 for size in found["state_bytes"])
        assert found["masters_equal"]
    told = int(re.search(r"up to ([\d,]+) bytes of swap files", output)[1].replace(",", ""))
    assert 0.7 * told <= found["files_bytes"] <= told


@pytest.mark.slow
def test_a_run_takes_the_settings_that_the_tuner_finds(built, environment, launch, flags, tmp_path):
    drive, values = tmp_path / "a drive: fast", tmp_path / "values.json"
    drive.mkdir()
    one = {"block_size": ["1M"], "sequential_requests": [False], "single_submit": [False]}
    values.write_text(json.dumps(one | {"queue_depth": [8, 16], "io_parallel": [2]}))
    words = ["tune", drive, "--size", "4M", "--values", values]
    done = subprocess.run(
        [sys.executable, "-m", "tools.nvme", *map(str, words)],
        cwd=ROOT,
        env=environment | built,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Timing 2 combinations" in done.stdout and "Best performance (GB/sec)" in done.stdout
    blocks = json.loads("{" + done.stdout.partition("\n\n")[2] + "}")
    assert blocks["aio"].pop("queue_depth") in (8, 16)
    expected = {"block_size": 2**20, "intra_op_parallelism": 2, "single_submit": False}
    assert blocks["aio"] == expected | {"overlap_events": True}
    config = write_config(tmp_path, **blocks)
    words = (*flags, "--max_steps", 1, "--output_dir", tmp_path / "run")
    output = launch(SCRIPT, config, *words, real=True, NVME_PATH=str(drive), **built).stdout
    assert "bytes of swap files" in output and [*drive.iterdir()] == []


def start(environment, flags, drive, output):
    """Start a long run; return it once it has swap files of the optimizer."""
    config = ROOT / "configs/zero3_nvme.yaml"
    words = [*ACCELERATE, "--config_file", config, ROOT / f"examples/{SCRIPT}.py", *flags]
    words = [sys.executable, *words, "--max_steps", 10_000, "--output_dir", output]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment | {nvme.VARIABLE: str(drive)},
        start_new_session=True,
        # a job in the background would ignore Ctrl+C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )
    begin = time.monotonic()
    while not [*drive.glob("run-*/zero_stage_3/optimizer/rank*/exp_avg*")]:
        assert process.poll() is None and time.monotonic() - begin < LIMIT
        time.sleep(0.2)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(built, environment, flags, tmp_path, number):
    process = start(environment | built, flags, tmp_path, tmp_path.with_name("output"))
    # a terminal sends Ctrl+C to all processes
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.wait(120)
    begin = time.monotonic()
    while [*tmp_path.iterdir()] and time.monotonic() - begin < 60:
        time.sleep(0.2)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_the_next_run_removes_what_sigkill_left(built, environment, launch, flags, tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    process = start(environment | built, flags, drive, tmp_path / "killed")
    [lock] = drive.glob(".run-*.lock")
    with open(lock, "r+") as file, pytest.raises(OSError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # the processes first: without their launcher they would get SIGTERM
    for one in psutil.Process(process.pid).children(recursive=True):
        one.kill()
    process.kill()
    process.wait(60)
    assert [*drive.glob("run-*/zero_stage_3")]
    words = (*flags, "--output_dir", tmp_path / "next")
    output = launch(SCRIPT, "zero3_nvme", *words, NVME_PATH=str(drive), real=True, **built).stdout
    assert "Removed 1 swap folder(s) of killed runs" in output
    assert [*drive.iterdir()] == []


@pytest.mark.slow
def test_cells_of_the_compatibility_table(built, environment, tmp_path):
    sample = [f"{row}/zero3_nvme" for row in ("lora", "base_4bit")]
    done = subprocess.run(
        [sys.executable, "-m", "tools.compatibility", "--folder", tmp_path, "--only", *sample],
        cwd=ROOT,
        env=environment | built,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    committed = json.loads(RESULTS.read_text())["cells"]

    def answers(cell, facts):
        return status(judge(cell, facts, committed[f"{cell.split('/')[0]}/single"]), facts)

    for cell in sample:
        measured = json.loads(cell_file(tmp_path, cell).read_text())
        assert answers(cell, measured) == answers(cell, committed[cell]), done.stdout
