"""The files in configs/multi_node: what they run, accelerate's and chat_sft's parsers accept."""

import base64
import re
import subprocess

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT
from test_models import load
from transformers import HfArgumentParser

LAUNCH = ROOT / "configs" / "multi_node"
RECORD = """#!/bin/bash
# one write, for two hosts record at the same time
printf '%s\\n' "$(printf '%s\\0' "$0" "$@" | base64 -w0)" >> "$RECORD"
"""


def accepted(words):
    """Return what accelerate's own parser makes of the words after `accelerate launch`."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return args


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_configs(strategy):
    config = LAUNCH / f"{strategy}_2x8.yaml"
    args = accepted(
        ["--config_file", str(config), "--machine_rank", "1", "--main_process_ip"]
        + ["10.0.0.1", "examples/chat_sft.py"]
    )
    assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 1)
    assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29500)
    assert args.rdzv_backend == "static"
    own = yaml.safe_load(config.read_text())
    alone = yaml.safe_load((ROOT / "configs" / f"{strategy}.yaml").read_text())
    several = {"num_machines": 2, "num_processes": 16, "main_process_port": 29500}
    assert own == alone | several


def run_recorded(tmp_path, script, **variables):
    """Run a shell script in a copy of the layout whose commands only record their words."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name in (".venv/bin/accelerate", ".venv/bin/python", "bin/accelerate", "bin/python"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    fakes = {"scontrol": 'printf "node7\\nnode8\\n"', "srun": NODES, "ssh": HOSTS}
    for name, body in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "RECORD": str(record), **variables}
    done = subprocess.run(
        ["bash", *script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = record.read_text().splitlines()
    return [base64.b64decode(line).decode().split("\0")[:-1] for line in lines]


# every node runs the command; options of srun come first
NODES = """while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done"""
HOSTS = 'bash -c "${@: -1}"'


def check_commands(commands, address):
    """Check the preflight and the launch of two machines; return the parsed launches."""
    ranks = {"preflight": [], "launch": []}
    parsed = []
    for program, *words in commands:
        kind = "preflight" if program.endswith("python") else "launch"
        assert words[: 2 if kind == "preflight" else 1] == (
            ["-m", "tools.preflight"] if kind == "preflight" else ["launch"]
        )
        words = words[2:] if kind == "preflight" else words[1:]
        words[words.index("--config_file") + 1] = str(
            ROOT / words[words.index("--config_file") + 1]
        )
        args = accepted(words)
        assert (args.num_machines, args.num_processes) == (2, 16)
        assert args.main_process_ip == address and args.mixed_precision == "bf16"
        assert args.training_script == "examples/chat_sft.py"
        ranks[kind].append(args.machine_rank)
        parsed.append(args)
    assert {kind: sorted(found) for kind, found in ranks.items()} == {
        "preflight": [0, 1],
        "launch": [0, 1],
    }
    return parsed


def chat_flags(args):
    """Check that chat_sft takes the arguments of a launch."""
    parser = HfArgumentParser(load("chat_sft").Config)
    return parser.parse_args_into_dataclasses(args.training_script_args)


def test_slurm(tmp_path):
    variables = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLURM_CPUS_PER_TASK": "64"}
    script = LAUNCH / "slurm.sh"
    commands = run_recorded(tmp_path, [script], **variables, SLURM_GPUS_ON_NODE="8")
    for args in check_commands(commands, "node7"):
        chat_flags(args)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (
        ("2", "1", "8")
    )


def test_ssh(tmp_path):
    words = ["--config_file", "configs/multi_node/zero3_2x8.yaml", "--mixed_precision", "bf16"]
    words += ["examples/chat_sft.py", "--output_dir", "a folder"]
    script, commands = [LAUNCH / "ssh.sh", "10.0.0.1 10.0.0.2", *words], []
    for number, preflight in enumerate(("0", "1")):
        folder = tmp_path / str(number)
        folder.mkdir()
        commands += run_recorded(folder, script, PREFLIGHT=preflight)
    for args in check_commands(commands, "10.0.0.1"):
        assert args.training_script_args == ["--output_dir", "a folder"]


def test_ssh_fails_if_a_host_fails(tmp_path):
    (tmp_path / "ssh").write_text('#!/bin/bash\nsleep 0.2\nif [ "$2" = b ]; then exit 3; fi\n')
    (tmp_path / "ssh").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for hosts, code in (("a c", 0), ("a b", 1), ("b a", 1)):
        command = ["bash", LAUNCH / "ssh.sh", hosts, "examples/minimal.py"]
        assert subprocess.run(command, env=environment).returncode == code, hosts


def test_kubernetes(tmp_path):
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and "ports" not in service["spec"]
    # Kubernetes itself sets this label on the pods of a job
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    [container] = pod["containers"]
    assert {"name", "image", "command", "args"} <= set(container)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["shared-memory"] == "/dev/shm"
    assert container["command"] == ["bash", "-euc"]
    commands = []
    for rank in "01":
        folder = tmp_path / rank
        folder.mkdir()
        script = ["-euc", *container["args"]]
        commands += run_recorded(folder, script, JOB_COMPLETION_INDEX=rank)
    for args in check_commands(commands, f"{name}-0.{pod['subdomain']}"):
        chat_flags(args)


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"].endswith(":8")
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run"}
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    commands = []
    for rank in "01":
        folder = tmp_path / rank
        folder.mkdir()
        script = ["-c", task["run"]]
        commands += run_recorded(folder, script, SKYPILOT_NODE_RANK=rank, **variables)
    for args in check_commands(commands, "10.0.0.1"):
        assert chat_flags(args)[0].output_dir.startswith(next(iter(task["volumes"])))
