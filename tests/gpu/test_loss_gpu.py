"""The loss on a GPU: the chunked loss, and chat_sft's check of it before the first update."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from test_loss import FAMILIES, alone, differentiate, full_loss, make_documents
from transformers import AutoConfig, AutoModelForCausalLM

from utils import packing
from utils.chat.token_loss import HeadLoss, add_token_loss, check_token_loss

pytestmark = pytest.mark.gpu

SIZE = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}


def make_causal(architecture, dtype, **settings):
    """Return a random model on the CPU, with attention restricted to each document."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZE | {"tie_word_embeddings": False} | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=packing.NAME, dtype=dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.1)
    return model


def on_gpu(batch):
    """Return the batch with its tensors on the GPU."""
    return {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in batch.items()}


def distance(found, expected):
    """Return the L2 norm of the difference of two tensors, divided by the norm of the second."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def sum_alone(model):
    """Return the sum of transformers' own losses of the single documents, on the GPU."""
    with torch.device("cuda"):
        return alone(model, make_documents())


@pytest.fixture
def accelerator(request):
    yield Accelerator(mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_loss_in_chunks_is_cross_entropy(dtype, tolerance, is_trained, with_bias, softcap):
    generator = torch.Generator().manual_seed(0)
    sizes = ((90, 64), (300, 64), (300,))
    tensors = [torch.randn(*size, generator=generator).cuda() for size in sizes]
    tensors = [(tensor / 4).to(dtype) for tensor in tensors]
    tensors[2] = tensors[2] if with_bias else None
    labels = torch.randint(300, (90,), generator=generator).cuda()
    trained = (True, is_trained, is_trained and with_bias)
    settings = (labels, 1.0, softcap, 16, True)
    loss, _, gradients = differentiate(HeadLoss.apply, tensors, trained, *settings)
    doubles = [None if tensor is None else tensor.double() for tensor in tensors]
    expected, _, others = differentiate(full_loss, doubles, trained, labels, 1.0, softcap)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, other in zip(gradients, others):
        assert (gradient is None) == (other is None)
        assert gradient is None or distance(gradient, other) < tolerance


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {}), ("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})],
)
def test_loss_is_that_of_each_document(architecture, settings):
    model = make_causal(architecture, torch.float32, **settings)
    reference = copy.deepcopy(model).cuda()
    add_token_loss(model)  # on the CPU, like the scripts, which call it before prepare
    found = model.cuda()(**on_gpu(packing.join(make_documents())))["loss"]
    assert found.item() == pytest.approx(sum_alone(reference).item(), rel=1e-4)


@pytest.mark.parametrize("accelerator", ["no", "bf16", "fp16"], indirect=True)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2"])
def test_check_before_the_first_update_takes_batches_from_the_cpu(accelerator, architecture):
    """chat_sft passes batches on the CPU, and only some strategies move inputs to the device."""
    _, settings = FAMILIES[architecture]
    settings = {key: one for key, one in settings.items() if key != "query_pre_attn_scalar"}
    model = make_causal(architecture, torch.float32, **settings)
    add_token_loss(model)
    model = accelerator.prepare(model)
    documents = [make_documents()[number] for number in (0, 3)]
    for document in documents:
        document["labels"] = document["input_ids"]
    packed, single = packing.join(documents), [packing.join([one]) for one in documents]
    assert check_token_loss(accelerator, model, packed, single) is None
