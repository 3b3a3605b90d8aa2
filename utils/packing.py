"""Batches without padding: several documents in one row, with attention restricted to each of them.

A batch is one row with all its documents, whether each is a sequence of its own or several are
packed into one. So the linear layers compute tokens and no padding. Positions restart with every
document, and attention is computed for each document alone. Where the GPU, the dtype and the head
size allow it, torch's attention for sequences of any length does that (torch.nn.attention.varlen,
FlashAttention); elsewhere it is one scaled dot product attention per document. Works with torch
2.11 and newer.

A sequence is a list of documents: one, or several if packed. A document is a dict with the lists
`input_ids` and `labels`, of one length; a label stands where its token stands, -100 means no loss.

This file imports no other file of the project and can be copied along with a script.
"""

import inspect
import math
from bisect import bisect_left, insort
from functools import cache
from itertools import count, islice

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AttentionInterface

NAME = "documents"  # of the attention, for attn_implementation


# Sequences ----------------------------------------------------------------------------------------
def best_fit(lengths, capacity):
    """Return bins, each a list of indices of documents with at most `capacity` tokens together.

    Best fit, longest first: every document goes into the fullest bin that has room for it. Needs at
    most 11/9 of the fewest possible bins, plus one (Johnson et al. 1974, doi:10.1137/0203025).

    Args:
        lengths: tokens of each document, 1 to `capacity`.
    """
    bins = []
    rooms, by_room = [], {}  # sorted, the rooms that some bin has left; room -> bins
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


def pack(lengths, capacity, packing):
    """Return sequences of indices of documents: packed up to `capacity` tokens, or one in each."""
    return best_fit(lengths, capacity) if packing else [[index] for index in range(len(lengths))]


def stream_sequences(read, capacity, packing, window=1000):
    """Yield sequences of documents without end.

    Args:
        read: called with the number of the epoch, from 0; returns an iterable of its documents.
        window: number of documents that are packed together; a larger one leaves less room unused.
    """
    for epoch in count():
        documents = iter(read(epoch))
        while part := list(islice(documents, window)):
            lengths = [len(document["input_ids"]) for document in part]
            for sequence in pack(lengths, capacity, packing):
                yield [part[index] for index in sequence]


def shuffled_sequences(sequences, seed, shuffle):
    """Yield the sequences without end, in each epoch in an order that depends on `seed` alone."""
    for epoch in count():
        generator = torch.Generator().manual_seed(seed + epoch)
        if shuffle:
            order = torch.randperm(len(sequences), generator=generator)
        else:
            order = range(len(sequences))
        yield from (sequences[index] for index in order)


# Batches ------------------------------------------------------------------------------------------
class Lengths:
    """The number of tokens of each document of a row, which torch.compile does not look into.

    With a list it would compile the layers anew for every number of documents.
    """

    def __init__(self, tokens):
        self.tokens = tokens


def join(documents):
    """Return the batch that holds the documents one after the other in one row of tensors.

    Args:
        documents: at least one.

    Returns:
        input_ids, labels, position_ids: int64 [1, tokens]. The first token of a document has no
            label, because the position before it belongs to another document.
        cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], where each document begins, and the end
            of the last one. max_length_q, max_length_k: int, tokens of the longest document. These
            four are what transformers calls the flash attention kwargs.
        document_lengths: `Lengths`. label_positions: int64 [labels], the positions whose next token
            has a label. They repeat what the other tensors hold, so that the CPU need not read it
            from a GPU.
    """
    lengths = [len(document["input_ids"]) for document in documents]
    starts = functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    ids = [token for document in documents for token in document["input_ids"]]
    labels = [label for document in documents for label in [-100, *document["labels"][1:]]]
    positions = [position for position, label in enumerate(labels[1:]) if label != -100]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "label_positions": torch.tensor(positions, dtype=torch.int64),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "document_lengths": Lengths(lengths),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


class Batches(IterableDataset):
    """The micro-batches that a generator yields; with several workers each takes its share of them.

    Args:
        generate: returns an iterator of micro-batches, each a list of sequences.
        documents: as for `fetch`.
    """

    def __init__(self, generate, documents):
        self.generate, self.documents = generate, documents

    def __iter__(self):
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        own = islice(self.generate(), first, None, stride)
        return (fetch(sequences, self.documents) for sequences in own)


def build_loader(endless, documents, size, start, process, processes, num_workers=0):
    """Return an endless loader of a process's micro-batches, rows that `join` makes.

    The order of the documents depends on nothing but `endless`. So a run that resumes reads what
    the interrupted one would have read, and the sequences of an update are the same on any number
    of processes.

    Args:
        endless: called without arguments; returns an iterator of sequences that never ends.
        documents: as for `fetch`.
        size: sequences in a micro-batch of one process.
        start: number of sequences to skip, which updates of all processes have used.
        process, processes: rank of this process, and number of processes.
    """
    global_batch = size * processes  # sequences in a micro-batch of all processes

    def generate():
        sequences = islice(endless(), start, None)
        while True:
            batch = list(islice(sequences, global_batch))
            yield batch[process * size : (process + 1) * size]

    generator = torch.Generator()  # the loader draws a number from it, and from no other generator
    batches = Batches(generate, documents)
    return DataLoader(batches, None, collate_fn=join, num_workers=num_workers, generator=generator)


def split_evenly(sequences, documents, size, process, processes):
    """Return a process's batches of an evaluation, as many as every other process gets.

    A process that runs out of documents gets a batch without labels.

    Args:
        sequences, documents: as for `fetch`.
        size: sequences in a batch.
        process, processes: rank of this process, and number of processes.
    """
    stride = size * processes  # sequences in a batch of all processes
    padded_length = math.ceil(len(sequences) / stride) * stride
    filler = {"input_ids": [0, 0], "labels": [-100, -100]}
    batches = []
    for start in range(process * size, padded_length, stride):
        found = fetch(sequences[start : start + size], documents)
        batches.append(join(found or [filler]))
    return batches


def fetch(sequences, documents):
    """Return the documents of some sequences, one after the other.

    Args:
        sequences: lists of indices of `documents`; or of documents, where `documents` is None.
    """
    found = [one for sequence in sequences for one in sequence]
    return found if documents is None else [documents[index] for index in found]


# Attention ----------------------------------------------------------------------------------------
@cache
def varlen_attention():
    """Return torch's attention for sequences of any length, and its options for grouped queries.

    torch 2.11 groups the queries by itself; from 2.12 on the caller has to allow it (`enable_gqa`).
    """
    from torch.nn.attention.varlen import varlen_attn

    must_ask = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if must_ask else {}


def fits_varlen(query, value):
    """Return whether FlashAttention, torch's kernel for sequences of any length, can be used.

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
    """Compute causal attention within each document of a row that `join` made.

    transformers calls it by the name in NAME. Without the borders of documents (cu_seq_lens_q), as
    in generation, the row is one document.

    Args:
        query, key, value: [1, heads, tokens, head size]; key and value may have fewer heads.

    Returns:
        The output [1, tokens, heads, head size], and None for the attention weights.

    Raises:
        ValueError: the model needs another kind of attention.
    """
    needed = ["position_bias"] if kwargs.get("position_bias") is not None else []
    needed += [] if getattr(module, "is_causal", True) else ["bidirectional attention"]
    needed += ["rows of a batch"] if len(query) != 1 else []
    if needed:
        raise ValueError(f"{type(module).__name__} needs {needed[0]}, which {NAME} does not have")
    # the rotary embedding makes query and key float32; under autocast the values are bf16 or fp16
    query, key = query.to(value.dtype), key.to(value.dtype)
    window, softcap, sinks = (kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    options = (window, softcap, sinks, dropout, scaling)
    starts, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    fits = fits_varlen(query, value) and not dropout and softcap is None and sinks is None
    if starts is None and fits and query.shape[2] == key.shape[2]:  # one document
        longest = query.shape[2]
        starts = longest * torch.arange(2, dtype=torch.int32, device=query.device)
    if starts is None:  # one document, in generation perhaps with the cached keys before it
        return one_document(query, key, value, *options).transpose(1, 2), None
    if fits:
        varlen_attn, grouped = varlen_attention()
        rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
        options = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
        if query.shape[1] != key.shape[1]:
            options |= grouped
        return varlen_attn(*rows, starts, starts, longest, longest, **options)[None], None
    lengths = kwargs.get("document_lengths") or Lengths(starts.diff().tolist())
    rows = document_by_document(query, key, value, lengths, *options)
    return rows.transpose(1, 2), None


@torch.compiler.disable  # else it is compiled anew for every number of documents
def document_by_document(query, key, value, lengths, *options):
    """Return the causal attention within documents of these lengths: [1, heads, tokens, size]."""
    split = [tensor.split(lengths.tokens, dim=2) for tensor in (query, key, value)]
    parts = [one_document(*part, *options) for part in zip(*split, strict=True)]
    return torch.cat(parts, dim=2)


def one_document(query, key, value, window, softcap, sinks, dropout, scaling):
    """Return the causal attention of one document, [1, heads, tokens, size].

    Args:
        query: of the last tokens of the document, whose keys may be cached from earlier calls.
        window: a token attends to itself and to `window` - 1 tokens before it; None: to all.
        softcap: scores become softcap * tanh(scores / softcap); None: they stay.
        sinks: [heads], one more score of each head, beside the scores of the keys, with the value
            0. None: no such score.
    """
    queries, keys = query.shape[2], key.shape[2]
    mask, is_plain = None, softcap is None and sinks is None
    is_windowed = window is not None and keys > window
    if not is_plain or queries not in (1, keys) or is_windowed:
        positions = torch.arange(keys, device=query.device)
        ahead = positions - positions[keys - queries :, None]  # of a key, seen from a query
        mask = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
    if (query.is_cuda or not is_plain) and query.shape[1] != key.shape[1]:
        # SDPA's memory-efficient kernel, the only one for float32 or a mask, needs equal heads
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    if is_plain:
        causal = mask is None and queries > 1
        options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, **options
        )
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(len(query), -1, queries, 1)
        scores = torch.cat([scores, sink], -1)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys].to(query.dtype)
    return functional.dropout(weights, dropout) @ value


AttentionInterface.register(NAME, attend)
