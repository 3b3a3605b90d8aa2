"""A model that ZeRO-3 or FSDP shards is read or drawn in slices: little memory, same weights."""

import copy
import json
import random
import shutil
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate.utils import set_seed
from conftest import ROOT
from models import CAUSAL, SEQ2SEQ, make_data, make_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, MixtralConfig
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

from benchmarks.loading import make_model as make_large

from utils import sharded_loading
from utils.lazy_weights import DrawnTensor, FileTensor, LazyTensor, drawing
from utils.model_files import check_model
from utils.sharded_loading import engine_dtype, is_converted, load_sharded

BENCHMARK = ROOT / "benchmarks/loading.py"
slow = pytest.mark.slow
FIRST = (
    "llama",
    "qwen2",
    "gpt2",
    "t5",
)  # tied and not, transposed weights, weights kept in float32
ARCHITECTURES = [
    name if name in FIRST else pytest.param(name, marks=slow) for name in (*CAUSAL, *SEQ2SEQ)
]


def auto_class(architecture):
    return AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM


def load_stock(auto, *args, **options):
    return auto.from_pretrained(*args, **options)


def round_file(folder, names=""):
    """Round the weights of a model's file to bfloat16 whose names contain a text."""
    file = folder / "model.safetensors"
    weights = {
        name: value.bfloat16() if names in name else value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return folder


def check_equal(model, stock):
    """Check names, values, dtypes and ties of weights and buffers of two models."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, kind)()) for one in (model, stock))
        assert list(ours) == list(theirs) and (ours or kind == "named_buffers")
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert ours[name].requires_grad == value.requires_grad
            assert torch.equal(ours[name].cpu() + 0, value), name


@pytest.fixture
def fsdp(monkeypatch):
    """Let a model be loaded as under FSDP; the fixture is FSDP's plugin."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    state = SimpleNamespace(fsdp_plugin=plugin)
    monkeypatch.setattr(sharded_loading, "AcceleratorState", lambda: state)
    return plugin


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small model in bfloat16."""
    return round_file(make_model(tmp_path_factory.mktemp("small") / "llama", "llama"))


# The weights --------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_weights_are_those_of_the_stock_loader(fsdp, tmp_path, architecture):
    folder, auto = (
        round_file(make_model(tmp_path / "model", architecture)),
        auto_class(architecture),
    )
    for dtype, in_file in ((torch.float32, True), (torch.bfloat16, False)):
        model = load_sharded(auto, folder, dtype=dtype, use_safetensors=True)
        assert {isinstance(weight, FileTensor) for weight in model.parameters()} == {in_file}
        check_equal(model, auto.from_pretrained(folder, dtype=dtype, use_safetensors=True))
    assert not fsdp.cpu_ram_efficient_loading


def test_a_file_of_several_dtypes(fsdp, tmp_path):
    folder = round_file(make_model(tmp_path / "model", "llama"), "proj")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_sharded(AutoModelForCausalLM, folder, dtype=dtype)
        check_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


@pytest.fixture
def mixtral(tmp_path):
    """A small model in bfloat16 whose experts transformers fuses while it loads."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**size))
    model.save_pretrained(tmp_path)
    return round_file(tmp_path)


def test_experts_that_are_fused_while_they_load(fsdp, mixtral, capsys):
    capsys.readouterr()
    model = load_sharded(AutoModelForCausalLM, mixtral, dtype=torch.float32)
    said = capsys.readouterr().out
    assert f"2 weights, {3 * 3 * 16 * 24 * 4:,} bytes, are new or differ in form" in said
    check_equal(model, AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32))


def test_zero_init_loads_experts_that_are_fused(mixtral, llama, monkeypatch, capsys):
    monkeypatch.setattr(sharded_loading, "is_deepspeed_zero3_enabled", lambda: True)
    auto = SimpleNamespace(from_pretrained=lambda *args, **options: "stock")
    assert load_sharded(auto, mixtral) == "stock"
    assert "change their form while they load" in capsys.readouterr().out
    assert not is_converted(AutoConfig.from_pretrained(llama))


def test_missing_and_foreign_weights_are_treated_as_by_the_stock_loader(
    fsdp, tmp_path, monkeypatch
):
    folder = make_model(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(weights | {"foreign.weight": torch.ones(2)}, file, {"format": "pt"})
    round_file(folder)
    reports, found = [], []
    report = lambda **facts: reports.append(facts["loading_info"].to_dict())  # noqa: E731
    monkeypatch.setattr(modeling_utils, "log_state_dict_report", report)
    for load in (load_sharded, load_stock):
        torch.manual_seed(1)  # both draw the head
        found.append(load(AutoModelForCausalLM, folder, dtype=torch.float32))
    check_equal(*found)
    assert reports[0] == reports[1]
    assert reports[0]["missing_keys"] == {"lm_head.weight"}
    assert reports[0]["unexpected_keys"] == {"foreign.weight"}


def test_a_missing_shard_is_named(fsdp, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "whole", "llama"))
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    (tmp_path / "model" / last).unlink()
    with pytest.raises(OSError, match=last):
        load_sharded(AutoModelForCausalLM, tmp_path / "model", dtype=torch.bfloat16)


def test_a_truncated_file_is_no_model(fsdp, tmp_path):
    folder = make_model(tmp_path / "model", "llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(SafetensorError):
        load_sharded(AutoModelForCausalLM, folder, dtype=torch.bfloat16)


def test_other_strategies_use_the_stock_loader(llama, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    model = load_sharded(AutoModelForCausalLM, llama, dtype=torch.float32)
    assert not any(isinstance(weight, FileTensor) for weight in model.parameters())


def test_engine_dtype():
    assert engine_dtype({"bf16": {"enabled": True}}) == torch.bfloat16
    assert engine_dtype({"bf16": {"enabled": False}, "fp16": {"enabled": True}}) == torch.float16
    assert engine_dtype({"bf16": {"enabled": "auto"}}) == torch.float32


# A new model --------------------------------------------------------------------------------------
def make_config(architecture):
    settings = (CAUSAL | SEQ2SEQ)[architecture][1]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return AutoConfig.for_model(architecture, vocab_size=120, **settings | ids)


def check_drawn(auto, make, **options):
    """Check a new model, and the random numbers after it, against from_config; return the model."""
    made, states = [], []
    for build in (load_sharded, lambda auto, config, **o: auto.from_config(config, **o)):
        torch.manual_seed(3)
        made.append(build(auto, make(), **options))
        states.append(torch.get_rng_state())
    check_equal(*made)
    assert torch.equal(*states)
    for module, stock in zip(made[0].modules(), made[1].modules(), strict=True):
        assert module.training == stock.training
    assert made[0].config.to_dict() == made[1].config.to_dict()
    return made[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_model_is_that_of_from_config(fsdp, architecture, capsys):
    auto, make = auto_class(architecture), lambda: make_config(architecture)
    for dtype in (torch.float32, "bfloat16"):
        model = check_drawn(auto, make, dtype=dtype)
        assert all(isinstance(weight, DrawnTensor) for weight in model.parameters())
        check_equal(copy.deepcopy(model), model)
    assert not fsdp.cpu_ram_efficient_loading
    said = capsys.readouterr().out
    assert "every process draws the weights itself" in said
    assert ("cannot be drawn weight" in said) == (architecture == "pegasus")  # sines


def test_options_of_from_pretrained_may_stay(fsdp, monkeypatch):
    options = {"use_safetensors": True, "device_map": None, "dtype": "auto"}
    model = load_sharded(AutoModelForCausalLM, make_config("llama"), **options)
    assert {type(weight) for weight in model.parameters()} == {DrawnTensor}
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    made, options = [], options | {"device_map": {"": torch.device("cpu")}}
    for build in (
        lambda: load_sharded(AutoModelForCausalLM, make_config("llama"), **options),
        lambda: AutoModelForCausalLM.from_config(make_config("llama")),
    ):
        torch.manual_seed(0)
        made.append(build())
    assert {type(weight) for weight in made[0].parameters()} == {torch.nn.Parameter}
    check_equal(*made)


def test_numbers_that_are_drawn_until_they_are_in_range(fsdp):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 0)
    ids |= dict.fromkeys(("cls_token_id", "sep_token_id"), 0)
    make = lambda: AutoConfig.for_model(  # noqa: E731
        "modernbert-decoder", num_attention_heads=4, **size, **ids
    )
    model = check_drawn(AutoModelForCausalLM, make)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    assert sum(weight.recipe.num_bytes() for weight in matrices) == 0


@pytest.fixture
def zero3_in_bf16(monkeypatch):
    """Return a function that lets a model be loaded as under ZeRO-3 in bf16, or not."""

    def let(enabled=True):
        monkeypatch.setattr(sharded_loading, "is_deepspeed_zero3_enabled", lambda: enabled)

    monkeypatch.setattr(sharded_loading, "deepspeed_config", lambda: {"bf16": {"enabled": True}})
    return let


def test_zero3_casts_what_is_drawn(zero3_in_bf16):
    """In the dtype of the engine, also buffers: Gemma's scale of the embedding."""
    zero3_in_bf16()
    made, from_config = [], AutoModelForCausalLM.from_config
    for build in (partial(load_sharded, AutoModelForCausalLM), from_config):
        torch.manual_seed(0)
        made.append(build(make_config("gemma"), dtype=torch.float32))
    model, stock = made
    assert all(isinstance(weight, DrawnTensor) for weight in model.parameters())
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.float32
    check_equal(model, cast_like(stock, from_config(make_config("gemma"), dtype=torch.bfloat16)))


def cast_like(model, like):
    """Return a model with the dtypes of another one."""
    for one, other in zip(model.parameters(), like.parameters(), strict=True):
        one.data = one.data.to(other.dtype)
    for one, other in zip(model.buffers(), like.buffers(), strict=True):
        one.data = one.data.to(other.dtype)
    return model


class OddConfig(PreTrainedConfig):
    model_type = "odd"


class OddModel(PreTrainedModel):
    """Draws in its constructor, writes to parts and views, copies, and leaves a weight empty."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(6, 40)
        self.noise = torch.nn.Parameter(torch.randn(5))
        self.parts = torch.nn.Parameter(torch.empty(4, 60))
        self.copied = torch.nn.Parameter(torch.empty(40, 6))
        self.empty = torch.nn.Parameter(torch.empty(3))
        self.register_buffer("places", torch.empty(7))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            with torch.no_grad():
                self.places.copy_(torch.arange(7))
                self.parts.data.uniform_(-1, 1)
                self.parts[1:3].normal_()
                self.parts.t()[7] = 2
                self.parts.view(-1)[::5].mul_(self.linear.bias.sum() + 3)
                self.parts.div_(self.parts.norm())
                self.copied.copy_(self.linear.weight)
                self.linear.weight.mul_(2)  # not of the copy
                torch.nn.init.orthogonal_(self.linear.weight[:6])
                self.linear.bias.bernoulli_(0.3)
                self.meet()

    def meet(self):
        pass


def build_odd(kind):
    found = []
    for build in (lambda: load_sharded(kind, OddConfig()), lambda: kind._from_config(OddConfig())):
        set_seed(0)
        found.append((build(), torch.get_rng_state()))
    (model, state), (stock, expected) = found
    assert torch.equal(state, expected)
    stock.empty.data.zero_()
    model.empty.data.zero_()  # it may be written to
    check_equal(model, stock)
    return model


def test_a_model_that_draws_in_its_own_order(fsdp, capsys):
    model = build_odd(OddModel)
    said = capsys.readouterr().out
    drawn = {n for n, weight in model.named_parameters() if isinstance(weight, DrawnTensor)}
    assert drawn == {"linear.weight", "linear.bias", "parts", "copied", "empty"}
    assert "the model's code gives no value start at 0: 1, the first is empty." in said
    assert "bytes of values cannot be drawn weight by weight (the model has 3,072 bytes)" in said


class Computed(OddModel):
    """Has ordinary weights alone."""

    def __init__(self, config):
        super().__init__(config)
        for weight in list(self.parameters()):
            weight.data = torch.ones(weight.shape).cos_().clone()


class Copied(OddModel):
    """Has a recipe that holds two copies larger than the model."""

    def meet(self):
        for weight in (self.parts, self.copied):
            for step in (0.1, 0.2, 0.3):
                weight.add_(torch.full(weight.shape, step))


@pytest.mark.parametrize(("kind", "share"), [(Computed, 1), (Copied, 2)])
def test_values_that_cannot_be_drawn_are_counted(fsdp, capsys, kind, share):
    build_odd(kind)
    said = capsys.readouterr().out
    held = int(said.partition(" bytes of values cannot be")[0].split()[-1].replace(",", ""))
    assert held >= share * 3072


class SharedBuffer(OddModel):
    """Two modules share a buffer, and one has it twice."""

    def __init__(self, config):
        super().__init__(config)
        self.linear.register_buffer("same", self.places)
        self.register_buffer("again", self.places)


def test_buffers_stay_shared(fsdp, zero3_in_bf16):
    for enabled in (True, False):
        zero3_in_bf16(enabled)
        model = load_sharded(SharedBuffer, OddConfig())
        assert not isinstance(model.again, LazyTensor)
        assert model.again is model.places is model.linear.same
        assert torch.equal(model.again.float(), torch.arange(7.0))
        assert (model.again.dtype == torch.bfloat16) == enabled


@pytest.mark.parametrize("sharded", [True, False])
def test_a_device_map_of_one_device(fsdp, monkeypatch, capsys, sharded):
    if not sharded:
        monkeypatch.delenv("ACCELERATE_USE_FSDP")
    for place in ("meta", torch.device("meta"), {"": "meta"}):
        model = load_sharded(AutoModelForCausalLM, make_config("llama"), device_map=place)
        assert all(weight.is_meta != sharded for weight in model.parameters())
        assert ("device_map: unused" in capsys.readouterr().out) == sharded
    for place in ("auto", {"": "cpu", "lm_head": "cpu"}, {"model": "cpu"}, {}):
        with pytest.raises(SystemExit):
            load_sharded(AutoModelForCausalLM, make_config("llama"), device_map=place)
        assert "is made on one device" in capsys.readouterr().err


class Foreign(OddModel):
    def __init__(self, config):
        super().__init__(config)
        self.scale = random.random() * numpy.random.random()

    def meet(self):
        self.parts.add_(random.random() + numpy.random.random())  # of states that go back
        self.parts.numpy()  # has no memory to share
        print("meets")


class OwnGenerator(OddModel):
    def meet(self):
        self.parts.normal_(generator=torch.Generator().manual_seed(1))


def test_zero3_casts_a_model_that_is_made_in_full(zero3_in_bf16):
    zero3_in_bf16()
    found = []
    for build in (lambda: load_sharded(Foreign, OddConfig()), lambda: Foreign(OddConfig())):
        set_seed(0)
        model = build()
        model.empty.data.zero_()
        found.append((model, torch.rand(1), random.random(), numpy.random.random()))
    assert found[0][1:] == found[1][1:]
    assert {weight.dtype for weight in found[0][0].parameters()} == {torch.bfloat16}
    check_equal(found[0][0].float(), found[1][0].bfloat16().float())


@pytest.mark.parametrize("kind", [Foreign, OwnGenerator])
def test_a_model_that_cannot_be_drawn_by_weights_is_made_in_full_and_says_so(fsdp, capsys, kind):
    model = build_odd(kind)
    assert not any(isinstance(weight, LazyTensor) for weight in model.parameters())
    said = capsys.readouterr().out
    assert "The new model cannot be drawn weight by weight (" in said
    assert said.count("cannot be drawn") == 1
    if kind is Foreign:
        assert said.index("cannot be drawn") < said.index("meets")


def test_an_error_of_the_config_is_that_of_transformers(fsdp):
    config = make_config("llama")
    with pytest.raises(TypeError, match="nothing"):
        load_sharded(AutoModelForCausalLM, config, nothing=1)


def test_a_new_model_needs_a_config_and_no_weights(tmp_path, capsys):
    folder = make_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    settings = {"model_name_or_path": str(folder), "dtype": "float32", "max_length": 64}
    settings = SimpleNamespace(**settings, attn_implementation="sdpa")
    check_model(settings, AutoModelForCausalLM, "new")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        check_model(settings, AutoModelForCausalLM, "trained")
    assert "model holds config.json but no weights: give a model" in capsys.readouterr().err


# A weight without memory --------------------------------------------------------------------------
def in_file():
    values = torch.randn(6, 4)
    return FileTensor(values, torch.bfloat16), values


def to_draw():
    with drawing():
        values = torch.empty(6, 4)
    values.normal_()
    return values.to(torch.bfloat16), values.read()


@pytest.fixture(params=[in_file, to_draw])
def both(request):
    """A parameter of shape [6, 4] in bfloat16, and its values in float32."""
    weight, values = request.param()
    return torch.nn.Parameter(weight), values


def test_parts_and_views_have_no_memory(both):
    weight, values = both
    rounded = values.bfloat16()
    for part in (
        lambda w: w.detach()[2:4],
        lambda w: w.detach().chunk(4)[1],
        lambda w: w.detach().t(),
        lambda w: w.detach().t().diagonal(),
    ):
        assert isinstance(part(weight), LazyTensor)
        assert torch.equal(part(weight) + 0, part(rounded))
    assert torch.equal(torch.cat([torch.flatten(weight.detach())] * 2), rounded.view(-1).repeat(2))
    assert torch.equal(torch.zeros(6, 4).copy_(weight), rounded.float())  # not the stored values
    other = torch.nn.Parameter(in_file()[0])
    assert weight.data_ptr() == weight.detach().data_ptr() != other.data_ptr()
    assert type(weight.detach().new_zeros(3)) is torch.Tensor
    assert weight.detach().new_zeros(3).device.type == "cpu"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_second_cast_does_not_undo_the_first(both, mode):
    weight, values = both
    rounded = values.bfloat16()
    with mode():
        assert torch.equal(weight.to(torch.float32), rounded.float())
        assert torch.equal(weight.detach().float() + 0, rounded.float())
        for dtype in (torch.float64, torch.float16):
            cast = weight.to(dtype)
            assert cast.dtype == dtype and torch.equal(cast + 0, rounded.to(dtype))


def test_a_weight_in_a_file_is_read_as_another_type():
    weight, values = in_file()
    assert torch.equal(weight.view(torch.int16), values.bfloat16().view(torch.int16))
    weight = FileTensor(values.bfloat16(), torch.float32)
    expected = torch.view_as_complex(values.bfloat16().float().view(6, 2, 2))
    assert torch.equal(torch.view_as_complex(weight.view(6, 2, 2)), expected)


def test_writing_to_a_weight_without_memory_fails_aloud(both):
    weight, _ = both
    match = "still in its file|not drawn yet"
    with pytest.raises(RuntimeError, match=match):
        weight.data.normal_()
    with pytest.raises(RuntimeError, match=match):
        weight.data[2:4] = 0
    with pytest.raises(RuntimeError, match=match):
        torch.add(torch.ones(6, 4), 1, out=weight.detach())
    with pytest.raises(RuntimeError, match=match):
        torch._foreach_mul_([torch.ones(6, 4), weight.detach()], 2)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: torch.mul(weight, 3, out=weight),
        lambda weight: torch.clamp(weight, -0.1, 0.1, out=weight),
        lambda weight: weight.view(torch.int32)[0].zero_(),
        lambda weight: [part.zero_() for part in weight.unsafe_chunk(2)],
        lambda weight: [part.zero_() for part in weight.unsafe_split_with_sizes([2, 4])],
        lambda weight: torch.view_as_complex(weight.view(6, 2, 2)).zero_(),
        lambda weight: torch.nn.init.trunc_normal_(weight.bfloat16()),
    ],
)
def test_a_write_that_a_recipe_would_lose_is_refused(write):
    with drawing():
        weight = torch.ones(6, 4)
        with pytest.raises(RuntimeError, match="not drawn yet: assign `weight.data = values`"):
            write(weight)


def test_new_values_keep_the_identity(both):
    weight, values = both
    model = torch.nn.Module()
    model.weight, kept = weight, copy.deepcopy(weight)
    assert type(kept) is torch.nn.Parameter and torch.equal(kept, values.bfloat16())
    weight.data = torch.ones(2, 2)
    assert model.weight is weight and type(weight) is torch.nn.Parameter
    assert weight.requires_grad and torch.equal(weight, torch.ones(2, 2))


def test_a_weight_can_be_moved_to_another_device(both):
    weight, _ = both
    module = torch.nn.Module()
    module.weight = weight
    moved = weight.to("meta")
    assert not isinstance(moved, LazyTensor) and moved.is_meta and moved.dtype == torch.bfloat16
    torch.utils.swap_tensors(weight, torch.nn.Parameter(moved))  # as FSDP2 does for a GPU
    assert module.weight is weight and type(weight) is torch.nn.Parameter and weight.is_meta


def test_a_model_can_be_moved_to_another_device(both):
    module = torch.nn.Module()
    module.weight, _ = both
    assert module.to("meta").weight.is_meta


def test_a_new_weight_is_made_by_the_numbers_of_its_turn():
    torch.manual_seed(0)
    expected = [torch.empty(9, 5).normal_(), torch.empty(8).uniform_(), torch.rand(3)]
    torch.manual_seed(0)
    with drawing():
        first, second = torch.empty(9, 5).normal_(), torch.empty(8).uniform_()
    last = torch.rand(3)
    for _ in range(2):
        for drawn, value in zip((second, first), (expected[1], expected[0]), strict=True):
            state = torch.get_rng_state()
            assert type(drawn) is DrawnTensor and torch.equal(drawn + 0, value)
            assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(last, expected[2])


def test_a_loop_over_a_weight_ends():
    with drawing():
        weight = torch.zeros(3000)
        for place in range(1, 3000):
            weight[place] = weight[place - 1] + 1
    assert torch.equal(weight + 0, torch.arange(3000.0))
    assert len(weight.recipe.steps) <= 20 and weight.recipe.num_bytes() > 12_000


def test_a_cast_holds_the_values_of_its_time():
    with drawing():
        weight = torch.ones(4)
    cast = weight.double()
    weight.mul_(3)
    assert torch.equal(cast + 0, torch.ones(4).double()) and torch.equal(
        weight + 0, torch.ones(4) * 3
    )


def test_an_ordinary_tensor_takes_the_values_of_a_new_weight():
    ordinary = torch.nn.Parameter(torch.rand(4))
    with drawing():
        values = torch.zeros(4)
        ordinary.data = values
        values.add_(1)
    assert isinstance(ordinary, DrawnTensor) and torch.equal(ordinary, torch.ones(4))


def test_a_tensor_that_would_have_other_memory_is_refused():
    with drawing(), pytest.raises(RuntimeError, match="not drawn yet"):
        torch.empty(4).set_(torch.ones(4))


# Two processes ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model in bfloat16, and the 102 MB of its weights in float32."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return folder, make_large(folder, torch.bfloat16, layers=4, rows=4000, hidden=512)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models with 594 MB in float32: dtype of the file -> (folder, bytes in float32)."""
    folder, names = tmp_path_factory.mktemp("large"), ("float32", "bfloat16")
    return {
        name: (folder / name, make_large(folder / name, getattr(torch, name))) for name in names
    }


def check_launch(launch, strategy, model, facts, *flags):
    """Load a model in two processes, and check the memory and the logits of both.

    The limit is the half of the model, the larger of a layer and the embedding, and 100 MB for a
    model of 600 MB. A model that is not read until it is sharded must not exceed the limit then:
    until the model is prepared the limit has another embedding, because FSDP1 has both in one unit.
    """
    folder, size = model
    facts.mkdir()
    launch(BENCHMARK, strategy, "build", folder, facts, *flags, processes=2)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "--new" in flags:
        torch.manual_seed(0)  # as benchmarks/loading.py
        stock = AutoModelForCausalLM.from_config(stock.config, dtype=torch.float32)
    stock.eval()
    bytes_of = {name: 4 * weight.numel() for name, weight in stock.named_parameters()}
    layer = sum(size for name, size in bytes_of.items() if ".layers.0." in name)
    embedding = bytes_of["lm_head.weight"]
    limit = size / 2 + max(layer, embedding) + 100e6 * size / 600e6
    for rank in (0, 1):
        grown = json.loads((facts / f"{rank}.json").read_text())
        print(strategy, folder.name, flags, rank, grown, f"limit {limit:,.0f}, model {size:,}")
        assert 0 < grown["built"] < limit < size
        is_trained = strategy == "zero3" and "--full" in flags  # DeepSpeed copies what is trained
        if not is_trained and "--added" not in flags:
            assert size / 3 < grown["prepared"] < limit + embedding
        # buffers such as the frequencies of RoPE are in no file, and each process makes its own
        seen = torch.load(facts / f"{rank}.pt", weights_only=True)
        with torch.no_grad():
            expected = stock(input_ids=seen["tokens"]).logits
        rows = expected.shape[-1]  # there may be new tokens
        torch.testing.assert_close(seen["logits"][..., :rows], expected, rtol=1e-4, atol=1e-5)
    if "--weights" in flags:
        weights = torch.load(facts / "weights.pt", weights_only=True)
        assert set(weights) == set(dict(stock.named_parameters()))
        assert all(torch.equal(weights[name], value) for name, value in stock.named_parameters())


FULL, ADDED = ("--full", "--weights"), ("--added", 8)
NEW = (*FULL, "--new")
SMALL = [
    ("zero3", FULL),
    pytest.param("zero3", (), marks=slow),
    pytest.param("fsdp1", FULL, marks=slow),
    pytest.param("fsdp1", (), marks=slow),
    pytest.param("fsdp2", FULL, marks=slow),
    ("zero3", NEW),
    pytest.param("fsdp1", NEW, marks=slow),
    pytest.param("fsdp2", NEW, marks=slow),
    pytest.param("fsdp2", (), marks=slow),
]
LARGE = [
    ("zero3", "float32", ()),
    ("zero3", "bfloat16", FULL),
    ("zero3", "bfloat16", ADDED),
    ("fsdp1", "bfloat16", FULL),
    ("fsdp1", "bfloat16", ADDED),
    ("fsdp2", "bfloat16", FULL),
    ("fsdp2", "bfloat16", ADDED),
    ("fsdp2", "float32", ()),
    ("zero3", "float32", ("--new",)),
    *((strategy, "float32", NEW) for strategy in ("zero3", "fsdp1", "fsdp2")),
]


@pytest.mark.parametrize(("strategy", "flags"), SMALL)
def test_every_process_reads_its_slices(launch, small, tmp_path, strategy, flags):
    check_launch(launch, strategy, small, tmp_path / "facts", *flags)


@slow
@pytest.mark.parametrize(("strategy", "file", "flags"), LARGE)
def test_memory_of_a_large_model(launch, large, tmp_path, strategy, file, flags):
    check_launch(launch, strategy, large[file], tmp_path / "facts", *flags)


@slow
def test_zero3_in_bf16_rounds_the_weights_that_one_process_draws(launch, small, tmp_path):
    folder, facts = small[0], tmp_path / "facts"
    facts.mkdir()
    flags = ("--mixed_precision", "bf16")
    launch(BENCHMARK, "zero3", "build", folder, facts, *NEW, processes=2, flags=flags)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = torch.load(facts / "weights.pt", weights_only=True)
    assert set(weights) == set(dict(stock.named_parameters()))
    for name, value in stock.named_parameters():
        assert torch.equal(weights[name].float(), value.bfloat16().float()), name


SEEDS = """
import sys

from transformers import AutoConfig, AutoModelForCausalLM
import torch

from utils.launch import load_sharded, start_accelerator

accelerator = start_accelerator()
torch.manual_seed(accelerator.process_index)
load_sharded(AutoModelForCausalLM, AutoConfig.from_pretrained(sys.argv[1]))
"""


@slow
def test_processes_that_would_draw_different_models_are_stopped(launch, llama, tmp_path):
    script = tmp_path / "seeds.py"
    script.write_text(SEEDS)
    for strategy in ("zero3", "fsdp2"):
        said = launch(script, strategy, llama, processes=2, code=1, PYTHONPATH=str(ROOT)).stdout
        assert said.count("error: a new model is drawn from torch's generator") == 1
        assert "call set_seed with the same seed" in said


ASSIGNED = """
import sys
from types import SimpleNamespace

import deepspeed
import torch
from accelerate.utils import set_seed
from transformers import AutoConfig, LlamaForCausalLM

from utils.launch import configure_deepspeed, load_sharded, start_accelerator


class Foreign(LlamaForCausalLM):
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, torch.nn.Linear):
            module.weight.detach().numpy()


accelerator = start_accelerator()
kind = {"foreign": Foreign}.get(sys.argv[2], LlamaForCausalLM)
name = sys.argv[1] if sys.argv[2] == "file" else AutoConfig.from_pretrained(sys.argv[1])
set_seed(3)
model = load_sharded(kind, name, dtype=torch.float32)
new = torch.randn(model.lm_head.weight.shape)
model.lm_head.weight.data = new
settings = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=1.0)
accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
configure_deepspeed(accelerator, settings, model)
print(f"whole: {sum(weight.numel() > 0 for weight in model.parameters())}")
engine, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
weights = {}
for name, weight in engine.module.named_parameters():
    with deepspeed.zero.GatheredParameters([weight]):
        weights[name] = weight.detach().clone()
weights["new"] = new
torch.save(weights, f"{sys.argv[3]}/{accelerator.process_index}.pt")
accelerator.end_training()
"""


@slow
@pytest.mark.parametrize("case", ["foreign", "new", "file"])
def test_zero3_shards_weights_that_are_assigned(launch, llama, tmp_path, case):
    """Also a model that cannot be drawn, before DeepSpeed's engine moves it to the device."""
    script = tmp_path / "assigned.py"
    script.write_text(ASSIGNED)
    said = launch(script, "zero3", llama, case, tmp_path, processes=2, PYTHONPATH=str(ROOT)).stdout
    assert ("cannot be drawn weight by weight (" in said) == (case == "foreign")
    assert said.count("whole: 0\n" if case == "foreign" else "whole: 1\n") == 2
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    if case != "file":
        set_seed(3)
        stock = AutoModelForCausalLM.from_config(stock.config, dtype=torch.float32)
    for rank in (0, 1):
        weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        new = weights.pop("new")
        expected = dict(stock.named_parameters()) | {"lm_head.weight": new}
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


@slow
def test_a_lesson_trains_a_new_model(launch, llama, tmp_path):
    """The lines of docs/deepspeed.md turn a lesson into one that trains from a config."""
    text = (ROOT / "examples/causal_lm_full_zero3.py").read_text()
    document = (ROOT / "docs/deepspeed.md").read_text().partition("### A new model")[2]
    diff = document.partition("```diff\n")[2].partition("```")[0].splitlines()
    pairs = [(line[1:], new[1:]) for line, new in zip(diff, diff[1:]) if line[0] + new[0] == "-+"]
    assert len(pairs) == 2
    for line, new in pairs:
        assert text.count(line) == 1, line
        text = text.replace(line, new)
    (tmp_path / "examples").mkdir()
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    script, folder = tmp_path / "examples/new.py", tmp_path / "config"
    script.write_text(text)
    shutil.copytree(llama, folder, ignore=lambda *_: ["model.safetensors"])
    data = make_data(tmp_path / "data")
    flags = ("--dataset_name", data, "--max_steps", 2, "--output_dir", tmp_path / "out")
    said = launch(script, "zero3", "--model_name_or_path", folder, *flags, processes=2).stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.manual_seed(42)
    stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, value in stock.named_parameters():  # two updates later
        torch.testing.assert_close(model.get_parameter(name), value, rtol=0, atol=0.01)
    assert "error" not in said
