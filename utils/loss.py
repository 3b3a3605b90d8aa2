"""The loss of a causal language model, at the positions that have a label and without ever holding all logits.

A vocabulary of 128,256 entries makes 4 bytes x 128,256 = 0.5 MB of logits of every token, and the loss holds them
several times: more memory than the rest of a small model's training. Here only positions with a label reach the head,
a chunk of them at a time, and what is kept of a chunk is its gradient towards the hidden states. The idea is that of
Liger's fused linear cross-entropy (arXiv:2410.10989) and of Cut Your Losses (arXiv:2411.09009), in plain PyTorch.

This file imports no other file of the project and can be copied along with a script.
"""

from functools import wraps

import torch
from accelerate.utils import send_to_device
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MB = 2**20
# How large the float32 logits of a chunk may be. Every chunk reads the head's weight once, so a
# GPU wants large chunks (computed, not measured).
GPU_CHUNK, CPU_CHUNK = 512 * MB, 64 * MB
# how far the two may differ: the sum of a few dozen terms in the arithmetic of the run
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# the loss of one document, by which it may change with another's tokens: by nothing, but for experts' roundings
LEAK = {torch.float32: 5e-7, torch.bfloat16: 1e-3, torch.float16: 1e-3}


class HeadLoss(torch.autograd.Function):
    """Cross-entropy, summed over the rows, of a linear head's logits; the gradients are made along with the loss.

    apply(hidden, weight, bias, labels, scale, softcap, chunk, gradients) -> (loss, correct), both scalars in float32

        hidden [n, h], weight [v, h], bias [v] or None; labels [n], none of them -100; n may be 0
        scale, softcap: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); softcap None: no tanh
        chunk: how many rows have their logits at the same time
        gradients: torch.is_grad_enabled(), which is not to be seen from inside
        correct: how many rows have their largest logit at the label; 0 where gradients are made, for it takes time
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, chunk, gradients=True):
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        for_hidden, for_weight, for_bias = (
            gradients and needed for needed in ctx.needs_input_grad[:3]
        )
        to_hidden = torch.zeros_like(hidden) if for_hidden else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        loss, correct = (
            hidden.new_zeros((), dtype=torch.float32) for _ in range(2)
        )  # no views, of which FSDP2 warns
        with torch.autocast(device, enabled=False):
            head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in torch.arange(len(labels), device=hidden.device).split(chunk):
                part, label = hidden[rows].to(dtype), labels[rows, None]
                logits = functional.linear(part, head, offset).float()
                if scale != 1:
                    logits *= scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                likelihood = functional.log_softmax(logits, -1)
                loss -= likelihood.gather(-1, label).sum()
                if not (for_hidden or for_weight or for_bias):
                    correct += (logits.argmax(-1, keepdim=True) == label).sum()
                    continue
                # towards the logits: the softmax, minus 1 at the label
                gradient = likelihood.exp_().scatter_add_(
                    -1, label, torch.full_like(label, -1, dtype=torch.float32)
                )
                if softcap is not None:
                    gradient *= 1 - (logits / softcap) ** 2
                if scale != 1:
                    gradient *= scale
                del logits
                gradient = gradient.to(dtype)
                if for_hidden:
                    to_hidden[rows] = (gradient @ head).to(to_hidden.dtype)
                if for_weight:
                    to_weight += (gradient.T @ part).float()
                if for_bias:
                    to_bias += gradient.float().sum(0)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, gradient, _):
        own = [
            None if tensor is None else (tensor * gradient).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *own, None, None, None, None, None


def head_options(config):
    """Return scale and soft cap of a model's logits as its config names them: Granite, Cohere, Gemma 2 and 3, ..."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)


def add_token_loss(model, chunk_bytes=None):
    """Let `model(input_ids=..., labels=...)` return {"loss", "correct"}, each a sum over the labels that are not -100.

    To be called once on a causal language model of transformers, bare or in a `PeftModel`, before
    `accelerator.prepare`: nothing is added to the modules, so every strategy shards them as before. Without labels the
    model answers as ever, so that it still generates. A label stands where its token stands, as in transformers.
    `label_positions` [n], as `join` in packing.py makes them, say which positions of a single row
    have a next token with a label. Without them the labels are searched, and the CPU waits for the
    GPU.

    A head that is one linear layer, frozen or trained, computes its own loss in one call, so that ZeRO-3 and FSDP
    gather it once for all chunks. Any other head (LoRA on it, 4 bits) is called for each chunk, and again in the
    backward; the processes then agree on the number of chunks, for each call may be a collective.

    Args:
        chunk_bytes: how large the float32 logits of a chunk may be; None chooses by device.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    config = causal.config.get_text_config()
    scale, softcap = head_options(config)
    plain = causal.forward
    leaf = causal.get_output_embeddings()
    if hasattr(leaf, "modules_to_save"):  # PEFT's copy of a head that is trained whole
        leaf = leaf.modules_to_save["default"]
    vocabulary = leaf.weight.ds_shape[0] if hasattr(leaf.weight, "ds_shape") else leaf.out_features
    is_linear = type(leaf) is torch.nn.Linear

    def rows_of_chunk(hidden):
        limit = chunk_bytes or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK)
        return max(1, int(limit / 4 / vocabulary))

    if is_linear:
        logits_of = leaf.forward

        def head_forward(hidden, labels=None):
            if labels is None:
                return logits_of(hidden)
            options = (scale, softcap, rows_of_chunk(hidden), torch.is_grad_enabled())
            return HeadLoss.apply(hidden, leaf.weight, leaf.bias, labels, *options)

        leaf.forward = head_forward

    def chunk_loss(hidden, labels):
        logits = causal.get_output_embeddings()(hidden).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        correct = (logits.argmax(-1) == labels).sum()
        return functional.cross_entropy(logits, labels, reduction="sum"), correct

    @wraps(
        plain
    )  # whose arguments generate looks at, to ask for the logits of the last token alone
    def forward(input_ids=None, labels=None, full_logits=False, label_positions=None, **kwargs):
        if labels is None or full_logits:
            return plain(input_ids=input_ids, labels=labels, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        hidden = causal.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        at = labels.ne(-100) if label_positions is None else label_positions
        rows, labels = hidden[at], labels[at]
        if is_linear:
            loss, correct = causal.get_output_embeddings()(rows, labels=labels)
            return {"loss": loss, "correct": correct}
        chunks = torch.tensor(max(1, -(-len(labels) // rows_of_chunk(rows))), device=rows.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(chunks, torch.distributed.ReduceOp.MAX)
        losses = [
            checkpoint(chunk_loss, *part, use_reentrant=False)
            for part in zip(rows.tensor_split(int(chunks)), labels.tensor_split(int(chunks)))
        ]
        return {
            "loss": sum(loss for loss, _ in losses),
            "correct": sum(correct for _, correct in losses),
        }

    causal.forward = forward


def check_token_loss(accelerator, model, packed, alone):
    """Return None where documents side by side have the loss that transformers computes for each alone, or why not.

    The model's own code, its eager attention and all of its logits are the judge. So a head that is more than a linear
    layer is found, and an attention that looks beyond its document; this also by a change of the first document, which
    may not move the loss of the others. Collective: call it on the prepared model.

    Args:
        packed: a batch of several short documents, at least two tokens each.
        alone: for each of these a batch of its own, of which `input_ids` and `labels` are used.
            Both may be on any device: they are moved here. A bare model and DeepSpeed's engine move
            no inputs.
    """
    packed, alone = send_to_device((packed, alone), accelerator.device)
    causal = accelerator.unwrap_model(model)
    causal = causal.get_base_model() if hasattr(causal, "peft_config") else causal
    was_training, attention = model.training, causal.config._attn_implementation
    model.eval()
    with torch.no_grad():
        ours = float(model(**packed)["loss"])
        causal.set_attn_implementation("eager")
        theirs = 0.0
        for batch in alone:
            inputs = {
                "input_ids": batch["input_ids"],
                "labels": batch["labels"],
                "use_cache": False,
            }
            mean = float(model(**inputs, full_logits=True).loss)
            theirs += mean * int(batch["labels"][:, 1:].ne(-100).sum())
        causal.set_attn_implementation(attention)
        first = int(packed["cu_seq_lens_q"][1])
        ids, labels = packed["input_ids"].clone(), packed["labels"].clone()
        ids[:, :first], labels[:, :first] = ids[:, :first].flip(1), -100
        others = packed | {"labels": labels, "label_positions": None}
        kept = float(model(**others)["loss"])
        changed = float(model(**others | {"input_ids": ids})["loss"])
    model.train(was_training)
    weight = causal.get_input_embeddings().weight
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        accelerator.mixed_precision, weight.dtype
    )
    if abs(kept - changed) > LEAK[dtype] * abs(kept):
        return f"{type(causal).__name__} lets documents that stand side by side see each other"
    if abs(ours - theirs) <= TOLERANCE[dtype] * abs(theirs):
        return None
    return f"{type(causal).__name__} has a loss of {theirs:.4f} on documents one by one, and of {ours:.4f} side by side"
