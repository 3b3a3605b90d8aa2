"""Merge a LoRA adapter into its base model, one block of a weight at a time, on one CPU.

    python -m tools.merge_adapter outputs/lora --output_dir outputs/merged

The logits of the written model are checked against those of base + adapter.

Also supported: rsLoRA, DoRA, rank_pattern, target_parameters (fused experts), modules_to_save,
trainable_token_indices, resized vocabularies and trained biases. A 4-bit base is dequantized;
--base_model_name_or_path merges into the original instead.

How it works: transformers builds the model and PEFT adds the adapter, but every weight is a `Lazy`
tensor (lazy.py): a recipe that reads the file when an operation needs the values and keeps nothing
afterwards. So the names in the files, fused experts, tied weights and the formulas of the deltas
come from the libraries themselves, and memory holds 8 MB of a weight and of its delta at a time.
LoRA on fused experts is the exception: it holds the experts of one layer up to four times.
docs/merging.md has the measured memory.

The check compares logits in 32 bits on up to 24 tokens: first of the merged weights, before
anything is written, then of the written files, loaded as transformers loads them. 16-bit weights
are rounded once, so their tolerance is wider. The folder gets its name last. A killed run leaves a
hidden folder `.NAME.PID` beside it, which you can delete.

    lazy.py      tensors that read their file when they are used
    read.py      the files of base and adapter
    model.py     base and adapter as a model of Lazy tensors
    merging.py   the merged weights
    check.py     the comparison of logits
    write.py     the files of the result
    command.py   the command line
    console.py   its flags, errors and last lines, which tools/collate shares
"""


def main(arguments=None):
    """Run the command line."""
    from tools.merge_adapter.command import main as run  # here: __main__.py prepares the imports

    run(arguments)
