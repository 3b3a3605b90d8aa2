"""Documents side by side in a row: none is lost, none sees another, and the seed orders them."""

import copy
import random
from functools import partial
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from utils import packing
from utils.chat.token_loss import add_token_loss, check_token_loss
from utils.packing import (
    best_fit,
    build_loader,
    join,
    pack,
    shuffled_sequences,
    split_evenly,
    stream_sequences,
)


def make_documents(lengths, seed=0, vocabulary=600):
    """Return documents of random tokens, of which two in three carry a label."""
    draw = random.Random(seed)
    documents = []
    for length in lengths:
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        labels = [token if draw.random() < 2 / 3 else -100 for token in ids]
        documents.append({"input_ids": ids, "labels": [*labels[:-1], ids[-1]]})
    return documents


# Places -------------------------------------------------------------------------------------------
def random_lengths(kind, count, capacity, draw):
    return {
        "any": [draw.randint(1, capacity) for _ in range(count)],
        "short": [draw.randint(1, 1 + capacity // 10) for _ in range(count)],
        "halves": [draw.randint(capacity // 3, capacity // 2) for _ in range(count)],
        "whole": [capacity] * count,
        "ones": [1] * count,
    }[kind]


@pytest.mark.parametrize("kind", ["any", "short", "halves", "whole", "ones"])
@pytest.mark.parametrize("capacity", [1, 2, 7, 256])
def test_best_fit_holds_every_document_once_within_the_capacity(kind, capacity):
    draw = random.Random(capacity)
    for count in (0, 1, 2, 3, 50, 300):
        lengths = [
            min(length or 1, capacity) for length in random_lengths(kind, count, capacity, draw)
        ]
        bins = best_fit(lengths, capacity)
        assert sorted(index for one in bins for index in one) == list(range(count))
        assert all(one and sum(lengths[index] for index in one) <= capacity for one in bins)
        fewest = -(-sum(lengths) // capacity)
        large = sum(length > capacity / 2 for length in lengths)  # no two of these share a bin
        small = sum(2 * length <= capacity for length in lengths)
        assert (
            max(fewest, large)
            <= len(bins)
            <= max(11 / 9 * max(fewest, large, 1) + 1, large + small / 2 + 1)
        )


def test_best_fit_of_many_documents_leaves_little_room():
    draw = random.Random(1)
    lengths = [min(4096, int(draw.lognormvariate(6, 1)) + 1) for _ in range(50_000)]
    bins = best_fit(lengths, 4096)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in one) for one in bins) <= 4096
    assert len(bins) <= 1.001 * sum(lengths) / 4096 + 1


def test_best_fit_takes_the_fullest_bin_that_has_room():
    assert best_fit([5, 6, 3, 4], 10) == [[1, 3], [0, 2]]
    assert best_fit([6, 3, 5, 4, 1, 1], 10) == [[0, 3], [2, 1, 4, 5]]
    assert best_fit([10, 10, 1], 10) == [[0], [1], [2]]


def test_without_packing_every_document_has_a_place_of_its_own():
    assert pack([3, 1, 2], 10, False) == [[0], [1], [2]]
    assert pack([3, 1, 2], 10, True) == [[0, 2, 1]]


# Batches ------------------------------------------------------------------------------------------
def test_join_restarts_positions_and_drops_the_first_label_of_each():
    batch = join(
        [
            {"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
            {"input_ids": [8], "labels": [8]},
            {"input_ids": [9, 10], "labels": [-100, 10]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, -100, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 12])
def test_split_evenly_gives_every_document_once_and_all_processes_as_many_batches(
    count, processes, size
):
    documents = make_documents(range(2, count + 2))
    sequences = [[index] for index in range(count)]
    splits = [
        split_evenly(sequences, documents, size, process, processes) for process in range(processes)
    ]
    assert len({len(batches) for batches in splits}) == 1
    real = [batch for batches in splits for batch in batches if batch["labels"].ne(-100).any()]
    borders = [(batch, batch["cu_seq_lens_q"].tolist()) for batch in real]
    found = [
        batch["input_ids"][0, start:end].tolist()
        for batch, starts in borders
        for start, end in zip(starts, starts[1:])
    ]
    assert sorted(found) == sorted(document["input_ids"] for document in documents)
    assert all(len(starts) <= size + 1 for _, starts in borders)
    fillers = [
        batch for batches in splits for batch in batches if not batch["labels"].ne(-100).any()
    ]
    assert len(fillers) < processes and all(batch["input_ids"].shape == (1, 2) for batch in fillers)


def first_tokens(batches):
    """Return the first token of each document, which tells the documents apart, batch by batch."""
    return [batch["input_ids"][0, batch["cu_seq_lens_q"][:-1].long()].tolist() for batch in batches]


def numbered(lengths):
    """Return documents whose first token is their number."""
    return [
        {"input_ids": [number] + [7] * (length - 1), "labels": [7] * length}
        for number, length in enumerate(lengths)
    ]


@pytest.fixture
def endless():
    """Documents of random lengths, and their packed sequences in an order without end."""
    draw = random.Random(2)
    documents = numbered([draw.randint(2, 20) for _ in range(37)])
    sequences = best_fit([len(document["input_ids"]) for document in documents], 32)
    return documents, partial(shuffled_sequences, sequences, 3, True)


def loaded(endless, size, start, process, processes, num_workers=0, count=8):
    documents, sequences = endless
    skipped = start * size * processes
    loader = build_loader(sequences, documents, size, skipped, process, processes, num_workers)
    return first_tokens(islice(loader, count))


def test_the_places_of_an_update_are_the_same_on_any_number_of_processes(endless):
    alone = loaded(endless, 6, 0, 0, 1)
    for processes in (2, 3, 6):
        parts = [
            loaded(endless, 6 // processes, 0, process, processes) for process in range(processes)
        ]
        assert [sum(update, []) for update in zip(*parts)] == alone
    assert sum(loaded(endless, 1, 0, 0, 1, count=48), []) == sum(alone, [])  # accumulated, too


@pytest.mark.parametrize("start", [1, 3, 7, 100])
def test_a_loader_goes_on_where_another_stopped(endless, start):
    for whose in ((0, 1), (0, 2), (1, 2)):
        whole = loaded(endless, 3, 0, *whose, count=start + 5)
        assert loaded(endless, 3, start, *whose, count=5) == whole[start:]


def test_workers_change_nothing(endless):
    alone = loaded(endless, 3, 2, 1, 2)
    assert [loaded(endless, 3, 2, 1, 2, workers) for workers in (1, 2)] == [alone, alone]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_draws_no_random_number_of_others(endless, workers):
    before, python = torch.get_rng_state(), random.getstate()
    loaded(endless, 3, 0, 0, 1, workers)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python


def test_every_pass_shuffles_all_places_anew():
    sequences = [[number] for number in range(20)]
    passes = list(islice(shuffled_sequences(sequences, 5, True), 60))
    passes = [passes[:20], passes[20:40], passes[40:]]
    assert all(sorted(one) == sequences for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert list(islice(shuffled_sequences(sequences, 5, True), 20)) == passes[0]
    assert list(islice(shuffled_sequences(sequences, 6, True), 20)) not in (passes[0], sequences)
    assert list(islice(shuffled_sequences(sequences, 5, False), 40)) == sequences * 2


def test_a_stream_is_packed_in_windows_pass_after_pass():
    seen = []

    def read(epoch):
        seen.append(epoch)
        return numbered([3, 4, 5, 6, 2])

    sequences = list(islice(stream_sequences(read, 10, True, window=4), 6))
    numbers = [[document["input_ids"][0] for document in sequence] for sequence in sequences]
    assert (
        numbers == [[3, 1], [2, 0], [4]] * 2
    )  # 6 + 4, 5 + 3, and the last for which the window has no room
    assert seen == [0, 1]
    sequences = list(islice(stream_sequences(read, 10, False), 5))
    assert [[document["input_ids"][0] for document in sequence] for sequence in sequences] == [
        [n] for n in range(5)
    ]


def test_a_stream_loads_like_data_in_memory():
    documents = numbered(range(2, 30))
    sequences = [[number] for number in range(len(documents))]
    stored = loaded((documents, partial(shuffled_sequences, sequences, 0, False)), 4, 1, 1, 2)
    streamed = loaded(
        (None, partial(stream_sequences, lambda epoch: documents, 32, False)), 4, 1, 1, 2
    )
    assert streamed == stored


# Attention ----------------------------------------------------------------------------------------
SIZE = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {  # architecture -> settings of its own; a window is shorter than the documents
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}
MIXING = {  # models that hand no borders of documents to their attention
    "bloom": {"n_head": 4, "n_layer": 2},
    "stablelm": {},
}


def random_model(architecture, attention, **settings):
    """Return a model whose weights are large enough for every token to count."""
    config = AutoConfig.for_model(
        architecture, **(SIZE | (MODELS | MIXING)[architecture] | settings)
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def models():
    """Each architecture twice with the same weights: as trained here, and as in transformers."""
    pairs = {}
    for architecture in MODELS:
        plain = random_model(architecture, "eager")
        ours = copy.deepcopy(plain)
        ours.set_attn_implementation(packing.NAME)
        add_token_loss(ours, chunk_bytes=4 * 600 * 5)
        pairs[architecture] = ours, plain
    return pairs


def packings(count, seed):
    """Return several ways to put documents of random lengths into sequences."""
    draw = random.Random(seed)
    for _ in range(count):
        documents = make_documents(
            [draw.choice([2, 3, 9, 17, 40]) for _ in range(7)], draw.random()
        )
        order = draw.sample(range(7), 7)
        cuts = [0, *sorted(draw.sample(range(1, 7), 2)), 7]
        yield documents, [order[begin:end] for begin, end in zip(cuts, cuts[1:])]


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


def difference(some, others):
    """Return the largest difference of two sets of gradients, relative to each tensor's largest."""
    assert some.keys() == others.keys()
    return max(
        float((some[name] - others[name]).abs().max() / others[name].abs().max()) for name in some
    )


@pytest.mark.parametrize("architecture", MODELS)
def test_packed_documents_have_the_loss_and_the_gradients_of_each_alone(models, architecture):
    ours, plain = models[architecture]
    for documents, sequences in packings(3, seed=4):
        alone, sums = [], {}
        for document in documents:
            ids, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
            targets = int(labels[:, 1:].ne(-100).sum())
            loss = plain(input_ids=ids, labels=labels, use_cache=False).loss * targets
            loss.backward()
            alone.append(loss.item())
            for name, gradient in gradients(plain).items():
                sums[name] = sums.get(name, 0) + gradient
        for sequence in sequences:
            loss = ours(**join([documents[index] for index in sequence]))["loss"]
            assert loss.item() == pytest.approx(sum(alone[index] for index in sequence), rel=1e-4)
            loss.backward()
        assert difference(gradients(ours), sums) < 1e-4


@pytest.mark.parametrize("architecture", MODELS)
def test_the_gradient_of_a_document_is_that_of_it_alone(models, architecture):
    ours, _ = models[architecture]
    documents = make_documents([17, 9, 40, 2], seed=5)
    for index, document in enumerate(documents):
        ours(**join([document]))["loss"].backward()
        alone = gradients(ours)
        silent = [
            one if one is document else one | {"labels": [-100] * len(one["labels"])}
            for one in documents
        ]
        ours(**join(silent))["loss"].backward()
        assert difference(gradients(ours), alone) < 1e-4, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", MODELS)
def test_no_document_sees_another(models, architecture, dtype):
    ours = copy.deepcopy(models[architecture][1]).to(dtype)
    ours.set_attn_implementation(packing.NAME)
    documents = make_documents([17, 9, 40, 2, 24], seed=6)

    @torch.no_grad()
    def logits(documents):
        batch = join(documents)
        starts = batch["cu_seq_lens_q"].diff().tolist()
        return ours(**batch, use_cache=False).logits[0].split(starts)

    before = logits(documents)
    for changed in range(len(documents)):
        others = list(documents)
        others[changed] = make_documents([len(documents[changed]["input_ids"])], seed=7)[0]
        for index, (old, new) in enumerate(zip(before, logits(others))):
            assert torch.equal(old, new) == (index != changed)


@pytest.mark.parametrize("architecture", MODELS)
def test_bfloat16_has_the_loss_of_each_alone(models, architecture):
    plain = copy.deepcopy(models[architecture][1]).bfloat16()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(packing.NAME)
    add_token_loss(ours)
    documents = make_documents([17, 9, 40, 2], seed=8)
    alone = 0.0
    for document in documents:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
        with torch.no_grad():
            alone += float(plain(input_ids=ids, labels=labels).loss) * int(
                labels[:, 1:].ne(-100).sum()
            )
    loss = ours(**join(documents))["loss"]
    assert loss.item() == pytest.approx(alone, rel=3e-2)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in ours.parameters())


def test_a_window_and_a_soft_cap_act(models):
    """What makes the cases of MODELS hard changes the loss: the tests above would notice."""
    document = join(make_documents([40], seed=9))
    for architecture, names in {
        "mistral": ["sliding_window"],
        "gemma2": list(MODELS["gemma2"])[2:],
    }.items():
        for name in names:
            other = random_model(
                architecture, packing.NAME, **{name: type(MODELS[architecture][name])(10**4)}
            )
            add_token_loss(other)
            with torch.no_grad():
                losses = [
                    float(model(**document)["loss"]) for model in (models[architecture][0], other)
                ]
            assert abs(losses[0] / losses[1] - 1) > 1e-3


@pytest.mark.parametrize("architecture", MODELS)
def test_generation_gives_the_tokens_of_transformers(models, architecture):
    ours, plain = models[architecture]
    options = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]), "do_sample": False}
    options |= {"max_new_tokens": 12, "min_new_tokens": 12}
    assert torch.equal(ours.generate(**options), plain.generate(**options))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def checked(accelerator, model):
    documents = make_documents([17, 9], seed=10)
    return check_token_loss(
        accelerator, model, join(documents), [join([document]) for document in documents]
    )


@pytest.mark.parametrize("architecture", MODELS)
def test_models_that_keep_documents_apart_pass_the_check(accelerator, models, architecture):
    assert checked(accelerator, models[architecture][0]) is None
    assert models[architecture][0].config._attn_implementation == packing.NAME


@pytest.mark.parametrize("architecture", MIXING)
def test_a_model_that_mixes_documents_is_found(accelerator, architecture):
    model = random_model(architecture, packing.NAME if architecture == "stablelm" else "eager")
    add_token_loss(model)
    reason = checked(accelerator, model)
    assert type(model).__name__ in reason and "side by side" in reason


def test_an_attention_of_another_kind_is_refused():
    query = torch.zeros(1, 4, 3, 8)
    module = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear needs position_bias"):
        packing.attend(module, query, query, query, None, position_bias=query)
    with pytest.raises(ValueError, match="Linear needs rows of a batch"):
        packing.attend(module, query.expand(2, -1, -1, -1), query, query, None)
