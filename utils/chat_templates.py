"""Chat templates: which one is used, and which tokens and which date it writes."""

import copy
import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from torch import distributed
from transformers import AddedToken, AutoTokenizer

from utils.errors import refuse, say
from utils.vocabulary import last_token, tokenizer_folder


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
    if choice not in TEMPLATES and (choice != "none" or tokenizer.chat_template):
        take_template(tokenizer, choice)
        if last_token(tokenizer) not in (None, *tokenizer.added_tokens_decoder):
            say(
                "The chat template ends an answer without a special token, so the model does not "
                "learn where to stop: give --append_concat_token true, or a template that does."
            )
        return tokenizer, 0
    if choice == "none":
        choice = "chatml"
        say("The tokenizer has no chat template, so chatml is used.")
    template = TEMPLATES[choice]
    tokenizer.chat_template = template.text
    tokens = [AddedToken(token, special=True) for token in template.tokens]
    num_added = tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.eos_token = template.end or tokenizer.eos_token
    return tokenizer, num_added


def take_template(tokenizer, choice):
    """Give a tokenizer the template in a .jinja file, or one of its own; stop if there is none.

    Args:
        choice: a .jinja file; the name of one of the tokenizer's templates; or none, for its only
            one or the one called default.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if choice in named:
        others = ", ".join(name for name in named if name != choice)
        tokenizer.chat_template = named[choice]
        say(f"The chat template {choice} is used and saved, without the others ({others}).")
    elif choice.endswith(".jinja"):
        tokenizer.chat_template = Path(choice).read_text()
    elif choice != "none":
        has = f"has {', '.join(sorted(named))}" if named else "names none"
        refuse(
            f"--chat_template_format is {choice!r}: choose {', '.join(TEMPLATES)}, none, a .jinja "
            f"file or a template of the tokenizer, which {has}"
        )
    elif named and "default" not in named:
        refuse(
            "the tokenizer has several chat templates and none is called default: name one of "
            f"{', '.join(sorted(named))} in --chat_template_format"
        )
    elif named:
        for_tools = ", and tool_use for rows with tools" if "tool_use" in named else ""
        say(f"Of the chat templates ({', '.join(sorted(named))}) default is used{for_tools}.")


DATE = re.compile(r"""strftime_now\(\s*(["'])(.+?)\1\s*\)""")


def pin_date(tokenizer, date):
    """Return a tokenizer whose chat template writes this date, not today's; and the date.

    With today's date, a run that is resumed on a later day would train on other documents.
    Collective.

    Args:
        date: the date of the first start, in ISO format; None at the first start.

    Returns:
        The tokenizer itself and None if the template writes no date. Otherwise a copy and the date;
        the original, which is saved, still writes today's date.
    """
    own = tokenizer.chat_template
    texts = own if isinstance(own, dict) else {"": own or ""}
    if not any(DATE.search(text) for text in texts.values()):
        return tokenizer, None
    dates = [date or datetime.now().isoformat(timespec="seconds")]
    if distributed.is_initialized():  # all processes write the same, also around midnight
        distributed.broadcast_object_list(dates)
    [date] = dates
    now = datetime.fromisoformat(date)
    pinned = {
        name: DATE.sub(lambda match: repr(now.strftime(match[2])), text)
        for name, text in texts.items()
    }
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = pinned if isinstance(own, dict) else pinned[""]
    say(f"The chat template writes today's date: {date} is used, also when the run is resumed.")
    return tokenizer, date
