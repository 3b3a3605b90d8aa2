"""Parameters and optimizer on NVMe (ZeRO-Infinity): checks, sizes of buffers, a folder per run.

DeepSpeed writes its swap files into the folder `nvme_path` and never removes them. Here every run
gets a folder of its own, `PATH/run-...`, which is removed when the run ends, by whatever but
SIGKILL. What a killed run has left, the next run removes.
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import math
import mmap
import os
import resource
import secrets
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import psutil
from accelerate.utils import broadcast_object_list
from torch.utils import cpp_extension

from utils.errors import or_refuse, refuse, say
from utils.launch_checks import free_extension_lock
from utils.sharded_loading import engine_dtype

VARIABLE = "NVME_PATH"
PARTS = ("offload_optimizer", "offload_param")
EXTENSIONS = ("pin_memory", "async_io")
BUILD = "build it once with `python -m tools.nvme build`"
# keys of the block "aio" -> kind of their values; DeepSpeed drops other keys in silence
AIO = {"block_size": int, "queue_depth": int, "intra_op_parallelism": int}
AIO |= {"single_submit": bool, "overlap_events": bool, "use_gds": bool}
ALIGNED = 1024  # bytes: sizes and places of DeepSpeed's reads and writes are multiples of it
LEAST = 2**20  # bytes: DeepSpeed keeps smaller partitions in memory
PERSISTENT = 10**5  # elements: DeepSpeed never shards smaller weights again; its default
STATES = 3  # files of an optimizer state: its float32 weights and AdamW's two means
LOCKS = {}  # run folder -> descriptor of the lock that this process holds


def nvme_parts(deepspeed_config):
    """Return part -> its settings, for the parts of a DeepSpeed config that are on NVMe."""
    zero = deepspeed_config["zero_optimization"]
    parts = {part: zero.get(part) or {} for part in PARTS}
    return {part: block for part, block in parts.items() if block.get("device") == "nvme"}


# Before the model loads ---------------------------------------------------------------------------
def start_nvme(accelerator):
    """Check the path and the extension, and give the run a swap folder of its own. Collective.

    Does nothing without a part on NVMe. The path is `nvme_path` of DeepSpeed's config, or the
    environment variable NVME_PATH.
    """
    content = accelerator.deepspeed_plugin.deepspeed_config
    parts = nvme_parts(content)
    if not parts:
        return
    if accelerator.deepspeed_plugin.zero_stage != 3:
        refuse(
            f"{' and '.join(parts)} on NVMe needs ZeRO-3, other stages keep it in CPU memory: set "
            "stage 3, or the device cpu"
        )
    bases = {part: find_base(part, block) for part, block in parts.items()}
    check_aio(content.get("aio") or {})
    if parts.get("offload_optimizer", {}).get("fast_init"):
        refuse(
            "with fast_init of offload_optimizer DeepSpeed reads weights from NVMe to places that "
            "direct I/O cannot use, and does not notice: remove it from DeepSpeed's config"
        )
    load_extensions(accelerator, content.get("aio") or {})
    token = broadcast_object_list([secrets.token_hex(4)])[0]
    name = f"run-{token}-{socket.gethostname()}-{os.environ.get('GROUP_RANK', 0)}"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for base in {*bases.values()}:
            remove_left_behind(base)
            make_folder(base / name)
        remove_at_end()
    accelerator.wait_for_everyone()
    for part, block in parts.items():
        block["nvme_path"] = str(bases[part] / name)
    if "offload_param" in parts:
        set_fetching(content["zero_optimization"])
    if "offload_optimizer" in parts:
        align_gradients()
    accelerator.print(f"Swap files: {', '.join(sorted({str(b / name) for b in bases.values()}))}")


def set_fetching(zero):
    """Let DeepSpeed hold no weight longer, and fetch none earlier, than the layer that uses it.

    A weight that is kept or fetched ahead holds a swap buffer. With prefetching, DeepSpeed 0.19.8
    failed: "already assigned swap buffer". Without it, training worked.
    """
    for key in ("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
        if zero.setdefault(key, 0) not in (0, "auto"):
            say(
                f"{key} {zero[key]} with parameters on NVMe: DeepSpeed may run out of swap "
                "buffers. 0 is safe."
            )
        zero[key] = 0 if zero[key] == "auto" else zero[key]


def check_aio(block):
    """Stop if DeepSpeed would not read the settings of the drive as they are written."""
    for key, value in block.items():
        if key not in AIO:
            name = "; its name is now intra_op_parallelism" if "thread" in key else ""
            refuse(
                f"DeepSpeed does not read aio.{key} (it reads {', '.join(AIO)}){name}: remove it"
            )
        if kind := wanted_kind(key, value):
            refuse(f"aio.{key} of DeepSpeed's config is {value!r}: it must be {kind}")


def wanted_kind(key, value):
    """Return what a value of the block "aio" must be; "" if it is that."""
    if type(value) is not AIO[key] or (AIO[key] is int and not 1 <= value < 2**31):  # a C int
        return "true or false" if AIO[key] is bool else "a whole number from 1 on, below 2**31"
    return "a multiple of 512 bytes" if key == "block_size" and value % 512 else ""  # direct I/O


def find_base(part, block):
    """Return the folder for the swap files of all runs; stop if there is none, or it is not fit."""
    told, variable = block.get("nvme_path"), os.environ.get(VARIABLE)
    told = None if str(told) in ("None", "none", "auto", "") else str(told)
    if told is None and not variable:
        refuse(
            f"{part} is on NVMe, and {VARIABLE} is not set in the environment: set it to a folder "
            "on an NVMe drive"
        )
    if told and variable and Path(told).resolve() != Path(variable).resolve():
        refuse(
            f"nvme_path of {part} is {told}, and {VARIABLE} in the environment {variable}: remove "
            "one of them"
        )
    culprit = f"nvme_path {told}" if told else f"{VARIABLE} {variable}"
    base = Path(told or variable).resolve()
    if not base.is_dir():
        refuse(f"{culprit} is not a folder: name one on an NVMe drive")
    with or_refuse(f"{culprit} cannot be written", tempfile.NamedTemporaryFile, dir=base) as file:
        remedy = "DeepSpeed needs direct I/O (O_DIRECT), name a folder on a local drive"
        or_refuse(f"{culprit}: {remedy}", try_direct_io, file.name)
    return base


def try_direct_io(file):
    """Write and read as DeepSpeed does, which does not look at the results of its reads and writes.

    Raises:
        OSError: the file system or the drive cannot do it.
    """
    with contextlib.closing(mmap.mmap(-1, 2 * ALIGNED)) as memory:
        part = memoryview(memory)[ALIGNED:]
        descriptor = os.open(file, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        try:
            os.pwritev(descriptor, [part], ALIGNED)
            os.preadv(descriptor, [part], ALIGNED)
        finally:
            os.close(descriptor)
            part.release()


def align_gradients():
    """Keep the start of a gradient in memory if direct I/O could not read it to its place.

    DeepSpeed 0.19.8 reads the swapped gradients of a sub-group to where they belong in one buffer.
    Behind a slice of odd length, such as that of a bias, this place is not aligned. The read then
    fails, DeepSpeed does not notice, and the run trains on wrong gradients.
    """
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper

    adjust = OptimizerSwapper._adjust_for_misaligned_lengths

    def split(swapper, tensors, offsets):
        pairs = []
        for tensor, offset in zip(tensors, offsets):
            head = -offset % swapper.numel_alignment
            if head and swapper.is_swappable_tensor(tensor=tensor):
                pairs.append((tensor[:head].clone(), offset))
                tensor, offset = tensor[head:], offset + head
            pairs.append((tensor, offset))
        return adjust(swapper, [tensor for tensor, _ in pairs], [offset for _, offset in pairs])

    OptimizerSwapper._adjust_for_misaligned_lengths = split


# The extension ------------------------------------------------------------------------------------
def is_built():
    """Return whether both extensions were built by this environment: torch then only loads them.

    It builds them again where DeepSpeed lies in another folder, for that is in the command.
    """
    if importlib.util.find_spec("deepspeed.ops.aio.async_io_op"):  # built with DeepSpeed itself
        return True
    package = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
    for name in EXTENSIONS:
        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        commands = folder / "build.ninja"
        if not (folder / f"{name}.so").exists() or not commands.exists():
            return False
        if f"{package}/" not in commands.read_text():
            return False
    return True


def load_extensions(accelerator, aio):
    """Load DeepSpeed's async_io and pin_memory; stop if they were not built. Collective.

    Args:
        aio: the block "aio" of DeepSpeed's config.
    """
    if not is_built():
        refuse(
            f"DeepSpeed's extension async_io, which reads and writes NVMe, is not built: {BUILD}"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import constants as defaults

    for name in EXTENSIONS:
        free_extension_lock(name)
    with accelerator.local_main_process_first():
        culprit = f"DeepSpeed's extension async_io cannot be loaded, {BUILD}"
        module = or_refuse(culprit, AsyncIOBuilder().load, verbose=False)
    # DeepSpeed does not look at the answer, and aborts at the first read
    libaio = ctypes.CDLL(module.__file__)
    depth, contexts = aio.get("queue_depth", defaults.AIO_QUEUE_DEPTH_DEFAULT), []
    for _ in range(aio.get("intra_op_parallelism", defaults.AIO_INTRA_OP_PARALLELISM_DEFAULT)):
        context = ctypes.c_ulong(0)
        if error := -libaio.io_queue_init(depth, ctypes.byref(context)):
            refuse_kernel(error)
        contexts.append(context)
    for context in contexts:
        libaio.io_queue_release(context)


def refuse_kernel(error):
    """Stop because the kernel's io_setup failed with this errno."""
    remedy = "allow this system call in the container or sandbox"
    if error == errno.EAGAIN:
        remedy = "raise fs.aio-max-nr with sysctl"
    refuse(f"no asynchronous I/O, the kernel refuses io_setup ({os.strerror(error)}): {remedy}")


# The folder of a run ------------------------------------------------------------------------------
def lock_file(folder):
    """Return the hidden file beside a run's folder that the run keeps locked."""
    return folder.with_name(f".{folder.name}.lock")


def make_folder(folder):
    """Create the folder of this run, with a lock that the system releases when the run ends."""
    # locked under another name first: a lock file that anyone can see is held, or left behind
    file = lock_file(folder)
    hidden = file.with_suffix(".new")
    culprit = f"{folder} cannot be created"
    descriptor = or_refuse(culprit, os.open, hidden, os.O_RDWR | os.O_CREAT, 0o666)
    LOCKS[folder] = descriptor
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks
        say(f"No lock for {folder} ({error}): if this run is killed, remove it by hand.")
        hidden.unlink(missing_ok=True)
    else:
        or_refuse(culprit, hidden.rename, file)
    or_refuse(culprit, folder.mkdir)


def remove_left_behind(base):
    """Remove the folders of runs whose lock nobody holds; print how many."""
    removed, size = [], 0
    for file in base.glob(".run-*.lock"):
        folder = base / file.name.removeprefix(".").removesuffix(".lock")
        with contextlib.suppress(OSError), open(file, "r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the run lives
            size += sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
            remove(folder)
            removed.append(folder)
    if removed:
        say(f"Removed {len(removed)} swap folder(s) of killed runs in {base}, {size:,} bytes.")


def remove(folder):
    """Remove a run's folder and its lock, also while another process still writes there."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            lock_file(folder).unlink(missing_ok=True)
            return


def remove_at_end():
    """Remove the folders of this process when it ends, also by Ctrl+C and SIGTERM."""
    owner = os.getpid()

    def clean():
        if os.getpid() != owner:  # a forked child
            return
        for folder in [*LOCKS]:
            remove(folder)
            os.close(LOCKS.pop(folder))

    def ended(number, frame):
        clean()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def end():
        # the launcher may pass on Ctrl+C, and SIGTERM after it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        clean()

    atexit.register(end)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, ended)


# Once the model is known --------------------------------------------------------------------------
def fit_nvme(accelerator, model):
    """Size the swap buffers by the model, print what is pinned; stop if space or memory is short.

    Called before the weights are read from their files.
    """
    content = accelerator.deepspeed_plugin.deepspeed_config
    parts = nvme_parts(content)
    if not parts:
        return
    if any(getattr(layer, "quant_state", None) is not None for layer in model.modules()):
        refuse(
            "DeepSpeed's swap buffers have one dtype, and a quantized model has several: launch "
            "with configs/zero3_offload.yaml or zero3_qlora.yaml"
        )
    plan = Plan(content, model, accelerator.num_processes)
    if block := parts.get("offload_param"):
        if block.setdefault("buffer_size", plan.largest) < plan.largest:
            refuse(
                f"buffer_size {block['buffer_size']} of offload_param is too small for the largest "
                f"slice of a weight, {plan.largest} elements: remove it, or raise it"
            )
        if plan.kept:
            refuse(
                f"stage3_param_persistence_threshold keeps {plan.kept} weights on NVMe gathered: "
                "DeepSpeed cannot train them, so lower it or stage3_model_persistence_threshold"
            )
    pinned, needed = plan.pinned_bytes(parts), plan.file_bytes(parts)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    accelerator.print(
        f"NVMe: up to {needed:,} bytes of swap files and {pinned:,} bytes of pinned memory per "
        "process."
    )
    remedy = "lower sub_group_size or buffer_count in DeepSpeed's config"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.geteuid() and limit != resource.RLIM_INFINITY and pinned > limit:
        refuse(
            f"a process pins {pinned:,} bytes of memory, and `ulimit -l` allows {limit:,}: raise "
            f"it, or {remedy}"
        )
    if pinned * here > (free := psutil.virtual_memory().available):
        refuse(
            f"{here} process(es) pin {pinned:,} bytes of memory each, and the machine has {free:,} "
            f"available: {remedy}"
        )
    for base in {Path(block["nvme_path"]).parent for block in parts.values()}:
        if needed * here > (free := shutil.disk_usage(base).free):
            refuse(
                f"{base} has {free:,} bytes free, and {here} process(es) write {needed:,} bytes of "
                "swap files each: free some space, or name another folder"
            )


class Plan:
    """What DeepSpeed pins and writes for a model.

    Attributes:
        largest: elements of the largest slice of a weight that is swapped.
        kept: number of weights that are swapped, but so small that DeepSpeed keeps them gathered.
    """

    def __init__(self, content, model, processes):
        self.zero, aio = content["zero_optimization"], content.get("aio", {})
        self.element = engine_dtype(content).itemsize
        self.least = max(LEAST, aio.get("block_size", LEAST))
        self.aligned = ALIGNED * aio.get("intra_op_parallelism", 1)
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        self.trained = [(numel, math.ceil(numel / processes)) for numel, grad in sizes if grad]
        slices = [math.ceil(numel / processes) for numel, _ in sizes]
        self.swapped = [own for own in slices if own * self.element >= self.least]
        gathered = self.gathered([numel for numel, _ in sizes])
        self.kept = sum(math.ceil(n / processes) * self.element >= self.least for n in gathered)
        self.largest = max(self.swapped, default=self.aligned)
        self.groups = self.sub_groups()

    def gathered(self, sizes):
        """Return the sizes of the weights that DeepSpeed keeps gathered, out of those of all.

        As its `mark_persistent_parameters`: each is within one threshold, their sum within another.
        """
        names = (f"stage3_{part}_persistence_threshold" for part in ("param", "model"))
        own, total = (self.zero.get(name, "auto") for name in names)
        own, total = PERSISTENT if own == "auto" else own, math.inf if total == "auto" else total
        found = []
        for size in sizes:
            if size <= min(own, total):
                found, total = [*found, size], total - size
        return found

    def sub_groups(self):
        """Return the trained weights as DeepSpeed groups them, as (elements, of a slice) pairs."""
        groups, limit = [[]], self.zero.get("sub_group_size", 10**9)
        for pair in self.trained:
            if sum(own for _, own in groups[-1]) >= limit:
                groups.append([])
            groups[-1].append(pair)
        return groups

    def pad(self, elements, size):
        """Return the bytes of a buffer of so many elements, which DeepSpeed aligns."""
        return math.ceil(elements * size / self.aligned) * self.aligned

    def pinned_bytes(self, parts):
        """Return the bytes that a process pins."""
        pinned = 0
        if block := parts.get("offload_param"):
            pinned += self.pad(block["buffer_size"], self.element) * block.get("buffer_count", 5)
            if sum(own for _, own in self.trained) > block.get("max_in_cpu", 10**9):
                # DeepSpeed counts full weights here, not slices
                pinned += max(self.pad(sum(n for n, _ in g), self.element) for g in self.groups)
        if block := parts.get("offload_optimizer"):
            largest = max(sum(own for _, own in group) for group in self.groups)
            pinned += self.pad(largest, 4) * block.get("buffer_count", 4)
        return pinned

    def file_bytes(self, parts):
        """Return the bytes of the swap files of a process, at most."""
        written = 0
        if "offload_param" in parts:
            written += sum(self.pad(one, self.element) for one in self.swapped)
        if "offload_optimizer" in parts:
            groups = [sum(own for _, own in group) for group in self.groups]
            written += sum(STATES * self.pad(one, 4) for one in groups if one * 4 >= self.least)
            # gradients wait for the optimizer there
            written += sum(self.pad(own, 4) for _, own in self.trained if own * 4 >= self.least)
        return written
