"""Chat templates, and where in a conversation that a template has rendered the assistant speaks."""

from pathlib import Path
from typing import NamedTuple

from transformers import AddedToken, AutoTokenizer

from utils.conversations import DataError
from utils.errors import refuse, say
from utils.vocabulary import tokenizer_folder


class Template(NamedTuple):
    """A chat template, the special tokens that it needs, and the one of them that ends a turn."""

    text: str
    tokens: tuple[str, ...]
    end: str | None  # None: the eos token of the tokenizer


TEMPLATES = {
    "chatml": Template(
        "{% for m in messages %}"
        "<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
        tokens=("<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
    ),
    "zephyr": Template(
        "{% for m in messages %}"
        "<|{{ m['role'] }}|>{{ '\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
        tokens=("<|system|>", "<|user|>", "<|assistant|>"),
        end=None,
    ),
}


def build_tokenizer(config, is_chat):
    """Return the tokenizer with the chat template asked for, and how many tokens that added.

    Args:
        config: read are model_name_or_path, adapter_name_or_path and chat_template_format.
        is_chat: whether the data holds conversations.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(config))
    if not tokenizer.is_fast:
        refuse(
            f"{config.model_name_or_path} has a slow tokenizer, which does not tell where in the "
            "text a token stands: take a model with a fast one"
        )
    choice = config.chat_template_format
    if not is_chat:
        if choice != "none":
            say(f"--chat_template_format {choice} is unused: the data holds no conversations.")
        return tokenizer, 0
    if choice == "none" and tokenizer.chat_template:
        return tokenizer, 0
    if choice == "none":
        choice = "chatml"
        say("The tokenizer has no chat template, so chatml is used.")
    if choice not in TEMPLATES:
        tokenizer.chat_template = Path(choice).read_text()
        return tokenizer, 0
    template = TEMPLATES[choice]
    tokenizer.chat_template = template.text
    tokens = [AddedToken(token, special=True) for token in template.tokens]
    num_added = tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.eos_token = template.end or tokenizer.eos_token
    return tokenizer, num_added


def render(tokenizer, messages, first, where):
    """Return a conversation as the template writes it, and the spans of the assistant's turns.

    Args:
        messages: dicts with role and content.
        first: index of the first message that may be trained on.
        where: the name of the row in an error.

    Returns:
        The text, and a list with (begin, end) in characters for each turn of the assistant. A span
        is None where the template rewrites earlier turns, as Qwen3's does.

    Raises:
        DataError: the template raises.
    """

    def apply_template(part, **options):
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, **options)
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"{where}: the chat template raises an error ({error}): fix it, or take another"
            ) from error

    text, spans = apply_template(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number >= first:
            before = apply_template(messages[:number], add_generation_prompt=True)
            through = apply_template(messages[: number + 1]).rstrip()
            is_prefix = text.startswith(through) and through.startswith(before)
            spans.append((len(before), len(through)) if is_prefix else None)
    return text, spans
