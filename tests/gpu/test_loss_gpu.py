"""The loss and the attention on a GPU: Liger's kernel, and torch's attention for sequences of any length."""

import copy
from importlib.util import find_spec

import pytest
import torch
from test_loss import alone, differentiate, full_loss, make_documents
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM

from utils import packing
from utils.loss import add_token_loss, liger_loss

pytestmark = pytest.mark.gpu
needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")

SIZE = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}


def make_causal(architecture, dtype, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZE, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=packing.NAME, dtype=dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.1)
    return model


def on_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def distance(found, expected):
    """Return how far two tensors are apart, as a share of the length of the second."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@needs_liger
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_liger_is_cross_entropy(dtype, tolerance, is_trained, with_bias, softcap):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*size, generator=generator).cuda() for size in ((90, 64), (300, 64), (300,))]
    tensors = [(tensor / 4).to(dtype) for tensor in tensors[: 2 + with_bias]] + [None] * (not with_bias)
    labels = torch.randint(300, (90,), generator=generator).cuda()
    trained = (True, is_trained, is_trained and with_bias)
    loss, _, gradients = differentiate(liger_loss, tensors, trained, labels, 1.0, softcap, 16, True)
    doubles = [None if tensor is None else tensor.double() for tensor in tensors]
    expected, _, others = differentiate(full_loss, doubles, trained, labels, 1.0, softcap)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, other in zip(gradients, others):
        assert (gradient is None) == (other is None)
        assert gradient is None or distance(gradient, other) < tolerance


@needs_liger
def test_liger_takes_a_batch_without_labels_and_leaves_the_count_to_the_evaluation():
    model = make_causal("llama", torch.float32)
    add_token_loss(model)  # on the CPU, as before accelerator.prepare
    model.cuda()
    mute, batch = on_gpu(packing.join(make_documents()[1:3])), on_gpu(packing.join(make_documents()))
    outputs = model(**mute)
    outputs["loss"].backward()
    assert outputs["loss"] == 0 and not model.get_input_embeddings().weight.grad.any()
    outputs = model(**batch)
    with torch.no_grad():
        exact = model(**batch)
    assert outputs["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-3)
    assert outputs["correct"] == 0 and exact["correct"] >= 0


@needs_liger
@pytest.mark.parametrize(
    ("architecture", "settings"), [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})]
)
def test_scaled_logits_are_not_left_to_liger(architecture, settings):
    model = make_causal(architecture, torch.float32, pad_token_id=0, **settings)
    reference = copy.deepcopy(model).cuda()
    add_token_loss(model)
    found = model.cuda()(**on_gpu(packing.join(make_documents())))["loss"]
    assert found.item() == pytest.approx(sum_alone(reference).item(), rel=1e-4)


def sum_alone(model):
    """Return transformers' own loss of the documents one by one, on the GPU."""
    with torch.device("cuda"):
        return alone(model, make_documents())


@pytest.mark.parametrize(("architecture", "settings"), [("llama", {}), ("mistral", {"sliding_window": 8})])
def test_attention_in_bf16_is_that_of_each_document(monkeypatch, architecture, settings):
    calls, kernel = [], varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    model = make_causal(architecture, torch.bfloat16, **settings).cuda()
    exact = copy.deepcopy(model).float()
    add_token_loss(model)
    batch, documents = on_gpu(packing.join(make_documents())), make_documents()
    found = model(**batch)["loss"]
    found.backward()
    assert len(calls) == 2  # one a layer, for all documents
    expected = sum_alone(exact)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    for (name, weight), other in zip(model.named_parameters(), exact.parameters()):
        assert distance(weight.grad, other.grad) < 0.05, name
    with torch.no_grad():
        hidden = model.model(**{name: value for name, value in batch.items() if name != "labels"}).last_hidden_state
        exact.set_attn_implementation("sdpa")
        ids = [torch.tensor([document["input_ids"]], device="cuda") for document in documents]
        parts = [exact.model(input_ids=one).last_hidden_state for one in ids]
    assert distance(hidden, torch.cat(parts, dim=1)) < 0.03
