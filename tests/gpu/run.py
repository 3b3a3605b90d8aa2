"""Run the steps that test all scripts on a GPU. tests/gpu/run.sh starts this and explains its use.

Every step is a process with its own time limit and log. A failing step does not stop the others.
The exit code is 0 only if all steps passed.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/gpu"
TOTAL = {"correct": 280, "speed": 225}  # seconds for all steps, without installing wheels
PYTEST = ("-m", "pytest", "-o", "addopts=-rs", "-p", "no:cacheprovider", "-q")
CPU_ADAM = """
from deepspeed.ops.op_builder import CPUAdamBuilder
CPUAdamBuilder().load(verbose=False)
"""
VERSIONS = """
import importlib.metadata, platform, torch
names = "torch triton transformers accelerate peft deepspeed bitsandbytes datasets trl liger-kernel"
for name in names.split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
size = torch.cuda.get_device_properties(0).total_memory / 1e9
device = torch.cuda.get_device_name()
(torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum().item()
print(f"{device}, {size:.0f} GB, Python {platform.python_version()}, torch {torch.__version__}")
"""

# step of tests/gpu/steps.py -> limit in seconds; the most important steps come first
CORRECT = {
    "chat_lora_bf16": 100,
    "chat_qlora_bf16": 100,
    "chat_full_bf16": 100,
    "chat_lora_fp16": 100,
    "two_ddp": 130,
    "two_zero3": 130,
    "two_fsdp2": 130,
    "two_fsdp1": 130,
    "two_fsdp1_qlora": 130,
    "two_fsdp2_qlora": 130,
    "two_chat_ddp": 130,
    "two_chat_zero3": 130,
    "two_chat_fsdp2": 130,
    "causal_lm_full": 90,
    "causal_lm_lora": 90,
    "causal_lm_qlora": 90,
    "seq2seq_lora": 90,
    "causal_lm_lora_resume": 90,
    "causal_lm_full_zero2_config": 90,
    "causal_lm_full_zero3": 100,
    "causal_lm_qlora_zero3": 100,
    "chat_zero2_bf16": 100,
    "resume_chat": 150,
    "resume_lesson": 150,
    "two_zero3_offload": 160,
    "two_fsdp2_offload": 130,
    "causal_lm_lora_zero3_offload": 130,
    "seq2seq_lora_zero3_offload": 130,
    "memory_falls": 160,
    "memory_qlora": 160,
    "offload_checkpoints": 160,
    "two_hooks": 160,
    "two_zero3_bf16": 130,
    "two_fsdp1_bf16": 130,
    "two_fsdp2_bf16": 130,
    "two_fsdp1_qlora_bf16": 130,
    "two_fsdp2_qlora_bf16": 130,
    "two_chat_fsdp2_bf16": 130,
    "guide_lora_zero3": 130,
    "guide_lora_fsdp": 130,
    "guide_qlora_zero3": 130,
    "guide_qlora_fsdp": 130,
    "liger": 150,
    "chat_compile_bf16": 200,
    "causal_lm_lora_fp16": 90,
    "chat_zero1_bf16": 100,
    "chat_zero3_bf16": 100,
    "two_zero2": 130,
    "two_zero3_qlora": 130,
    "two_seq2seq_fsdp1": 130,
    "zero3_plus": 250,  # compiles DeepSpeed's quantizer
}
SPEED = {"build": 75, "eager": 60, "compile": 120, "liger": 60, "checkpointing": 120, "trl": 80}


@dataclass
class Step:
    name: str
    limit: float  # seconds
    command: list  # a program and its arguments


def steps_of(mode, out, work):
    """Return the steps of a mode, in order."""
    python = sys.executable
    if mode == "speed":
        speed = [python, HERE / "speed.py"]
        return [Step(name, limit, [*speed, name, work, out]) for name, limit in SPEED.items()]
    steps = [Step("nvidia_smi", 20, ["nvidia-smi"]), Step("versions", 60, [python, "-c", VERSIONS])]
    for file in ("loss", "packing", "memory", "sharded_loading", "predict"):
        name = f"test_{file}_gpu"
        steps.append(Step(name, 120, [python, *PYTEST, HERE / f"{name}.py"]))
    # compiles the extension once, for all steps with offload
    steps.append(Step("cpu_adam", 200, [python, "-c", CPU_ADAM]))
    command = [python, HERE / "steps.py", work]
    return steps + [Step(name, limit, [*command, name]) for name, limit in CORRECT.items()]


def environment(work):
    """Return the environment variables of a step.

    They turn the network off, give the steps their own caches, and load tests/gpu/stacks, so that a
    hanging process can print its stacks.
    """
    import torch

    path = [str(HERE / "stacks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "huggingface"),
        "TEST_GPUS": str(torch.cuda.device_count()),
        "TORCH_EXTENSIONS_DIR": str(work / "torch_extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        # DeepSpeed builds with ninja, which is installed beside python
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def descendants(pid):
    """Return the ids of a process and of its living descendants."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end(process):
    """Let each Python process of a step write its stacks, then kill all processes of the step."""
    pids = descendants(process.pid)
    send(pids, signal.SIGUSR2)
    time.sleep(1)
    send(pids, signal.SIGKILL)
    process.wait()


def last_line(log, passed):
    """Return the last line of a log, or the first line with an error if the step failed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    told = lines[-1:] or [""]
    if not passed:
        errors = [line for line in lines if line.startswith("error: ")]
        pattern = r"(\[rank\d+\]: |E +)?[\w.]*(Error|Exception)\b"
        raised = [line for line in lines if re.match(pattern, line)]
        told = errors[:1] or raised[:1] or told
    return told[0][:200]


def run_steps(steps, out, work, jobs, seconds):
    """Run the steps, write their logs and out/summary.txt, and return name -> result.

    Args:
        jobs: number of parallel steps.
        seconds: time limit for all steps together.
    """
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    summary, results, running, waiting = out / "summary.txt", {}, {}, list(steps)
    summary.write_text("")
    begin, variables = time.monotonic(), environment(work)

    def finish(step, result, taken, said):
        results[step.name] = result
        line = f"{step.name:30} {result:8} {taken:6.1f}  {said}"
        print(line, flush=True)
        with summary.open("a") as file:
            file.write(line + "\n")

    while waiting or running:
        is_over = time.monotonic() - begin > seconds
        while waiting and is_over:
            finish(waiting.pop(0), "NOTRUN", 0, f"all steps together have {seconds} s")
        while waiting and len(running) < jobs:
            step = waiting.pop(0)
            log = logs / f"{step.name}.log"
            words = [str(word) for word in step.command]
            with log.open("w") as stream:
                stream.write(f"{shlex.join(words)}\n")
                stream.flush()
                streams = {"stdout": stream, "stderr": subprocess.STDOUT}
                try:
                    process = subprocess.Popen(words, cwd=ROOT, env=variables, **streams)
                except OSError as error:
                    finish(step, "FAIL", 0, str(error))
                    continue
            running[step.name] = (step, process, time.monotonic(), log)
        for step, process, started, log in list(running.values()):
            taken = time.monotonic() - started
            code = process.poll()
            if code is None and taken < step.limit and not is_over:
                continue
            del running[step.name]
            result = "TIMEOUT" if code is None else "FAIL" if code else "pass"
            said = last_line(log, result == "pass")
            if code is None:
                end(process)
            finish(step, result, taken, said)
        time.sleep(0.05)
    return results


def not_passed(summary):
    """Return the names of the steps that did not pass according to a summary.txt."""
    lines = [line.split() for line in Path(summary).read_text().splitlines()]
    return [words[0] for words in lines if words[1:2] != ["pass"]]


def dry_run(out, work):
    """Print all commands, import all Python files and collect the tests. Return an exit code."""
    for mode in ("correct", "speed"):
        print(f"\n{mode}: at most {TOTAL[mode]} s")
        for step in steps_of(mode, out, work):
            print(f"{step.name} (at most {step.limit} s): {shlex.join(map(str, step.command))}")
    print(flush=True)
    os.environ |= environment(work)
    os.chdir(ROOT)
    sys.path[:0] = [str(HERE), str(ROOT)]
    # everything runs in this process, which imports the libraries once
    import pytest
    import speed
    import steps

    code = 0
    for show, names in ((steps.show, CORRECT), (speed.show, SPEED)):
        for name in names:
            try:
                show(work, name)
            except (AssertionError, SystemExit, ValueError) as error:
                print(f"error: {name}: {error}")
                code = 1
    code |= int(pytest.main([*PYTEST[2:], "--collect-only", str(HERE)]))
    print("dry run: failed" if code else "dry run: every command printed, every file imported")
    return int(code != 0)


def pack_logs(out):
    """Pack the summary and all logs into one file, for machines that return few files."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for name in ("summary.txt", "speed.txt", "speed.json", "logs"):
            if (out / name).exists():
                archive.add(out / name, name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the logs and the summary")
    modes = ["correct", "rerun", "speed"]
    parser.add_argument("mode", nargs="?", default="correct", choices=modes)
    parser.add_argument("previous", nargs="?", type=Path, help="for rerun: the summary.txt to read")
    parser.add_argument("--dry-run", action="store_true", help="print commands, import files")
    parser.add_argument("--jobs", type=int, help="number of parallel steps")
    parser.add_argument("--limit", type=float, help="seconds for all steps together")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        if options.dry_run:
            return dry_run(out, work)
        is_speed = options.mode == "speed"
        steps = steps_of(options.mode, out, work)
        if options.mode == "rerun":
            previous = options.previous or out / "summary.txt"
            if not previous.is_file():
                parser.error(f"{previous} is not there: name the summary.txt of the run before")
            wanted = not_passed(previous)
            if not wanted:
                print(f"{previous}: every step passed")
                return 0
            if unknown := sorted(set(wanted) - {step.name for step in steps}):
                parser.error(f"{previous} is not of correct: it has {', '.join(unknown)}")
            # the extension is compiled again, because each run has its own build folder
            steps = [step for step in steps if step.name in (*wanted, "cpu_adam")]
        cores = os.cpu_count() or 1
        jobs = options.jobs or (1 if is_speed else max(1, min(10, cores * 5 // 8)))
        limit = options.limit or TOTAL["speed" if is_speed else "correct"]
        begin = time.monotonic()
        results = run_steps(steps, out, work, jobs, limit)
    missed = [name for name, result in results.items() if result != "pass"]
    seconds, passed = time.monotonic() - begin, len(results) - len(missed)
    print(f"{passed} of {len(results)} steps passed in {seconds:.0f} s")
    for name in missed[:6]:
        log = out / "logs" / f"{name}.log"
        if log.exists():
            tail = log.read_text(errors="replace")[-1200:]
            print(f"\n---- the end of {name}.log\n{tail}")
    if (out / "speed.txt").exists():
        print((out / "speed.txt").read_text())
    pack_logs(out)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
