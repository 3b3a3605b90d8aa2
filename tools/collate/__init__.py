"""Make one file of a sharded checkpoint: safetensors that transformers or peft loads.

    python -m tools.collate CHECKPOINT OUT --model_name_or_path MODEL

CHECKPOINT is a folder that one of these wrote:

    DeepSpeed, ZeRO-1, 2 or 3: `accelerator.save_state`, `engine.save_checkpoint`, the Trainer
    FSDP1 or FSDP2: `accelerator.save_state`, with SHARDED_STATE_DICT or FULL_STATE_DICT
    chat_sft.py: a folder checkpoint-<update>
    accelerate, where nothing is sharded: model.safetensors or pytorch_model.bin

It may also be a file with a model's state_dict, of safetensors or of `torch.save`.

The trained weights are those that the optimizer steps: float32, also where the model ran in bf16.
A checkpoint of a PEFT model becomes an adapter, any other one a full model. config.json and the
tokenizer are taken from CHECKPOINT or from --model_name_or_path, adapter_config.json from
CHECKPOINT or from --adapter_config.

Memory holds 8 MB of a weight at a time: files are mapped, and each weight is a `Lazy` tensor of
tools/merge_adapter. No code in a pickle is run: torch loads with weights_only, and the index of
FSDP's checkpoints is read by an unpickler that knows only the classes of that index.

    deepspeed.py   the weights of ZeRO's files
    fsdp.py        the weights of torch.distributed.checkpoint's files
    plain.py       the weights of one file
    model.py       names, tied weights and configuration of a full model or an adapter
    command.py     the command line
"""


def main(arguments=None):
    """Run the command line."""
    from tools.collate.command import main as run  # here: __main__.py prepares the imports

    run(arguments)
