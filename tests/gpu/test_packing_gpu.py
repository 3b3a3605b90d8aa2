"""Attention on a GPU: it stays within each document and uses the expected kernel."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_loss import make_documents
from test_loss_gpu import distance, make_causal, on_gpu, sum_alone
from torch.utils._python_dispatch import TorchDispatchMode

from utils.chat.token_loss import add_token_loss
from utils.packing import attend, join

pytestmark = pytest.mark.gpu

LENGTHS = (37, 300, 1, 128)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
KERNEL = "torch_attn._varlen_attn"
HAS_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class Operations(TorchDispatchMode):
    """Record the names of all operations that run in the context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, name):
        return sum(one.startswith(f"{name}.") for one in self.names)


def one_by_one(query, key, value, window):
    """Return the causal attention of each document, computed by its definition.

    The shape is [1, tokens, heads, size].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    rows = []
    for part in zip(*(tensor.split(LENGTHS, dim=2) for tensor in (query, key, value))):
        length = part[0].shape[2]
        back = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")
        hidden = (back < 0) | (back >= (window or length))
        scores = (part[0] @ part[1].mT) / part[0].shape[3] ** 0.5
        rows.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ part[2])
    return torch.cat(rows, dim=2).transpose(1, 2)


def check(dtype, size, heads=(8, 2), window=None):
    """Compare output and gradients of `attend` with float64. Return the operations that ran."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), size) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(*shape, device="cuda", generator=generator) for shape in shapes]
    ours = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    batch = on_gpu(join([{"input_ids": [1] * n, "labels": [1] * n} for n in LENGTHS]))
    del batch["input_ids"], batch["labels"], batch["position_ids"]
    module = SimpleNamespace(is_causal=True, num_key_value_groups=heads[0] // heads[1])
    with Operations() as operations:
        found, _ = attend(module, *ours, None, size**-0.5, sliding_window=window, **batch)
    expected = one_by_one(*exact, window)
    towards = torch.randn(found.shape, device="cuda", generator=generator)
    found.backward(towards.to(dtype))
    expected.backward(towards.to(dtype).double())
    assert found.dtype == dtype and distance(found, expected) < TOLERANCE[dtype]
    for one, other in zip(ours, exact):
        assert distance(one.grad, other.grad) < TOLERANCE[dtype]
    return operations


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_for_any_lengths(dtype, size, window, heads):
    operations = check(dtype, size, heads, window)
    assert operations.count(KERNEL) == HAS_KERNEL


@pytest.mark.parametrize("size", [100, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_size_that_the_kernel_does_not_take(dtype, size):
    assert check(dtype, size).count(KERNEL) == 0


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
@pytest.mark.parametrize("size", [64, 128])
def test_float32(size, heads):
    operations = check(torch.float32, size, heads)
    assert operations.count(KERNEL) == 0
    # the math kernel would need memory for all attention scores of a document
    assert operations.count("aten._scaled_dot_product_efficient_attention") == len(LENGTHS)


@pytest.mark.parametrize(
    ("architecture", "settings"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 8})]
)
def test_model_in_bf16_attends_within_each_document(architecture, settings):
    model = make_causal(architecture, torch.bfloat16, **settings).cuda()
    exact = copy.deepcopy(model).float()
    add_token_loss(model)
    batch, documents = on_gpu(join(make_documents())), make_documents()
    with Operations() as operations:
        found = model(**batch)["loss"]
    assert operations.count(KERNEL) == 2 * HAS_KERNEL  # one call per layer, for all documents
    found.backward()
    expected = sum_alone(exact)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    for (name, weight), other in zip(model.named_parameters(), exact.parameters()):
        assert distance(weight.grad, other.grad) < 0.05, name
    inputs = {name: value for name, value in batch.items() if not name.startswith("label")}
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        exact.set_attn_implementation("sdpa")
        ids = [torch.tensor([document["input_ids"]], device="cuda") for document in documents]
        parts = [exact.model(input_ids=one).last_hidden_state for one in ids]
    assert distance(hidden, torch.cat(parts, dim=1)) < 0.03


def test_all_weights_trained_under_autocast_reach_the_kernel():
    """With float32 weights, RoPE makes q and k float32, while v is bf16."""
    model = make_causal("llama", torch.float32).cuda()
    add_token_loss(model)
    with torch.autocast("cuda", torch.bfloat16), Operations() as operations:
        model(**on_gpu(join(make_documents())))["loss"].backward()
    assert operations.count(KERNEL) == 2 * HAS_KERNEL
    assert operations.count("aten._local_scalar_dense") == 0  # the CPU never waits for the GPU
