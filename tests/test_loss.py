"""The chunked loss has the value and gradient of the full one, in many models and strategies."""

import copy
from itertools import product

import loss_driver
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT
from models import make_model
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from utils.chat import token_loss as loss_module
from utils.chat.token_loss import HeadLoss, add_token_loss, check_token_loss
from utils.packing import NAME, join

VOCABULARY, HIDDEN, RANK, CHUNK = 300, 16, 4, 20
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}
SIZE |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
}
SIZE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {  # name -> architecture, settings of its own
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 4, "final_logit_softcapping": 1.5},
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "final_logit_softcapping": 1.5}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "gpt2": ("gpt2", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, **NO_DROPOUT}),
    "opt": ("opt", {"ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": HIDDEN}),
    "gpt_neox": ("gpt_neox", {}),
    "phi, whose head has a bias": ("phi", {}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
}
SCALED = ("gemma2", "gemma3", "cohere", "cohere2", "granite")
LORA = {
    "r": RANK,
    "target_modules": ["q_proj", "down_proj"],
    "init_lora_weights": False,
}  # False: lora_B is not 0
ADAPTED = {  # name -> family, settings of LoRA
    "off the head": ("llama", LORA),
    "on the head": ("llama", LORA | {"target_modules": ["q_proj", "lm_head"]}),
    "on a head with a soft cap": ("gemma2", LORA | {"target_modules": ["q_proj", "lm_head"]}),
    "head trained whole": ("llama", LORA | {"modules_to_save": ["lm_head"]}),
    "tied head trained whole": (
        "llama tied",
        LORA | {"modules_to_save": ["lm_head", "embed_tokens"]},
    ),
}


class Watch(TorchDispatchMode):
    """Counts the rows of logits that an operation makes, and that autograd keeps."""

    def __init__(self):
        super().__init__()
        self.made, self.kept = 0, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def rows(self, tensor):
        is_weight = tensor.shape[-2:] in {
            (HIDDEN, VOCABULARY),
            (RANK, VOCABULARY),
        }  # as a product takes it
        return (
            0 if is_weight or tensor.shape[-1:] != (VOCABULARY,) else tensor.numel() // VOCABULARY
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made = max(self.made, self.rows(tensor))
        return result

    def keep(self, tensor):
        self.kept += self.rows(tensor)
        return tensor


@pytest.fixture(scope="module")
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_head(rows, with_bias=False, dtype=torch.float32):
    """Return hidden states, a head's weight and bias, and labels; a third are the likeliest."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((rows, 8), (50, 8), (50,))
    )
    labels = torch.randint(50, (rows,), generator=generator)
    bias = bias if with_bias else None
    labels[::3] = functional.linear(hidden, weight, bias).argmax(-1)[::3]
    return *(
        None if tensor is None else tensor.to(dtype) for tensor in (hidden, weight, bias)
    ), labels


def full_loss(hidden, weight, bias, labels, scale=1.0, softcap=None):
    """Return the loss and the count of correct rows, from all logits in float64."""
    logits = functional.linear(hidden, weight, bias).double() * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, labels, reduction="sum"), (
        logits.argmax(-1) == labels
    ).sum()


def differentiate(function, tensors, trained, *rest):
    """Return the loss, the count of correct rows and the gradients of a third of the loss."""
    tensors = [
        None if tensor is None else tensor.clone().requires_grad_(is_trained)
        for tensor, is_trained in zip(tensors, trained)
    ]
    loss, correct = function(*tensors, *rest)
    (loss / 3).backward()
    return loss.detach(), correct, [None if tensor is None else tensor.grad for tensor in tensors]


def assert_close(found, expected, tolerance=1e-5):
    """Both are None, or apart by no more than a share of the largest of what is expected."""
    assert (found is None) == (expected is None)
    if found is not None:
        apart, largest = (
            (found.double() - expected.double()).abs().max(),
            expected.double().abs().max(),
        )
        assert apart <= tolerance * largest, f"{float(apart):.2e} of {float(largest):.2e}"


def make_documents():
    """Return documents of unlike lengths, one with no label at all and one of a single token."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for number, length in enumerate((37, 11, 1, 23, 40)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = [token if place % 4 or number == 0 else -100 for place, token in enumerate(ids)]
        documents.append({"input_ids": ids, "labels": [-100] * length if number == 1 else labels})
    return documents


def make_causal(family):
    """Return a random model with large enough logits that soft caps and scales tell."""
    architecture, settings = FAMILIES[family]
    config = AutoConfig.for_model(architecture, **(SIZE | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)
    return model


def alone(model, documents):
    """Return transformers' own loss of documents one by one, summed, with eager attention."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    causal.set_attn_implementation("eager")
    losses = []
    for document in documents:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
        if labels[:, 1:].ne(-100).any():
            losses.append(model(input_ids=ids, labels=labels).loss * labels[:, 1:].ne(-100).sum())
    return sum(losses)


def assert_same_gradients(model, reference):
    weights = dict(reference.named_parameters())
    largest = max(weight.grad.abs().max() for weight in weights.values() if weight.grad is not None)
    for name, weight in model.named_parameters():
        expected = weights[name].grad
        if (
            expected is None or expected.abs().max() < 1e-6 * largest
        ):  # a key's bias, that no softmax sees
            assert weight.grad is None or weight.grad.abs().max() < 1e-5 * largest, name
        else:
            assert_close(weight.grad, expected, 2e-5)


@pytest.mark.parametrize("chunk", [1, 3, 19, 100])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_head_loss_is_cross_entropy(chunk, scale, softcap):
    for with_bias, *trained in product([False, True], repeat=4):
        if any(trained[: 2 + with_bias]):
            *tensors, labels = make_head(19, with_bias)
            found = differentiate(
                HeadLoss.apply, tensors, trained, labels, scale, softcap, chunk, True
            )
            _, correct = HeadLoss.apply(*tensors, labels, scale, softcap, chunk, False)
            doubles = [None if tensor is None else tensor.double() for tensor in tensors]
            expected = differentiate(full_loss, doubles, trained, labels, scale, softcap)
            assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
            assert correct == expected[1] and 7 <= correct < 19
            for gradient, other in zip(found[2], expected[2]):
                assert_close(gradient, other)


def test_head_loss_of_no_rows_is_0():
    *tensors, labels = make_head(0, with_bias=True)
    loss, correct, gradients = differentiate(
        HeadLoss.apply, tensors, (True, True, True), labels, 1.0, None, 4, True
    )
    assert (loss, correct) == (0, 0)
    for tensor, gradient in zip(tensors, gradients):
        assert gradient.equal(torch.zeros_like(tensor))


def test_evaluation_counts_what_is_correct_and_makes_no_gradients():
    model = make_causal("llama")
    head = model.get_output_embeddings()
    add_token_loss(model, chunk_bytes=4 * VOCABULARY * CHUNK)
    hidden, labels = torch.randn(50, HIDDEN, requires_grad=True), torch.randint(VOCABULARY, (50,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, correct = head(hidden, labels=labels)
    expected, right = full_loss(hidden, head.weight, None, labels)
    assert (
        loss.item() == pytest.approx(expected.item(), rel=1e-5)
        and correct == right
        and not loss.requires_grad
    )
    assert counter.get_total_flops() == 2 * 50 * HIDDEN * VOCABULARY  # of the logits alone


@pytest.mark.parametrize("is_autocast", [False, True])
def test_head_loss_in_bf16(is_autocast):
    dtype = torch.float32 if is_autocast else torch.bfloat16
    *tensors, labels = make_head(19, with_bias=True, dtype=dtype)
    trained = (True, True, True)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = differentiate(HeadLoss.apply, tensors, trained, labels, 0.5, 3.0, 4, True)
    expected = differentiate(
        full_loss, [tensor.double() for tensor in tensors], trained, labels, 0.5, 3.0
    )
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-2)
    assert found[0].item() != pytest.approx(expected[0].item(), rel=1e-6)  # bf16 it was
    for gradient, other in zip(found[2], expected[2]):
        assert gradient.dtype == dtype
        assert_close(gradient, other, 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_loss_of_transformers(family):
    model, documents = make_causal(family), make_documents()
    reference = copy.deepcopy(model)
    scale, softcap = loss_module.head_options(model.config)
    assert (family in SCALED) == (scale != 1 or softcap is not None)
    add_token_loss(model, chunk_bytes=4 * VOCABULARY * CHUNK)
    outputs, expected = model(**join(documents)), alone(reference, documents)
    assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    outputs["loss"].backward()
    expected.backward()
    assert_same_gradients(model, reference)
    with torch.no_grad():
        correct, right = model(**join(documents))["correct"], 0
        for document in documents:
            ids, labels = torch.tensor([document["input_ids"]]), torch.tensor(document["labels"])
            right += (reference(input_ids=ids).logits[0, :-1].argmax(-1) == labels[1:]).sum()
    assert correct == right


@pytest.mark.parametrize("recomputed", [None, False, True])
@pytest.mark.parametrize("case", ADAPTED)
def test_adapted_models_have_the_loss_of_transformers(case, recomputed):
    family, settings = ADAPTED[case]
    model, documents = get_peft_model(make_causal(family), LoraConfig(**settings)), make_documents()
    reference = copy.deepcopy(model)
    if recomputed is not None:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": recomputed})
        model.get_base_model().enable_input_require_grads()
    add_token_loss(model, chunk_bytes=4 * VOCABULARY * CHUNK)
    found, expected = model.train()(**join(documents))["loss"], alone(reference, documents)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("case", ADAPTED)
def test_no_more_logits_than_a_chunk_are_made_and_none_kept(case):
    family, settings = ADAPTED[case]
    model, batch = (
        get_peft_model(make_causal(family), LoraConfig(**settings)),
        join(make_documents()),
    )
    labels = batch["labels"].ne(-100).sum()
    add_token_loss(model, chunk_bytes=4 * VOCABULARY * CHUNK)
    with Watch() as chunked:
        model(**batch)["loss"].backward()
    assert labels / 5 < chunked.made <= CHUNK < labels and chunked.kept == 0
    with Watch() as full:
        model(**batch, full_logits=True).loss.backward()
    assert full.made >= labels and full.kept >= labels


@pytest.mark.parametrize("case", ADAPTED)
def test_a_batch_without_labels_has_a_loss_of_0(case):
    family, settings = ADAPTED[case]
    model = get_peft_model(make_causal(family), LoraConfig(**settings))
    add_token_loss(model)
    outputs = model(**join(make_documents()[1:3]))
    outputs["loss"].backward()
    assert (outputs["loss"], outputs["correct"]) == (0, 0)
    for name, weight in model.named_parameters():
        assert not weight.requires_grad or weight.grad is not None and not weight.grad.any(), name


@pytest.mark.parametrize("case", [*ADAPTED, "granite", "gpt2"])
def test_generates_as_before(case):
    family, settings = ADAPTED.get(case, (case, None))
    model = make_causal(family)
    model = get_peft_model(model, LoraConfig(**settings)).eval() if settings else model
    prompt = torch.tensor([make_documents()[0]["input_ids"]])
    options = {
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
    }
    expected = model.generate(input_ids=prompt, **options)
    add_token_loss(model)
    with Watch() as watch:
        assert model.generate(input_ids=prompt, **options).equal(expected)
    assert watch.made == 1  # not those of the whole prompt


class OddForCausalLM(LlamaForCausalLM):
    """A model whose logits are more than a linear layer and than its config tells."""

    def forward(self, labels=None, **kwargs):
        outputs = super().forward(**kwargs)
        outputs.logits = outputs.logits * 1.1
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


def check(accelerator, model):
    documents = [
        document for number, document in enumerate(make_documents()) if number not in (1, 2)
    ]
    return check_token_loss(
        accelerator, model, join(documents), [join([document]) for document in documents]
    )


@pytest.mark.parametrize("family", SCALED)
def test_check_passes_what_is_known_and_names_what_is_not(accelerator, monkeypatch, family):
    model = make_causal(family).train()
    unknown = copy.deepcopy(model)
    add_token_loss(model)
    assert check(accelerator, model) is None
    assert model.training and model.config._attn_implementation == NAME
    monkeypatch.setattr(loss_module, "head_options", lambda config: (1.0, None))
    add_token_loss(unknown)
    assert check(accelerator, unknown).startswith(f"{type(model).__name__} has a loss of ")


@pytest.mark.parametrize("is_adapted", [False, True])
def test_check_names_a_head_that_is_more_than_linear(accelerator, is_adapted):
    model = OddForCausalLM(make_causal("llama").config)
    model.load_state_dict(make_causal("llama").state_dict())
    model = get_peft_model(model, LoraConfig(**LORA)) if is_adapted else model
    add_token_loss(model)
    assert check(accelerator, model).startswith("OddForCausalLM has a loss of ")


def test_check_names_a_model_that_looks_beyond_its_document(accelerator):
    config = AutoConfig.for_model(
        "mamba", vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers=1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data *= 5
    add_token_loss(model)
    assert check(accelerator, model).startswith("MambaForCausalLM mixes documents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, untied and tied, for runs under the strategies."""
    folder = tmp_path_factory.mktemp("loss")
    for name in ("llama", "qwen2"):
        make_model(folder / name, name, initializer_range=0.1)
    return folder


@pytest.fixture(scope="module")
def full(folder):
    """Train in one process with transformers' own loss: case -> result of loss_driver.train."""
    steps = loss_driver.ACCUMULATED * loss_driver.PROCESSES
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    whose, options = (
        range(loss_driver.PROCESSES),
        {"full_logits": True, "num_items_in_batch": 1},
    )  # 1: their sum
    yield {
        case: loss_driver.train(accelerator, folder, case, whose, **options)
        for case in loss_driver.CASES
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_processes_have_unlike_numbers_of_chunks():
    rows = [
        [int(b["labels"].ne(-100).sum()) for b in loss_driver.micro_batches(process)]
        for process in (0, 1)
    ]
    assert 0 in rows[1] and 0 not in rows[0] and max(rows[1]) > 7
    assert all(one > other + 7 for one, other in zip(*rows))  # rows of a chunk


@pytest.mark.parametrize(
    "config", [pytest.param("ddp", marks=pytest.mark.slow), "zero3", "fsdp1", "fsdp2"]
)
def test_trains_as_with_the_full_loss(launch, folder, full, config):
    done = launch(
        loss_driver.__file__, config, folder, processes=loss_driver.PROCESSES, PYTHONPATH=str(ROOT)
    )
    assert (
        "returned a view tensor" not in done.stdout
    )  # FSDP2's warning of a loss that may miss its hooks
    found = torch.load(folder / f"{config}.pt")
    assert list(found) == list(full)
    for case, (losses, start, trained, reason) in found.items():
        expected_losses, before, expected, _ = full[case]
        assert reason is None and set(trained) == set(expected), case
        assert losses == pytest.approx(expected_losses, rel=1e-5), case
        for name, value in trained.items():
            assert start[name].equal(before[name]), (case, name)
            moved, apart = (
                (expected[name] - before[name]).abs().max(),
                (value - expected[name]).abs().max(),
            )
            assert moved > 1e-3 and apart <= 1e-5 * moved, (case, name, float(apart / moved))
