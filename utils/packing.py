"""Documents side by side in one row, without padding and without seeing each other.

A batch is one row of all its documents, whether each has a place of its own or several share one (packing): so the
linear layers compute nothing but tokens. Positions restart with every document, and attention is computed for each
document alone: by torch's attention for sequences of any length (torch.nn.attention.varlen, FlashAttention) where the
GPU and the dtype allow it, by one scaled dot product attention per document elsewhere.

This file imports no other file of the project and can be copied along with a script.
"""

from bisect import bisect_left, insort
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
    rooms, by_room, bins = [], {}, []  # rooms: sorted, those that some bin has; by_room: room -> bins
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


def join(documents):
    """Return the batch of one row that holds the documents one after the other, as tensors [1, tokens].

    Args:
        documents: dicts with the lists `input_ids` and `labels`, of one length; a label stands where its token stands,
            -100 where there is none. At least one document.

    Returns:
        input_ids, labels, position_ids, and what transformers calls the flash attention kwargs: cu_seq_lens_q and _k
        (int32, where each document begins, and the end), max_length_q and _k (int, tokens of the longest). The first
        token of a document has no label, for the position before it belongs to another.
    """
    lengths = torch.tensor([len(document["input_ids"]) for document in documents])
    starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "input_ids": torch.tensor([[token for document in documents for token in document["input_ids"]]]),
        "labels": torch.tensor([[label for document in documents for label in [-100, *document["labels"][1:]]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
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
        own = islice(self.generate(), worker.id if worker else 0, None, worker.num_workers if worker else 1)
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
    starts = range(process * size, len(places) + -len(places) % (size * processes), size * processes)
    filler = {"input_ids": [0, 0], "labels": [-100, -100]}
    batches = []
    for start in starts:
        batches.append(join(fetch(places[start : start + size], documents) or [filler]))
    return batches


def fetch(places, documents):
    """Return the documents of some places, which hold their indices, or themselves where `documents` is None."""
    found = [one for place in places for one in place]
    return found if documents is None else [documents[index] for index in found]


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention within each document of a row that `join` made; of one document alone where no borders are given.

    To be called by transformers, under the name that NAME holds. query [1, heads, tokens, size]; key and value may
    have fewer heads. Returns ([1, tokens, heads, size], None). ValueError: the model's attention is of another kind.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or len(query) != 1 or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} attends in a way ({unknown}) that this function does not know")
    window, softcap, starts = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("cu_seq_lens_q")
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if starts is None:  # generation: one document, perhaps with the keys of what came before
        return one_document(query, key, value, window, softcap, dropout, options).transpose(1, 2), None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout and softcap is None:
        from torch.nn.attention.varlen import varlen_attn

        rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
        longest, reach = kwargs["max_length_q"], (-1 if window is None else window - 1, 0)
        return varlen_attn(*rows, starts, starts, longest, longest, window_size=reach, **options)[None], None
    sizes = starts.diff().tolist()
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)))
    rows = [one_document(*part, window, softcap, dropout, options) for part in parts]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def one_document(query, key, value, window, softcap, dropout, options):
    """Return the causal attention of one document, [1, heads, tokens, size], by torch's best kernel for it."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if softcap is not None or queries not in (1, keys) or (window is not None and keys > window):
        back = (
            torch.arange(keys, device=query.device) - torch.arange(keys - queries, keys, device=query.device)[:, None]
        )
        mask = back <= 0 if window is None else (back <= 0) & (back > -window)
    if softcap is None:
        causal = mask is None and queries > 1
        return functional.scaled_dot_product_attention(query, key, value, mask, dropout, causal, **options)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * options["scale"]
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, dropout) @ value


AttentionInterface.register(NAME, attend)
