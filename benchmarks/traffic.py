"""Measure what DDP sends per update, with each communication hook, and what the model learns.

Run:  python benchmarks/traffic.py [--max_steps 150] [--ranks 4 1]

causal_lm_full_ddp_compressed.py trains all weights on two processes, and causal_lm_lora.py, with
the change of docs/adapt.md, LoRA. The bytes are those that one process hands to its TCP sockets
during 20 updates, as Linux counts them, divided by 20; counting begins after the second update,
from which on PowerSGD compresses. They contain all that the loop sends, such as counts for the log.
The score is that of the script on the held-out rows. The processes share one machine, where sending
costs nothing: the seconds show what compressing costs.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_run import ACCELERATE, cpu
from utils.traffic import FIRST

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, ADAPTED = "causal_lm_full_ddp_compressed", "causal_lm_lora"
COUNTED = 20  # updates
NOT_SENT, SENT = 144, 200  # offsets of tcpi_notsent_bytes and tcpi_bytes_sent in struct tcp_info
LOOP = "    # 6. Training loop -"
UPDATE = "            scheduler.step()\n"
END = "    progress.finish(metrics, samples)\n"
READ = "    import json, time\n    from benchmarks.traffic import bytes_sent\n    read = []\n"
COUNT = "            read.append((bytes_sent(), time.perf_counter()))\n"
TELL = "    if accelerator.is_main_process:\n        print('read', json.dumps(read))\n"


def bytes_sent():
    """Return the number of bytes that this process has handed to its open TCP sockets.

    Linux counts a byte that it sends again twice, and does not count what waits in the socket.
    """
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed in the meantime, or not a TCP socket
            continue
        sent, again = struct.unpack_from("2Q", info, SENT)
        total += sent - again + struct.unpack_from("I", info, NOT_SENT)[0]
    return total


def counting(text):
    """Return a lesson that also prints, after each update, the bytes sent and the time."""
    for line, new in ((LOOP, READ + LOOP), (UPDATE, UPDATE + COUNT), (END, END + TELL)):
        assert text.count(line) == 1, line
        text = text.replace(line, new)
    return text


def adapted(folder):
    """Return the LoRA lesson with the change of docs/adapt.md that adds the hooks."""
    document = (ROOT / "docs/adapt.md").read_text()
    diffs = re.findall(r"^```diff\n(.+?)^```$", document, re.MULTILINE | re.DOTALL)
    [diff] = [diff for diff in diffs if "compress_gradients" in diff]
    file = shutil.copy(ROOT / f"examples/{ADAPTED}.py", folder / f"{ADAPTED}.py")
    subprocess.run(["patch", "--quiet", file], input=diff, text=True, check=True)
    return Path(file).read_text()


def run(script, output, hook, rank, max_steps):
    """Launch a counting lesson on two processes; return its readings and its metrics."""
    command = [sys.executable, *ACCELERATE, "--config_file", "configs/ddp.yaml", script]
    command += ["--comm_hook", hook, "--max_steps", max_steps, "--output_dir", output]
    command += ["--power_sgd_rank", rank] if hook == "power_sgd" else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = list(map(str, command))
    options = {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment, **options)
    lines = [line for line in done.stdout.splitlines() if line.startswith("read ")]
    if done.returncode or not lines:
        sys.exit(f"error: {script} failed:\n{done.stdout}{done.stderr}")
    metrics = json.loads((output / "metrics.json").read_text())
    return json.loads(lines[0].removeprefix("read ")), metrics


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_steps", type=int, default=150, help="updates of each run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 1], help="ranks of PowerSGD")
    options = parser.parse_args()
    if options.max_steps < FIRST + COUNTED:
        parser.error(f"--max_steps is {options.max_steps}: give {FIRST + COUNTED} or more")
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu()}, two processes, gloo")
    print("trained  hook       rank  bytes per update  held-out accuracy  median s per update")
    hooks = [("no", "-"), ("bf16", "-"), *(("power_sgd", rank) for rank in options.ranks)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = {"all": (ROOT / f"examples/{SCRIPT}.py").read_text(), "LoRA": adapted(folder)}
        for trained, text in texts.items():
            script = folder / f"{trained}.py"
            script.write_text(counting(text))
            for hook, rank in hooks:
                output = folder / f"{trained}_{hook}_{rank}"
                read, metrics = run(script, output, hook, rank, options.max_steps)
                sent, times = zip(*read)
                each = (sent[FIRST + COUNTED - 1] - sent[FIRST - 1]) / COUNTED
                seconds = statistics.median(
                    b - a for a, b in zip(times[FIRST:], times[FIRST + 1 :])
                )
                score = metrics["scores"]["accuracy"]["after"]
                line = f"{trained:8} {hook:10} {rank:>4} {each:17,.0f} {score:18.4f}"
                print(f"{line} {seconds:20.3f}", flush=True)


if __name__ == "__main__":
    main()
