"""Draw memory.png and losses.png."""

import torch
from accelerate import PartialState

MB = 2**20


def gpu_total() -> int:
    """Return the bytes of memory of this process's GPU; 0 without one."""
    on_gpu = PartialState().device.type == "cuda"
    if not on_gpu:
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def draw_memory(memory: dict[str, list[dict[str, int]]], limit: int = 0):
    """Return a matplotlib Figure: a group of bars per process, a bar per phase.

    There is a panel for the GPU only where one was used.

    Args:
        memory: what `MemoryTracker.gather` returned, with at least one phase.
        limit: bytes, drawn as a line in the panel of the GPU; 0: no line.
    """
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend

    processes = len(next(iter(memory.values())))
    used_gpu = any(entry["gpu_peak"] for entries in memory.values() for entry in entries)
    kinds = ("gpu", "cpu") if used_gpu else ("cpu",)
    inches = min(max(6.5, 0.15 * processes * len(memory)), 24)  # a PNG 650 to 2400 pixels wide
    figure = Figure(figsize=(inches, 1 + 3 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(memory)
    for kind, panel in zip(kinds, panels):
        for number, (name, entries) in enumerate(memory.items()):
            begin, end, peak = (
                [entry[f"{kind}_{moment}"] / MB for entry in entries]
                for moment in ("begin", "end", "peak")
            )
            center = [rank + (number + 0.5) * width - 0.4 for rank in range(processes)]
            panel.bar(center, peak, width, color=f"C{number}", alpha=0.6, label=name)
            panel.hlines(begin, [x - width / 2 for x in center], center, color="black")
            panel.hlines(end, center, [x + width / 2 for x in center], color="black")
        if kind == "gpu" and limit:
            panel.axhline(limit / MB, color="red", linestyle="--", label="GPU total")
        panel.set_ylabel(f"{kind.upper()} memory (MB)")
        panel.set_ylim(bottom=0)
        panel.margins(x=0.01)
        panel.set_xticks(range(0, processes, 1 + processes // 17))
    panels[-1].set_xlabel("process")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=5,
        title="bar: peak of the phase; its left line: at the begin, its right line: at the end",
    )
    return figure


def draw_losses(progress):
    """Return a matplotlib Figure of the training loss, and of the held-out scores if there are."""
    from matplotlib.figure import Figure

    names = [name for name in (progress.evaluations or [{}])[0] if name not in ("step", "epoch")]
    figure = Figure(figsize=(6.5, 3 + 2 * len(names)), layout="constrained")
    panels = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
    steps = [update["step"] for update in progress.updates]
    panels[0].plot(steps, [update["loss"] for update in progress.updates])
    panels[0].set_ylabel("training loss")
    for panel, name in zip(panels[1:], names):
        steps = [entry["step"] for entry in progress.evaluations]
        panel.plot(steps, [entry[name] for entry in progress.evaluations], marker="o")
        panel.set_ylabel(f"held-out {name}")
    panels[-1].set_xlabel("update")
    return figure
