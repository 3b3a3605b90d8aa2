"""What the commands merge_adapter and collate share: flags, errors, and the lines at the end."""

import argparse
import logging
import re
import warnings

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from utils.errors import fail


def byte_count(text):
    """Return the bytes of "5GB", "300 MB" or "1000": units of 1000, as transformers counts them."""
    form = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    if not form or float(form[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 5GB or 300MB")
    return int(float(form[1]) * 1000 ** " KMGT".index(form[2] or " "))


def add_output_flags(parser, dtype):
    """Add the flags that say how weights are written.

    Args:
        dtype: in which dtype they are written by default, for the help text.
    """
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help=f"dtype of the written weights (default: {dtype})",
    )
    parser.add_argument(
        "--max_shard_size",
        type=byte_count,
        default="5GB",
        help="largest size of a weight file of a full model (default: 5GB)",
    )
    parser.set_defaults(overwrite_output_dir=False)  # read by `new_folder`
    parser.error = lambda message: fail(f"{message}: --help lists the flags")


def run_quietly(run, arguments):
    """Call run(arguments) without warnings; an error is one line `error: ...` and exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        # peft warns about ties, and about what its own merge would do
        warnings.simplefilter("ignore")
        try:
            run(arguments)
        except KeyboardInterrupt:
            fail("interrupted, nothing was saved")
        # such as a full disk, or an invalid config.json
        except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
            fail(f"nothing was saved: {' '.join(str(error).split())}")


def print_saved(folder, class_name):
    """Print the files of a folder, whether a tokenizer is missing, and how to load the model."""
    print(f"saved in {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.stat().st_size:>14,} bytes  {path.name}")
    if not (folder / "tokenizer_config.json").is_file():
        print("No tokenizer was written: none was found beside the weights that were read.")
    library = "peft" if class_name.startswith("AutoPeft") else "transformers"
    print(f"Load the result with:\nfrom {library} import {class_name}")
    print(f'model = {class_name}.from_pretrained("{folder}")')
