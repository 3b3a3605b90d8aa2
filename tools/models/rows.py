"""The columns of the table: the script that each runs, and how it is launched."""

from dataclasses import dataclass

from tools.models.architectures import ARCHITECTURES

NUM_SAMPLES, NEW_TOKENS = 2, 4  # prompts that chat_sft answers, and tokens of an answer
TOLERANCE = 1e-4  # of the held-out loss of a reloaded model, relative
FLAGS = """--model_name_or_path model --max_steps 2 --warmup_ratio 0
--per_device_train_batch_size 2""".split()
# high rates: two updates have to change the answers
LESSON_FLAGS = ("--dataset_name", "rows", "--learning_rate", "0.2", *FLAGS)
CHAT_FLAGS = (
    *("--dataset_name", "chat", "--use_peft_lora", "--num_samples", str(NUM_SAMPLES)),
    *("--learning_rate", "0.05", "--max_new_tokens", str(NEW_TOKENS), *FLAGS),
)


@dataclass(frozen=True)
class Run:
    """A script of examples/ and the launch config it runs under."""

    script: str
    config: str
    flags: tuple = ()

    @property
    def is_chat(self):
        return self.script == "chat_sft"

    def arguments(self, output):
        """Return the script's arguments."""
        flags = CHAT_FLAGS if self.is_chat else LESSON_FLAGS
        return [*flags, *self.flags, "--output_dir", output]


# column -> runs of causal and of sequence-to-sequence models; None: there is no such script
RUNS = {
    "chat_sft": (Run("chat_sft", "ddp"), None),
    "lesson": (Run("causal_lm_lora", "ddp"), Run("seq2seq_lora", "ddp")),
    "packing": (Run("chat_sft", "ddp", ("--packing",)), None),
    "zero3": (Run("chat_sft", "zero3"), Run("seq2seq_lora_zero3_offload", "zero3")),
    "fsdp2": (Run("chat_sft", "fsdp2"), Run("seq2seq_lora_fsdp1", "fsdp1")),
}
COLUMNS = (*RUNS, "reload", "merge")


def run_of(row, column):
    """Return the `Run` of a cell, None if its column does not apply to the row."""
    return RUNS[column][ARCHITECTURES[row].is_seq2seq]


# the cells that are measured; a cell of `reload` is made of the others of its row
CELLS = [
    f"{row}/{column}"
    for row in ARCHITECTURES
    for column in (*RUNS, "merge")
    if column == "merge" or run_of(row, column)
]
