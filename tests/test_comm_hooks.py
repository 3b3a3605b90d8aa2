"""DDP's communication hooks: they send what they say, and the model learns as with plain DDP."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics
from models import make_data, make_model
from processes import plant
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from benchmarks.traffic import adapted, bytes_sent, counting
from utils import traffic

LESSON, LORA = "causal_lm_full_ddp_compressed", "causal_lm_lora"


class Config(SimpleNamespace):
    power_sgd_rank = 4  # the default


def compress(precision="no", processes=2, **given):
    accelerator = SimpleNamespace(
        mixed_precision=precision, num_processes=processes, ddp_handler=None
    )
    traffic.compress_gradients(accelerator, Config(**{"power_sgd_rank": 4} | given))
    return accelerator.ddp_handler


@pytest.mark.parametrize(
    ("precision", "given", "wanted"),
    [
        ("no", {"comm_hook": "bf61"}, "--comm_hook is 'bf61': choose one of no, bf16, power_sgd"),
        ("no", {"comm_hook": "no", "power_sgd_rank": 0}, "--power_sgd_rank is 0: give a number"),
        ("fp16", {"comm_hook": "power_sgd"}, "or give --comm_hook bf16"),
    ],
)
def test_refusals(capsys, precision, given, wanted):
    with pytest.raises(SystemExit, match="1"):
        compress(precision, **given)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and wanted in line


def test_flags_without_an_effect_are_printed(capsys):
    compress("fp16", comm_hook="bf16")
    assert capsys.readouterr().out == ""
    compress(comm_hook="bf16", power_sgd_rank=3)
    assert "--power_sgd_rank 3: unused without --comm_hook power_sgd." in capsys.readouterr().out
    compress(comm_hook="power_sgd", processes=1)
    assert "--comm_hook power_sgd: unused, because a single" in capsys.readouterr().out


SHAPES = [(), (0,), (7,), (8, 160), (160, 8), (64, 64), (32, 4, 4), (1, 512), (300, 256)]


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 100])
def test_the_plan_is_that_of_power_sgd(rank):
    for shape in SHAPES[2:]:
        matrix = torch.zeros(shape).view(shape[0], -1)
        used = min(*matrix.shape, rank)
        compresses, _, numbers = powerSGD_hook._should_compress(*matrix.shape, used, 2)
        wanted = numbers if compresses else 0
        assert traffic.compressed_numel(torch.zeros(shape), rank) == wanted, shape
    parameters = [torch.zeros(shape) for shape in SHAPES]
    highest = max(map(traffic.highest_rank, parameters))
    assert [bool(traffic.compressed_numel(parameters[-1], highest + n)) for n in (0, 1)] == [1, 0]


def test_what_is_printed():
    lora = [torch.zeros(8, 160), torch.zeros(160, 8)]
    assert traffic.describe("no", 0, lora) == (
        "Gradients of an update: 10,240 bytes, sent uncompressed."
    )
    assert traffic.describe("bf16", 0, lora).endswith("sent as 5,120 bytes in bf16.")
    told = traffic.describe("power_sgd", 2, lora)
    assert "sent as 2,688 bytes from update 3 on" in told and "compresses 2 of 2 tensors." in told
    told = traffic.describe("power_sgd", 4, lora)
    assert "sent as 10,240 bytes" in told and told.endswith("0 of 2 tensors: give 3 or less.")
    told = traffic.describe("power_sgd", 1, [torch.zeros(9)])
    assert told.endswith("0 of 1 tensors: they are too small for any rank.")


def connect():
    server = socket.create_server(("127.0.0.1", 0))
    return server, socket.create_connection(server.getsockname()), server.accept()[0]


def test_bytes_that_wait_in_a_socket_are_counted():
    server, ours, theirs = connect()
    ours.setblocking(False)
    before, given = bytes_sent(), 0
    with contextlib.suppress(BlockingIOError):  # the socket is full
        while True:
            given += ours.send(bytes(100_000))
    assert bytes_sent() - before == given
    for one in (server, ours, theirs):
        one.close()


SEND_AGAIN = """
import subprocess, time
from test_comm_hooks import bytes_sent, connect
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
server, ours, theirs = connect()
before = bytes_sent()
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
ours.sendall(bytes(5_000))
time.sleep(1)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
received = 0
while received < 5_000:
    received += len(theirs.recv(5_000))
print(bytes_sent() - before)
"""


def test_bytes_that_are_sent_again_are_counted_once():
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs ip and unshare")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made")
    paths = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}"
    command = [*alone, sys.executable, "-c", paths + SEND_AGAIN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "5000", done.stderr


def test_hooks_send_what_they_say(launch, tmp_path):
    """Several buckets, a gradient of zeros, experts that one process skips, accumulation."""
    file = tmp_path / "found.json"
    done = launch(ROOT / "tests/traffic_driver.py", "ddp", file, processes=2, PYTHONPATH=str(ROOT))
    found = json.loads(file.read_text())
    told = re.findall(
        r"^Gradients of an update: ([\d,]+) bytes, sent (?:as ([\d,]+))?", done.stdout, re.M
    )
    told = {hook: int((sent or full).replace(",", "")) for hook, (full, sent) in zip(found, told)}
    assert told["bf16"] == told["no"] / 2 and told["power_sgd"] < told["no"] / 20
    _, after = found["power_sgd"]["compressed"]
    assert told["power_sgd"] == 4 * after
    plain = found["no"]
    for hook, one in found.items():
        # what else is sent: headers, and which parameters were not used (4 bytes for each)
        assert told[hook] <= one["sent"] <= told[hook] + 6_000, hook
        assert one["equal"], hook
        assert one["losses"][0] == plain["losses"][0] and one["losses"][-1] < one["losses"][0]
        tolerance = {"no": 0, "bf16": 1e-2, "power_sgd": 0.5}[hook]
        assert one["norms"] == pytest.approx(plain["norms"], rel=tolerance), hook
        assert hook == "no" or one["losses"][1:] != plain["losses"][1:]
    first = slice(0, traffic.FIRST)
    assert found["power_sgd"]["norms"][first] == pytest.approx(plain["norms"][first], rel=1e-5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The flags of a small model and its data."""
    folder = tmp_path_factory.mktemp("hooks")
    model, data = make_model(folder / "model", "llama"), make_data(folder / "data", train=64)
    return ("--model_name_or_path", model, "--dataset_name", data, "--learning_rate", 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("trained", ["all", "LoRA"])
def test_a_lesson_learns_as_with_plain_ddp(launch, inputs, tmp_path, trained, precision):
    copy = plant(tmp_path, LESSON if trained == "all" else LORA)
    copy.write_text(counting(copy.read_text() if trained == "all" else adapted(tmp_path)))
    flags = (*inputs, "--max_steps", 24, "--gradient_accumulation_steps", 2, "--power_sgd_rank", 2)
    runs = {}
    for hook in traffic.HOOKS:
        output = tmp_path / hook
        given = (*flags, "--comm_hook", hook, "--output_dir", output)
        options = {"processes": 2, "flags": ("--mixed_precision", precision)}
        done = launch(copy, "ddp", *given, **options, PYTHONPATH=str(ROOT))
        read = json.loads(re.search(r"^read (.*)$", done.stdout, re.MULTILINE)[1])
        metrics = read_metrics(output)
        assert metrics["strategy"] == "ddp" and metrics["config"]["comm_hook"] == hook
        runs[hook] = metrics | {"sent": (read[-1][0] - read[3][0]) / (len(read) - 4)}
        full, sent = re.search(
            r"of an update: ([\d,]+) bytes, sent (?:as ([\d,]+))?", done.stdout
        ).groups()
        told = int((sent or full).replace(",", ""))
        assert told < runs[hook]["sent"] < told + 6_000, hook  # and the counts for the log
        unused = "--power_sgd_rank 2: unused without --comm_hook power_sgd."
        assert (unused in done.stdout) == (hook != "power_sgd" and trained == "all")
    plain = runs["no"]
    assert runs["bf16"]["losses"] == pytest.approx(plain["losses"], rel=0.05)
    full = slice(0, traffic.FIRST + 1)  # the third loss comes before the third update
    assert runs["power_sgd"]["losses"][full] == pytest.approx(plain["losses"][full], rel=1e-4)
    for metrics in runs.values():
        assert metrics["losses"][-1] < 0.95 * metrics["losses"][0]
        scores = [one["scores"]["accuracy"]["after"] for one in (metrics, plain)]
        assert scores[0] >= scores[1] - 0.2


@pytest.mark.slow
def test_three_processes_and_one(launch, inputs, tmp_path):
    flags = (*inputs, "--max_steps", 5, "--output_dir")
    done = launch(LESSON, "ddp", *flags, tmp_path / "three", processes=3)
    assert "from update 3 on by PowerSGD with rank 4" in done.stdout
    done = launch(LESSON, "single", *flags, tmp_path / "one", processes=1)
    assert "--comm_hook power_sgd: unused, because a single process" in done.stdout
    for name in ("three", "one"):
        metrics = read_metrics(tmp_path / name)
        assert metrics["losses"][-1] < metrics["losses"][0]
