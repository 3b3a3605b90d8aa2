"""Documents side by side in one row, without padding and without seeing each other.

A batch is one row of all its documents, whether each has a place of its own or several share one (packing): so the
linear layers compute nothing but tokens. Positions restart with every document, and attention is computed for each
document alone: by torch's attention for sequences of any length (torch.nn.attention.varlen, FlashAttention) where the
GPU, the dtype and the head size allow it, by one scaled dot product attention per document
elsewhere. Works with torch 2.11 and newer.

This file imports no other file of the project and can be copied along with a script.
"""

import inspect
from bisect import bisect_left, insort
from functools import cache
from itertools import count, islice

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AttentionInterface

NAME = "documents"  # of the attention, for attn_implementation


def best_fit(lengths, capacity):
    """Return bins, each a list of indices of documents whose lengths add up to at most `capacity` tokens.

    Best fit, longest first: every document goes into the fullest bin that has room for it. Needs at most 11/9 of the
    fewest possible bins, and one (Johnson et al. 1974, doi:10.1137/0203025). Each length is 1 to `capacity`.
    """
    rooms, by_room, bins = (
        [],
        {},
        [],
    )  # rooms: sorted, those that some bin has; by_room: room -> bins
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(rooms, lengths[index])
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[at], by_room[room]
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(index)
        room -= lengths[index]
        if room not in by_room:
            insort(rooms, room)
        by_room.setdefault(room, []).append(chosen)
    return bins


class Lengths:
    """How many tokens each document of a row has; torch.compile does not look into it.

    A list would make it compile the layers anew for every number of documents.
    """

    def __init__(self, tokens):
        self.tokens = tokens


def join(documents):
    """Return the batch of one row that holds the documents one after the other, as tensors [1, tokens].

    Args:
        documents: dicts with the lists `input_ids` and `labels`, of one length; a label stands where its token stands,
            -100 where there is none. At least one document.

    Returns:
        input_ids, labels, position_ids, and what transformers calls the flash attention kwargs: cu_seq_lens_q and _k
        (int32, where each document begins, and the end), max_length_q and _k (int, tokens of the longest). The first
        token of a document has no label, for the position before it belongs to another.
        document_lengths (`Lengths`) and label_positions (int64 [labels], positions whose next
        token has a label) repeat what the other tensors hold: the CPU need not read it from a GPU.
    """
    lengths = [len(document["input_ids"]) for document in documents]
    starts = functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    labels = [label for document in documents for label in [-100, *document["labels"][1:]]]
    positions = [place for place, label in enumerate(labels[1:]) if label != -100]
    return {
        "input_ids": torch.tensor(
            [[token for document in documents for token in document["input_ids"]]]
        ),
        "labels": torch.tensor([labels]),
        "label_positions": torch.tensor(positions, dtype=torch.int64),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "document_lengths": Lengths(lengths),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pack(lengths, capacity, packing):
    """Return places of a batch, each a list of indices of documents: as many as fit into `capacity`, or one."""
    return best_fit(lengths, capacity) if packing else [[index] for index in range(len(lengths))]


def stream_places(read, capacity, packing, window=1000):
    """Yield places, lists of documents, without end.

    Args:
        read: called with 0, 1, 2, ... for pass after pass; returns the documents of a pass, one after the other.
        window: how many documents are packed together; more of them leave less room unused.
    """
    for epoch in count():
        documents = iter(read(epoch))
        while part := list(islice(documents, window)):
            for place in pack([len(document["input_ids"]) for document in part], capacity, packing):
                yield [part[index] for index in place]


def shuffled_places(places, seed, shuffle):
    """Yield the places without end, in every pass in another order that depends on `seed` alone."""
    for epoch in count():
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(places), generator=generator) if shuffle else range(len(places))
        yield from (places[index] for index in order)


class Batches(IterableDataset):
    """The micro-batches whose places a generator yields; with several workers each fetches every so many of them."""

    def __init__(self, generate, documents):
        self.generate, self.documents = generate, documents

    def __iter__(self):
        worker = get_worker_info()
        own = islice(
            self.generate(), worker.id if worker else 0, None, worker.num_workers if worker else 1
        )
        return (fetch(places, self.documents) for places in own)


def build_loader(endless, documents, size, start, process, processes, num_workers=0):
    """Return a loader of a process's micro-batches, rows that `join` made, from its `start`-th on and without end.

    Which documents come when depends on nothing but `endless`: a run that starts in the middle goes on as the one that
    came so far, and the places of an update are the same on any number of processes.

    Args:
        endless: called without arguments, returns an iterator of places that never ends.
        size: places in a micro-batch of one process.
        documents: what the places hold the indices of; None where they hold the documents themselves.
    """

    def generate():
        places = islice(endless(), start * size * processes, None)
        while True:
            yield list(islice(places, size * processes))[process * size : (process + 1) * size]

    generator = torch.Generator()  # its own: the loader draws a number, which others would miss
    batches = Batches(generate, documents)
    return DataLoader(batches, None, collate_fn=join, num_workers=num_workers, generator=generator)


def split_evenly(places, documents, size, process, processes):
    """Return a process's batches of an evaluation, as many as every other's: where it has none, one without labels."""
    starts = range(
        process * size, len(places) + -len(places) % (size * processes), size * processes
    )
    filler = {"input_ids": [0, 0], "labels": [-100, -100]}
    batches = []
    for start in starts:
        batches.append(join(fetch(places[start : start + size], documents) or [filler]))
    return batches


def fetch(places, documents):
    """Return the documents of some places, which hold their indices, or themselves where `documents` is None."""
    found = [one for place in places for one in place]
    return found if documents is None else [documents[index] for index in found]


@cache
def varlen_attention():
    """Return torch's attention for sequences of any length, and what it needs for grouped queries.

    torch 2.11 groups the queries by itself; from 2.12 on the caller has to allow it (`enable_gqa`).
    """
    from torch.nn.attention.varlen import varlen_attn

    must_ask = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if must_ask else {}


def fits_varlen(query, value):
    """Return whether FlashAttention, torch's kernel for sequences of any length, takes the queries.

    It needs bf16 or fp16, a GPU of compute capability 8.0 (Ampere) or newer, and one head size of
    queries and values, at most 256 and a multiple of 8 (in torch's source:
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp). The gradient for head sizes
    above 192 needs the shared memory of capability 8.0 or 9.0.
    """
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if value.shape[-1] != size or size % 8:
        return False
    capability = torch.cuda.get_device_capability(query.device)
    most = 256 if capability in ((8, 0), (9, 0)) else 192
    return capability >= (8, 0) and size <= most


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention within each document of a row that `join` made; of one document alone where no borders are given.

    To be called by transformers, under the name that NAME holds. query [1, heads, tokens, size]; key and value may
    have fewer heads. Returns ([1, tokens, heads, size], None). ValueError: the model's attention is of another kind.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or len(query) != 1 or not getattr(module, "is_causal", True):
        raise ValueError(
            f"{type(module).__name__} attends in a way ({unknown}) that this function does not know"
        )
    # the rotary embedding multiplies by float32 numbers; under autocast the values are bf16 or fp16
    query, key = query.to(value.dtype), key.to(value.dtype)
    window, softcap, starts = (
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
        kwargs.get("cu_seq_lens_q"),
    )
    if starts is None:  # generation: one document, perhaps with the keys of what came before
        whole = one_document(query, key, value, window, softcap, dropout, scaling)
        return whole.transpose(1, 2), None
    if fits_varlen(query, value) and not dropout and softcap is None:
        varlen_attn, grouped = varlen_attention()
        rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
        options = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
        if query.shape[1] != key.shape[1]:
            options |= grouped
        longest = kwargs["max_length_q"]
        return varlen_attn(*rows, starts, starts, longest, longest, **options)[None], None
    lengths = kwargs.get("document_lengths") or Lengths(starts.diff().tolist())
    rows = document_by_document(query, key, value, lengths, window, softcap, dropout, scaling)
    return rows.transpose(1, 2), None


@torch.compiler.disable  # it would be compiled anew for every number of documents
def document_by_document(query, key, value, lengths, *options):
    """Return the causal attention of documents of these lengths, [1, heads, tokens, size]."""
    parts = zip(*(tensor.split(lengths.tokens, dim=2) for tensor in (query, key, value)))
    return torch.cat([one_document(*part, *options) for part in parts], dim=2)


def one_document(query, key, value, window, softcap, dropout, scaling):
    """Return the causal attention of one document, [1, heads, tokens, size], by torch's best kernel for it."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if softcap is not None or queries not in (1, keys) or (window is not None and keys > window):
        back = (
            torch.arange(keys, device=query.device)
            - torch.arange(keys - queries, keys, device=query.device)[:, None]
        )
        mask = back <= 0 if window is None else (back <= 0) & (back > -window)
    if (query.is_cuda or softcap is not None) and query.shape[1] != key.shape[1]:
        # SDPA's memory-efficient kernel, the only one for float32 or a mask, takes no groups
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    if softcap is None:
        causal = mask is None and queries > 1
        options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, **options
        )
    scores = query @ key.transpose(2, 3) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, dropout) @ value


AttentionInterface.register(NAME, attend)
