"""The loss of a causal language model, without ever holding all logits.

With a vocabulary of 128,256 entries the logits of one token take 4 bytes x 128,256 = 0.5 MB, and
the loss holds them several times. For a small model that is more memory than the rest of the
training. Here only positions with a label reach the head, one chunk of them at a time, and all that
is kept of a chunk is the gradient of its hidden states. The idea is that of Liger's fused linear
cross-entropy (arXiv:2410.10989) and of Cut Your Losses (arXiv:2411.09009), in plain PyTorch.

This file imports no other file of the project and can be copied along with a script.
"""

import math
from functools import partial, wraps

import torch
from accelerate.utils import gather_object, send_to_device
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import logging

MB = 2**20
# How large the float32 logits of a chunk may be. Every chunk reads the head's weight once, so a
# GPU wants large chunks (computed, not measured).
GPU_CHUNK, CPU_CHUNK = 512 * MB, 64 * MB
# By what share two losses may differ that are equal but for rounding: sums of a few dozen terms.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# By what share the loss of a document may change with the tokens of another one. It should not
# change at all, but mixtures of experts round differently.
LEAK = {torch.float32: 5e-7, torch.bfloat16: 1e-3, torch.float16: 1e-3}
ATTENTIONS = ("documents", "sdpa", "eager")  # that are tried where another one is wrong

# where the documents of a row begin and end, as `join` in packing.py returns it
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "document_lengths")


# The loss of a linear head ------------------------------------------------------------------------
class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the logits of a linear head, summed over the rows.

    Computes the gradients along with the loss, because the logits are gone afterwards.

    apply(hidden, weight, bias, labels, scale, softcap, chunk, with_gradients) -> (loss, correct)

    Args:
        hidden: [rows, size]; there may be no rows.
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        labels: [rows], none of them -100.
        scale, softcap: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap). With
            softcap None there is no tanh.
        chunk: number of rows that have their logits at the same time.
        with_gradients: `torch.is_grad_enabled()`, which is always False inside of `forward`.

    Returns:
        loss, a float32 scalar; and correct, the number of rows whose largest logit is that of the
        label. Counting takes time, so it is 0 where gradients are computed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, chunk, with_gradients=True):
        device = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else hidden.dtype
        needed = [with_gradients and is_needed for is_needed in ctx.needs_input_grad[:3]]
        gradients = [None, None, None]  # of hidden, weight and bias
        for index, tensor in enumerate((hidden, weight, bias)):
            if needed[index]:
                # the chunks add to those of weight and bias, in float32
                sum_dtype = hidden.dtype if index == 0 else torch.float32
                gradients[index] = torch.zeros_like(tensor, dtype=sum_dtype)
        # two tensors, not two views of one, of which FSDP2 warns
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            for rows in torch.arange(len(labels), device=hidden.device).split(chunk):
                part, label = hidden[rows].to(dtype), labels[rows, None]
                logits = compute_logits(part, head, offset, scale, softcap)
                log_probabilities = functional.log_softmax(logits, -1)
                loss -= log_probabilities.gather(-1, label).sum()
                if not any(needed):
                    correct += (logits.argmax(-1, keepdim=True) == label).sum()
                    continue
                gradient = logits_gradient(logits, log_probabilities, label, scale, softcap)
                del logits, log_probabilities
                gradient = gradient.to(dtype)
                add_gradients(gradients, gradient, rows, part, head)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, gradient, _):
        inputs = [
            None if tensor is None else (tensor * gradient).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *inputs, None, None, None, None, None


def compute_logits(hidden, weight, bias, scale, softcap):
    """Return the float32 logits of a linear head."""
    logits = functional.linear(hidden, weight, bias).float()
    if scale != 1:
        logits *= scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def logits_gradient(logits, log_probabilities, label, scale, softcap):
    """Return the gradient of the loss by the linear layer's output. Overwrites log_probabilities.

    By the logits it is the softmax, minus 1 at the label.
    """
    minus_one = torch.full_like(label, -1, dtype=torch.float32)
    gradient = log_probabilities.exp_().scatter_add_(-1, label, minus_one)
    if softcap is not None:
        gradient *= 1 - (logits / softcap) ** 2  # the derivative of softcap * tanh(x / softcap)
    if scale != 1:
        gradient *= scale
    return gradient


def add_gradients(gradients, gradient, rows, hidden, weight):
    """Add a chunk's gradients by hidden, weight and bias, in place, where they are not None.

    Args:
        gradients: those by hidden [all rows, size], weight and bias.
        gradient: that by the linear layer's output, [rows of the chunk, vocabulary].
        rows: indices of the chunk's rows.
        hidden: of the chunk, [rows of the chunk, size].
    """
    by_hidden, by_weight, by_bias = gradients
    if by_hidden is not None:
        by_hidden[rows] = (gradient @ weight).to(by_hidden.dtype)
    if by_weight is not None:
        by_weight += (gradient.T @ hidden).float()
    if by_bias is not None:
        by_bias += gradient.float().sum(0)


# The loss of a model ------------------------------------------------------------------------------
def head_options(config):
    """Return scale and soft cap of a model's logits, as its config names them.

    Granite, Cohere, Gemma 2, Gemma 3 and others have them.
    """
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)


def add_token_loss(model, chunk_bytes=None):
    """Let `model(input_ids=..., labels=...)` return {"loss", "correct"}, sums over the labels.

    Labels of -100 do not count. A label stands where its token stands, as in transformers. Without
    labels the model answers as before, so it still generates. Call this once, before
    `accelerator.prepare`. Nothing is added to the modules, so every strategy shards them as before.

    `label_positions` [n], as `join` in packing.py makes them, say which positions of a single row
    have a next token with a label. Without them the labels are searched, and the CPU waits for the
    GPU.

    A head that is one linear layer, frozen or trained, computes its own loss in one call, so ZeRO-3
    and FSDP gather it once for all chunks. Any other head (with LoRA, or in 4 bits) is called for
    each chunk, and again in the backward. Each call may be a collective, so the processes agree on
    the number of chunks.

    Args:
        model: a causal language model of transformers, or a `PeftModel` of one.
        chunk_bytes: how large the float32 logits of a chunk may be; None chooses by device.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    scale, softcap = head_options(causal.config.get_text_config())
    plain = causal.forward
    # Llama 4 calls its base by another name than the one that it declares
    base = causal.model if causal.base_model is causal else causal.base_model
    leaf = causal.get_output_embeddings()
    if hasattr(leaf, "modules_to_save"):  # PEFT's copy of a head that is trained in full
        leaf = leaf.modules_to_save["default"]
    is_sharded = hasattr(leaf.weight, "ds_shape")  # by ZeRO-3
    vocabulary = leaf.weight.ds_shape[0] if is_sharded else leaf.out_features
    is_linear = type(leaf) is torch.nn.Linear
    rows_of_chunk = partial(chunk_rows, vocabulary=vocabulary, chunk_bytes=chunk_bytes)

    if is_linear:
        plain_head = leaf.forward

        def head_forward(hidden, labels=None):
            if labels is None:
                return plain_head(hidden)
            options = (scale, softcap, rows_of_chunk(hidden), torch.is_grad_enabled())
            return HeadLoss.apply(hidden, leaf.weight, leaf.bias, labels, *options)

        leaf.forward = head_forward

    @wraps(plain)  # generate looks at its arguments, to ask for the logits of the last token alone
    def forward(input_ids=None, labels=None, full_logits=False, label_positions=None, **kwargs):
        if labels is None or full_logits:
            return plain(input_ids=input_ids, labels=labels, **kwargs)
        starts = kwargs.get("cu_seq_lens_q")
        if starts is not None and len(starts) == 2:
            # one document needs no borders, and some models need missing kernels for them
            kwargs = {name: kwargs[name] for name in kwargs if name not in BORDERS}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        hidden = base(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        at = labels.ne(-100) if label_positions is None else label_positions
        rows, labels = hidden[at], labels[at]
        head = causal.get_output_embeddings()
        if is_linear:
            loss, correct = head(rows, labels=labels)
        else:
            loss, correct = loss_of_chunks(head, rows, labels, scale, softcap, rows_of_chunk(rows))
        return {"loss": loss, "correct": correct}

    causal.forward = forward


def chunk_rows(hidden, vocabulary, chunk_bytes):
    """Return how many rows of float32 logits fit into a chunk."""
    limit = chunk_bytes or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK)
    return max(1, int(limit / 4 / vocabulary))


def loss_of_chunks(head, rows, labels, scale, softcap, chunk):
    """Return loss and correct rows of a head that is not a plain linear layer. Collective.

    Each chunk is recomputed in the backward, so that no logits are kept.

    Args:
        rows: hidden states [n, size]. labels: [n].
        chunk: number of rows that may have their logits at the same time.
    """

    def loss_of(hidden, labels):
        logits = head(hidden).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        correct = (logits.argmax(-1) == labels).sum()
        return functional.cross_entropy(logits, labels, reduction="sum"), correct

    chunks = torch.tensor(max(1, math.ceil(len(labels) / chunk)), device=rows.device)
    if torch.distributed.is_initialized():  # each call of the head may be a collective
        torch.distributed.all_reduce(chunks, torch.distributed.ReduceOp.MAX)
    parts = zip(rows.tensor_split(int(chunks)), labels.tensor_split(int(chunks)), strict=True)
    losses = [checkpoint(loss_of, *part, use_reentrant=False) for part in parts]
    return sum(loss for loss, _ in losses), sum(correct for _, correct in losses)


# The check ----------------------------------------------------------------------------------------
def check_token_loss(accelerator, model, packed, alone):
    """Return why the loss of packed documents is wrong for this model, or None where it is right.

    All processes return the same, that of the first which finds it wrong. See `wrong_loss`.
    Collective: every process calls it on the prepared model.
    """
    reasons = gather_object([wrong_loss(accelerator, model, packed, alone)])
    return next(filter(None, reasons), None)


def wrong_loss(accelerator, model, packed, alone):
    """Return why the loss of packed documents is wrong in this process, or None where it is right.

    Two things are measured. The loss of the documents in one row must be the sum of their own
    losses, as transformers computes them with eager attention and all logits; this finds a head
    that is more than a linear layer. And other tokens in the first document must not change the
    loss of the others; this finds attention across document borders. An error that the model
    raises is a reason, too; its traceback is logged at the level debug.

    Args:
        packed: a batch of several short documents, of at least two tokens each.
        alone: for each document a batch of its own, of which input_ids and labels are used.
            All are moved to the device, because a bare model and DeepSpeed's engine move no inputs.
    """
    packed, alone = send_to_device((packed, alone), accelerator.device)
    causal = causal_model(accelerator, model)
    was_training, attention = model.training, causal.config._attn_implementation
    name = type(causal).__name__
    model.eval()
    try:
        with torch.no_grad():
            ours, theirs, before, after = losses_of_documents(model, causal, packed, alone)
    except (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError):
        raise  # not the model's
    except Exception as error:  # whatever the model raises
        if "gloo" in str(error) or "Connection closed by peer" in str(error):
            raise  # another process has ended
        logging.get_logger("transformers").debug("The forward pass fails:", exc_info=True)
        told = str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__
        return f"{name} raises an error ({told})"
    finally:
        causal.set_attn_implementation(attention)
        model.train(was_training)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = causal.get_input_embeddings().weight.dtype
    dtype = dtypes.get(accelerator.mixed_precision, dtype)
    if abs(before - after) > LEAK[dtype] * abs(before):
        return f"{name} mixes documents that are side by side in a row"
    if abs(ours - theirs) <= TOLERANCE[dtype] * abs(theirs):  # false if one is NaN
        return None
    return (
        f"{name} has a loss of {theirs:.4f} on documents one by one, and of {ours:.4f} on the same "
        "documents side by side"
    )


def causal_model(accelerator, model):
    """Return the causal language model inside of a prepared model, without its adapter."""
    causal = accelerator.unwrap_model(model)
    return causal.get_base_model() if hasattr(causal, "peft_config") else causal


def losses_of_documents(model, causal, packed, alone):
    """Return four losses for `check_token_loss`. Leaves the model with eager attention.

    That of the packed documents; the sum of their own, computed by transformers; and that of all
    but the first document, with the tokens of the first in their order and in reverse.
    """
    ours = float(model(**packed)["loss"])
    first = alone[0]["input_ids"].shape[1]  # tokens of the first document
    ids, labels = packed["input_ids"].clone(), packed["labels"].clone()
    ids[:, :first], labels[:, :first] = ids[:, :first].flip(1), -100
    others = packed | {"labels": labels, "label_positions": None}
    before = float(model(**others)["loss"])
    after = float(model(**others | {"input_ids": ids})["loss"])
    causal.set_attn_implementation("eager")
    theirs = 0.0
    for batch in alone:
        inputs = {name: batch[name] for name in ("input_ids", "labels")}
        mean = float(model(**inputs, use_cache=False, full_logits=True).loss)
        theirs += mean * int(batch["labels"][:, 1:].ne(-100).sum())
    return ours, theirs, before, after


def attention_that_works(accelerator, model, packed, alone):
    """Return an attn_implementation with which `check_token_loss` finds no fault, None without one.

    Each is tried on the model, which keeps the last one. Arguments are those of `check_token_loss`.
    Collective.
    """
    causal = causal_model(accelerator, model)
    others = [name for name in ATTENTIONS if name != causal.config._attn_implementation]
    for name in others if causal._can_set_attn_implementation() else ():
        try:
            causal.set_attn_implementation(name)
        except (ValueError, ImportError):  # the model does not have it
            continue
        if check_token_loss(accelerator, model, packed, alone) is None:
            return name
    return None
