"""A model whose weights are still in their files, or to be drawn, is sharded on GPUs."""

import copy
import json
import os

import pytest
import torch
from conftest import ROOT
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM

from benchmarks.loading import make_model
from utils.lazy_weights import FileTensor, drawing

pytestmark = pytest.mark.gpu

GPUS = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, there are {GPUS}")


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone, on the GPU."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def layers():
    """Return two layers in bfloat16, and the same ones as weights that are read in float32."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 5)).bfloat16()
    in_files = copy.deepcopy(model)
    for module in in_files:
        for name, weight in module.named_parameters():
            weight = FileTensor(weight.detach(), torch.float32)
            module._parameters[name] = torch.nn.Parameter(weight)
    return model.float().cuda(), in_files


def new_layers():
    """Return two new layers, and the same ones as weights that are still to be drawn."""
    make = lambda: torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 5))  # noqa: E731
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    with drawing():
        return model.cuda(), make()


def with_fsdp1(model):
    # sends the weights of the first process to the others, on the GPU
    options = {"sync_module_states": True, "device_id": torch.cuda.current_device()}
    policy = ModuleWrapPolicy({torch.nn.Linear})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)


def with_fsdp2(model):
    for module in (*model, model):
        fully_shard(module)
    return model


@pytest.mark.parametrize("shard", [with_fsdp1, with_fsdp2])
@pytest.mark.parametrize("make", [layers, new_layers])
def test_fsdp_moves_lazy_weights(group, make, shard):
    model, lazy = make()
    batch = torch.randn(3, 8, device="cuda")
    torch.testing.assert_close(shard(lazy)(batch), model(batch))


@two_gpus
@pytest.mark.parametrize("strategy", ["zero3", "fsdp1", "fsdp2"])
def test_two_gpus_load_slices(launch, tmp_path, strategy):
    model, facts = tmp_path / "model", tmp_path / "facts"
    size = make_model(model, torch.bfloat16)
    facts.mkdir()
    benchmark = ROOT / "benchmarks/loading.py"
    options = {"processes": 2, "real": True}  # libraries read this variable at import
    every = ",".join(map(str, range(GPUS)))
    options["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", every)
    launch(benchmark, strategy, "build", model, facts, **options)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for rank in (0, 1):
        grown = json.loads((facts / f"{rank}.json").read_text())
        print(strategy, rank, grown)
        assert grown["built"] < size / 2
        seen = torch.load(facts / f"{rank}.pt", weights_only=True)
        with torch.no_grad():
            expected = stock(input_ids=seen["tokens"]).logits
        torch.testing.assert_close(seen["logits"].cpu(), expected, rtol=1e-3, atol=1e-4)
