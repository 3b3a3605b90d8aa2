"""Read the weights of FSDP's checkpoints, which torch.distributed.checkpoint writes."""

import pickle
from functools import cache, partial

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from tools.collate.plain import only_one, read_plain
from tools.merge_adapter.lazy import Lazy
from tools.merge_adapter.read import read_tensor
from utils.errors import fail, first_line

NAME = "pytorch_model_fsdp"  # begins what accelerate saves: a folder _0, or a file .bin
PREFIX = "model."  # accelerate saves {"model": state_dict}
# what the index of a checkpoint is made of; nothing else is unpickled
CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "Path"),
    "collections": ("OrderedDict",),
}


class Index(pickle.Unpickler):
    """Unpickles the index of a checkpoint, and no other classes than those of an index."""

    def find_class(self, module, name):
        is_dtype = isinstance(getattr(torch, name, None), torch.dtype)
        is_plain = module == "torch" and (name == "Size" or is_dtype)
        if is_plain or name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run any code")


def find_fsdp(folder):
    """Return the folder or file of FSDP's model in a checkpoint; None if there is none.

    Stops if there are several, or only what each process holds.
    """
    if (folder / ".metadata").is_file() or list(folder.glob("*.distcp")):
        return folder
    found = sorted(
        path for path in folder.glob(f"{NAME}*") if path.is_dir() or path.suffix == ".bin"
    )
    pieces = [path for path in found if "_rank" in path.name]
    if pieces and pieces == found:
        fail(
            f"{folder} holds {pieces[0].name}, a process's own pieces of the weights, which are "
            "not joined here: save with SHARDED_STATE_DICT or FULL_STATE_DICT, not with "
            "LOCAL_STATE_DICT or use_dcp=False"
        )
    return only_one(folder, found)


def read_fsdp(path):
    """Return the weights of a checkpoint: name -> Lazy. A tied weight may stand under two names.

    Args:
        path: from `find_fsdp`.
    """
    if path.is_file():
        return read_plain(path)
    index = read_index(path)
    entries = {
        key: entry for key, entry in index.state_dict_metadata.items() if hasattr(entry, "chunks")
    }
    is_prefixed = all(key.startswith(PREFIX) for key in entries)
    weights = {}
    for key, entry in entries.items():
        chunks = [
            (chunk, index.storage_data[MetadataIndex(key, chunk.offsets)]) for chunk in entry.chunks
        ]
        if sum(chunk.sizes.numel() for chunk, _ in chunks) != entry.size.numel():
            fail(f"{path} does not hold all of {key}: save the checkpoint again")
        dtype = entry.properties.dtype
        make = partial(join_chunks, path, chunks, entry.size, dtype)
        name = key.removeprefix(PREFIX) if is_prefixed else key
        weights[name] = Lazy(entry.size, dtype, make, dtype, adapted=True)
    return weights


def read_index(path):
    """Return the `Metadata` of a checkpoint; stop if it or a file that it names is not there."""
    try:
        with (path / ".metadata").open("rb") as file:
            index = Index(file).load()
    except FileNotFoundError:
        fail(f"{path} lacks .metadata, the index of its files, which the first process writes last")
    except Exception as error:  # whatever a damaged pickle raises
        fail(f"{path / '.metadata'} cannot be read, copy it again: {first_line(error)}")
    ends = {}
    for info in index.storage_data.values():
        end = info.offset + info.length
        ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    if missing := sorted(name for name in ends if not (path / name).is_file()):
        fail(f"{path} lacks {', '.join(missing)}: copy the files that all processes wrote")
    if short := [name for name, end in ends.items() if (path / name).stat().st_size < end]:
        fail(f"{path / short[0]} is truncated, copy it again")
    return index


def join_chunks(path, chunks, size, dtype, rows=None):
    """Return some rows, or all, of a tensor that was saved in chunks.

    Args:
        chunks: pairs of a ChunkStorageMetadata and a _StorageInfo.
        size: of the full tensor.
        rows: slice of its rows; None for all.
    """
    if not size:  # a number
        return read_chunk(path, *chunks[0], dtype, None)
    first, last = (0, size[0]) if rows is None else (rows.start, rows.stop)
    tensor = torch.empty(last - first, *size[1:], dtype=dtype)
    for chunk, info in chunks:
        begin = chunk.offsets[0]
        low, high = max(first, begin), min(last, begin + chunk.sizes[0])
        if low < high and chunk.sizes.numel():
            places = zip(chunk.offsets[1:], chunk.sizes[1:])
            columns = tuple(slice(offset, offset + length) for offset, length in places)
            part = read_chunk(path, chunk, info, dtype, slice(low - begin, high - begin))
            tensor[(slice(low - first, high - first), *columns)] = part
    return tensor


def read_chunk(path, chunk, info, dtype, rows):
    """Return some rows, or all, of a chunk."""
    file = path / info.relative_path
    start = start_of(file, info.offset, info.length, dtype, chunk.sizes)
    return read_tensor(file, start, list(chunk.sizes), dtype, rows)


@cache
def start_of(path, offset, length, dtype, size):
    """Return the first byte of the values of a tensor that `torch.save` wrote into a file.

    It wrote an archive without compression, of `length` bytes from `offset` on.
    """
    with path.open("rb") as file:
        view = _create_file_view(file, offset, length)
        saved = torch.load(view, map_location="meta", weights_only=True)
        view.seek(0)
        start = torch._C.PyTorchFileReader(view).get_record_offset("data/0")
    is_plain = saved.is_contiguous() and not saved.storage_offset()
    if not is_plain or saved.dtype != dtype or saved.shape != size:
        fail(f"{path} holds a tensor in a form that is unknown here, at byte {offset}")
    return offset + start
