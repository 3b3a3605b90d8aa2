"""Check several machines before a run: do they reach each other, and do they have the same?

    python -m tools.preflight --config_file configs/multi_node/zero3_2x8.yaml \\
        --machine_rank 0 --main_process_ip 10.0.0.1 examples/chat_sft.py --output_dir outputs/chat

Start it on every machine at the same time, with the words that would follow `accelerate launch`.
The script is not run. First the machines meet at --main_process_ip and --main_process_port, and
wait for each other for 12 s (PREFLIGHT_SECONDS sets another number). Then accelerate's launcher
starts all processes, which connect as for a training. Machine 0 prints what it found, and a line
that begins with `differs:` for everything that is not the same on all machines. The exit code is 0
if the processes could connect and nothing differs.

Under another launcher, as in `torchrun ... -m tools.preflight`, only the second part runs. Before
it, such a launcher may wait for minutes for a machine that does not come.
"""

import logging
import os
import sys
import threading

from tools.preflight.facts import gather_facts
from tools.preflight.meeting import Machine, MeetingError, meet
from tools.preflight.report import print_report

SECONDS = 12  # default of PREFLIGHT_SECONDS
LAUNCH_LIMIT = 60  # seconds; the processes give up before
MET = "PREFLIGHT_MET"  # set for the launched processes: the facts were compared before
RENDEZVOUS = 20  # seconds


def main():
    if "LOCAL_RANK" in os.environ:
        from tools.preflight.processes import check_processes  # imports torch

        # without the cleanup of torch, which waits for processes that failed
        flush_and_exit(check_processes(output_dir(sys.argv[1:]), with_facts=MET not in os.environ))
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        return print(f"{__doc__}\n`accelerate launch --help` lists the flags of the launcher.")
    logging.disable(logging.CRITICAL)  # what the launcher logs is said here in other words
    wait = os.environ.get("PREFLIGHT_SECONDS", str(SECONDS))
    if not wait.isdigit():
        end(f"PREFLIGHT_SECONDS is {wait!r}: give a number of seconds")
    args, machine = read_words(sys.argv[1:])
    try:
        facts = gather_facts(machine.machines, machine.processes)
        output = output_dir(args.training_script_args)
        reports, is_same = meet(machine, facts, output, int(wait))
    except MeetingError as error:
        end(str(error))
    if machine.rank == 0:
        print_report(reports)
    if not launch(args):
        end("the processes of all machines could not connect: see the lines above")
    if not is_same:
        end("the machines differ: see the lines with `differs:` on machine 0")


def end(message):
    """Print `error: message` and end with code 1."""
    print(f"error: {message}", file=sys.stderr)
    flush_and_exit(1)


def flush_and_exit(code):
    """End this process, whatever its threads and its process group do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_words(words):
    """Return the launcher's arguments, with its config file read, and the Machine."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    # the launcher needs a script; one that the user gave stays the first
    args = launch_command_parser().parse_args([*words, "tools.preflight"])
    try:
        args, *_ = _validate_launch_command(args)
    except (ValueError, OSError) as error:
        end(f"accelerate launch does not take these words: {error}")
    machines, processes = args.num_machines or 1, args.num_processes
    if machines < 2:
        end("--num_machines is 1: the preflight compares several machines")
    if processes < machines or processes % machines:
        end(
            f"--num_processes is {processes}, the number on all machines together: give a multiple "
            f"of --num_machines {machines}"
        )
    if args.rdzv_backend != "static":
        end(
            f"--rdzv_backend {args.rdzv_backend} does not give the machines ranks: leave it out, "
            "as the configs of configs/multi_node do"
        )
    if not args.main_process_ip:
        end("--main_process_ip is missing: give the address of machine 0, the same everywhere")
    rank, port = int(args.machine_rank or 0), args.main_process_port or 29500
    if rank not in range(machines):
        end(f"--machine_rank is {rank}: give 0 to {machines - 1}, another one on each machine")
    args.main_process_port = port
    # all strategies connect in the same way
    for strategy in ("use_deepspeed", "use_fsdp", "use_megatron_lm", "use_parallelism_config"):
        setattr(args, strategy, False)
    return args, Machine(rank, machines, processes, args.main_process_ip, int(port))


def output_dir(words):
    """Return the value of --output_dir among the arguments of a script; "" without one."""
    for number, word in enumerate(words):
        if word == "--output_dir" and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--output_dir="):
            return word.partition("=")[2]
    return ""


def launch(args):
    """Start this machine's processes through accelerate; return whether they could connect."""
    from accelerate.commands.launch import multi_gpu_launcher

    os.environ[MET] = "1"
    args.module, args.no_python, args.training_script = True, False, "tools.preflight"
    args.rdzv_conf = f"timeout={RENDEZVOUS}"
    alarm = threading.Timer(LAUNCH_LIMIT, end, ["the launcher did not end in time"])
    alarm.daemon = True
    alarm.start()
    try:
        multi_gpu_launcher(args)
    except Exception as error:  # whatever a library raises; a failed process has said why
        if type(error).__name__ != "ChildFailedError":
            print(f"error: the launcher says: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    finally:
        alarm.cancel()
    return True
