"""Measure the memory that loading takes: transformers' from_pretrained and our load_sharded.

Run:  python benchmarks/loading.py [--layers 9] [--strategies zero3 fsdp1 fsdp2] [--cases lora]

The model is a Llama with random weights, 12.8 million parameters per layer and 16.4 million each in
embedding and head: 594 MB in float32 with 9 layers. Its file holds float32 or bfloat16. For every
strategy and file two processes build it in float32 by chat_sft's `build_model` and shard it by
chat_sft's `prepare`. Prints the growth of RssAnon (private memory; the pages of a file that is
mapped do not count) of the process that grows more, in MB of 10^6 bytes: its peak until the model
is built, and until it is prepared, where the optimizer has no state yet.

Under `accelerate launch` the script is one of these processes:

    accelerate launch --config_file CONFIG benchmarks/loading.py build MODEL FACTS
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_run import ACCELERATE, cpu

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("zero3", "fsdp1", "fsdp2")
FILES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the dtype of a model's file
LAYERS, ROWS, HIDDEN = 9, 16_000, 1024  # the size of the model: 594 MB in float32
CASES = {  # tokens: LoRA, 8 new tokens; new: all weights of a model that is made from its config
    "lora": (),
    "full": ("--full",),
    "tokens": ("--added", 8),
    "new": ("--full", "--new"),
}


# One process of a launch --------------------------------------------------------------------------
class Growth:
    """Samples the private memory of this process; `peak` is its largest growth, in bytes."""

    def __init__(self):
        self.begin, self.peak, self.runs = private(), 0, True
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def sample(self):
        while self.runs:
            self.peak = max(self.peak, private() - self.begin)
            time.sleep(0.002)

    def stop(self):
        self.runs = False
        self.thread.join()


def private():
    """Return the bytes of RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def load_stock(auto_class, name, **options):
    """Load a model, or make one from a config, by transformers alone."""
    if isinstance(name, str):
        return auto_class.from_pretrained(name, **options)
    names = ("dtype", "attn_implementation")
    return auto_class.from_config(name, **{key: options[key] for key in names})


def from_config(load):
    """Return a loader that makes a new model from the config in a model's folder."""
    return lambda auto_class, name, **options: load(
        auto_class, AutoConfig.from_pretrained(name), **options
    )


def build(options):
    """Build, prepare and run a model as chat_sft does; write to FACTS what this process saw.

    The files are RANK.json with the memory, RANK.pt with the logits of this process for tokens of
    its own, and weights.pt with the gathered trainable weights where --weights is given.
    """
    from accelerate.utils import set_seed

    from examples import chat_sft
    from utils.checkpoint import gather_trained
    from utils.launch import start_accelerator
    from utils.saving import plain_name

    if options.stock and options.added:  # else the resized weights would not reach process 1
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = start_accelerator()
    config = chat_sft.Config(
        model_name_or_path=options.model,
        dtype=options.dtype,
        attn_implementation="sdpa",
        use_peft_lora=not options.full,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.add_tokens([f"<{number}>" for number in range(options.added)])
    set_seed(0)
    load = load_stock if options.stock else chat_sft.launch.load_sharded
    growth = Growth()
    if options.new:
        load = from_config(load)
    with patch.object(chat_sft.launch, "load_sharded", load):
        model = chat_sft.build_model(config, tokenizer, options.added)
    facts = {"held": private() - growth.begin, "built": growth.peak}
    model, _ = chat_sft.prepare(config, accelerator, model)
    growth.stop()
    facts["prepared"] = growth.peak
    rank = accelerator.process_index
    tokens = torch.arange(3 + 8 * rank, 9 + 8 * rank, device=accelerator.device)[None]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    Path(options.facts, f"{rank}.json").write_text(json.dumps(facts))
    torch.save({"tokens": tokens.cpu(), "logits": logits.cpu()}, Path(options.facts, f"{rank}.pt"))
    if options.weights:
        weights = gather_trained(accelerator, model)
        if rank == 0:
            weights = {plain_name(name): value for name, value in weights.items()}
            torch.save(weights, Path(options.facts, "weights.pt"))
    accelerator.end_training()


# The table ----------------------------------------------------------------------------------------
def make_model(folder, dtype, layers=LAYERS, rows=ROWS, hidden=HIDDEN):
    """Save a random model, with a token for each row of its embedding; return its float32 bytes."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-causal-lm")
    tokenizer.add_tokens([f"<token {number}>" for number in range(rows - len(tokenizer))])
    size = {"vocab_size": rows, "hidden_size": hidden, "intermediate_size": 2816}
    size |= {"num_hidden_layers": layers, "num_attention_heads": hidden // 64}
    size |= {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return 4 * sum(weight.numel() for weight in model.parameters())


def measure(strategy, model, *flags):
    """Launch two processes and return the largest "held", "built" and "prepared" of them, in MB."""
    config = ROOT / f"configs/{strategy}.yaml"
    with tempfile.TemporaryDirectory() as facts:
        command = [sys.executable, *ACCELERATE, "--config_file", config, __file__, "build"]
        command += [model, facts, *flags]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = list(map(str, command))
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, **streams)
        if done.returncode:
            sys.exit(done.stdout)
        found = [json.loads(file.read_text()) for file in Path(facts).glob("*.json")]
    return {key: max(one[key] for one in found) / 1e6 for key in found[0]}


def compare(options):
    """Print the table."""
    print(f"{cpu()}, {datetime.date.today()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in FILES.items():
            size = make_model(Path(folder, name), dtype, options.layers)
        print(f"growth of RssAnon in MB; the model has {size / 1e6:.0f} MB in float32")
        print("                               until built    until prepared")
        print("strategy  file      trained   stock     ours   stock     ours")
        for strategy in options.strategies:
            for name in FILES:
                for case in options.cases:
                    if case == "new" and name != "float32":
                        continue  # no file is read
                    flags = CASES[case]
                    stock = measure(strategy, Path(folder, name), *flags, "--stock")
                    ours = measure(strategy, Path(folder, name), *flags)
                    both = [one[key] for key in ("built", "prepared") for one in (stock, ours)]
                    cells = " ".join(f"{value:8.0f}" for value in both)
                    file = "none" if case == "new" else name
                    print(f"{strategy:9} {file:9} {case:7} {cells}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    if sys.argv[1:2] == ["build"]:
        parser.add_argument("build")
        parser.add_argument("model", help="folder of the model")
        parser.add_argument("facts", help="folder for what the processes find")
        parser.add_argument("--dtype", default="float32", help="dtype of the loaded weights")
        parser.add_argument("--full", action="store_true", help="train all weights, not LoRA")
        parser.add_argument("--added", type=int, default=0, help="number of new tokens")
        parser.add_argument("--new", action="store_true", help="draw the weights by the config")
        parser.add_argument("--stock", action="store_true", help="load by from_pretrained")
        parser.add_argument("--weights", action="store_true", help="write the trained weights")
        build(parser.parse_args())
    else:
        parser.add_argument(
            "--layers", type=int, default=LAYERS, help="decoder layers of the model"
        )
        some = {"nargs": "+", "choices": STRATEGIES, "default": STRATEGIES}
        parser.add_argument("--strategies", **some, help="strategies to measure")
        some = {"nargs": "+", "choices": CASES, "default": list(CASES)}
        parser.add_argument("--cases", **some, help="what is loaded and trained: see CASES")
        compare(parser.parse_args())


if __name__ == "__main__":
    main()
