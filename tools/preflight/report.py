"""Print what machine 0 has learnt: a line per machine, notes, and a line per difference."""

from tools.preflight.facts import LAUNCHED, differences

CLOCK = 1.0  # seconds by which clocks may differ without a note
GIB = 2**30
# name of a folder -> what follows if machines do not share it
CONSEQUENCES = {
    "output folder": "checkpoints need one folder for all machines; without them, machine 0 writes",
    "Hugging Face cache": "each machine downloads the model and the data",
    "compiled extensions": "each machine compiles them in its first run",
}


def print_report(reports):
    """Print a line per machine, then notes, then what differs."""
    for report in reports:
        facts = report.facts
        free, total = (number / GIB for number in facts["memory"])
        print(
            f"{report.name()} at {report.address}: {facts['cores']} cores, {free:.0f} of "
            f"{total:.0f} GiB of memory free, GPUs: {facts['same']['GPUs']}, clock "
            f"{round(1000 * report.clock):+d} ms",
            flush=True,
        )
    for line in notes(reports):
        print(f"note: {line}", flush=True)
    told = differences(reports)
    for line in told:
        print(f"differs: {line}", flush=True)
    if not told:
        same = reports[0].facts["same"]
        print(
            f"same on all machines: {len(same)} facts, among them torch {same['torch']} and the "
            f"files of this repository ({same['files of this repository']})",
            flush=True,
        )


def notes(reports):
    """Return a line for each thing that a run may or may not need."""
    first, lines = reports[0], []
    for report in reports:
        if abs(report.clock) > CLOCK:
            lines.append(f"the clock of {report.name()} is off by {report.clock:+.1f} s")
        if 2 * report.facts["memory"][0] < max(other.facts["memory"][0] for other in reports):
            lines.append(f"{report.name()} has less than half of the free memory of another")
        machines, processes = (report.facts["same"][name] for name in LAUNCHED)
        if (number := report.facts["number of GPUs"]) > processes // machines:
            lines.append(
                f"{report.name()} has {number} GPUs and runs {processes // machines} processes: "
                "--num_processes counts the GPUs of all machines"
            )
        for name, found in report.shared.items():
            if isinstance(found, str):
                lines.append(f"{name} of {report.name()}: {found}")
    for name, consequence in CONSEQUENCES.items():
        others = [report.name() for report in reports if report.shared.get(name) is False]
        if others:
            told = f"not the same folder on {first.name()} and on {', '.join(others)}"
            lines.append(f"{name}: {told}: {consequence}")
        elif all(report.shared.get(name) is True for report in reports):
            lines.append(f"{name}: the same folder on all machines")
    return lines
