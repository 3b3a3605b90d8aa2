"""Conversations as a chat template writes them, and where in the text the assistant speaks."""

import json
import os
import re
from functools import partial
from typing import NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from utils.conversations import DataError, note

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Text(NamedTuple):
    """A conversation as text.

    Fields:
        text: what the template wrote.
        spans: (begin, end) in characters of what is trained on.
        length: number of messages in it.
    """

    text: str
    spans: list[tuple[int, int]]
    length: int


def render(tokenizer, chat, where, learns_all=False):
    """Return the texts of a conversation to train on, and notes of what these texts leave out.

    Usually there is one text. Some templates rewrite earlier turns: Qwen3's drops the thoughts in
    them. Then such a turn gets a text of its own, which ends with this turn. So the model learns
    each turn after exactly the text that it sees when it generates the turn.

    Args:
        chat: a `Conversation`.
        where: the name of the row in an error.
        learns_all: whether every token is trained on. Then there is one text.

    Raises:
        DataError: the template raises, does not write a tool call, or does not show where a turn
            begins.
    """
    write = partial(apply_template, tokenizer, chat.tools, where)
    texts, notes = [Text(write(chat.messages)[0], [], len(chat.messages))], []
    if learns_all:
        texts[0].spans.append((0, len(texts[0].text)))
    for number in () if learns_all else reversed(chat.learned):
        turn = write(chat.messages[: number + 1])
        through = turn[0].rstrip()
        if not texts[-1].text.startswith(through):
            texts.append(Text(turn[0], [], number + 1))
            unit = "documents"
            notes.append(
                note("earlier turns that the template rewrites, each in its own document", unit)
            )
        spans = find_turn(write, chat.messages, number, turn, where, notes)
        texts[-1].spans.extend(spans)
    if not texts[0].spans and len(texts) > 1:  # its answers have texts of their own
        del texts[0]
    return texts[::-1], notes + find_unwritten(tokenizer, chat, where, texts)


def apply_template(tokenizer, tools, where, messages, add_generation_prompt=False):
    """Return what the template writes, and the spans that it marks with {% generation %}."""
    template = tokenizer.get_chat_template(None, tools)
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    written, errors = [], []
    for form in forms_of(messages):
        try:
            if GENERATION.search(template):
                marking = {"chat_template": template, "return_assistant_tokens_mask": True}
                marking |= options | tokenizer.special_tokens_map
                [text], [spans] = render_jinja_template([form], **marking)
            else:
                text, spans = tokenizer.apply_chat_template(form, tokenize=False, **options), []
        except Exception as error:  # a template may raise anything
            errors.append(error)
            continue
        written.append((text, [(begin, end) for begin, end in spans if begin < end]))
        contents = [message.get("content", "").strip() for message in messages]
        if not any(contents) or any(content and content in text for content in contents):
            return written[-1]
    if written:  # a template that writes no content as it stands
        return written[0]
    reason = " ".join(str(errors[0]).split()) or type(errors[0]).__name__
    raise DataError(
        f"{where}: the chat template raises an error ({reason}): fix the row or the template, or "
        "take another with --chat_template_format"
    ) from errors[0]


def forms_of(messages):
    """Yield the messages in the forms that templates want.

    The arguments of tool calls may be objects or JSON text, and the content beside them absent or
    empty. Content may be text, or a list of parts, as templates of vision-language models want it.
    """
    yield messages
    if any("tool_calls" in message for message in messages):
        as_text = [with_text_arguments(message) for message in messages]
        yield as_text
        for form in (messages, as_text):
            yield [{"content": ""} | message for message in form]
    yield [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if message.get("content")
        else message
        for message in messages
    ]


def with_text_arguments(message):
    """Return a message with the arguments of its tool calls as JSON text."""
    calls = []
    for call in message.get("tool_calls", []):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = call | {"function": function | {"arguments": text}}
        calls.append(call)
    return message | {"tool_calls": calls} if calls else message


def find_turn(write, messages, number, turn, where, notes):
    """Return the spans of a turn of the assistant in the text that ends with it.

    The turn begins where the text with the prompt for generation ends. If the template begins the
    turn otherwise than that prompt, the turn begins at the first difference.

    Args:
        turn: what `write` returned for the messages through this one.
        notes: list that gets what is not found in this way.
    """
    through, marked = turn[0].rstrip(), turn[1]
    prompt, before = "", ""
    if number:
        before, earlier = write(messages[:number])
        prompt, _ = write(messages[:number], add_generation_prompt=True)
        marked = marked[len(earlier) :]
        if earlier and not marked:
            notes.append(note("turns that the template does not mark as generated", "turns"))
            return []
    if marked:
        return marked
    if number and through.startswith(prompt):
        return [(len(prompt), len(through))]
    common = len(os.path.commonprefix([prompt, through]))
    if number and common >= len(os.path.commonprefix([before.rstrip(), prompt])):
        unit = "turns"
        notes.append(note("answers whose beginning differs from the prompt for generation", unit))
        return [(common, len(through))]
    content = messages[number].get("content", "").strip()
    start = through.rfind(content) if content else -1
    if start < 0:
        raise DataError(
            f"{where}: the chat template does not show where the assistant's turns begin and end: "
            "give --chat_template_format chatml, or a template that does, or --train_on all"
        )
    notes.append(note("answers found by their text, without a header", "turns"))
    return [(start, len(through))]


def find_unwritten(tokenizer, chat, where, texts):
    """Return notes of what the template does not write of a conversation.

    Raises:
        DataError: it does not write a tool call.
    """
    notes = []
    rewrite = partial(apply_template, tokenizer, chat.tools, where)
    names = {key for message in chat.messages for key in message} - {"role", "content"}
    for name in sorted(names):
        without = [
            {"content": ""} | {key: value for key, value in message.items() if key != name}
            for message in chat.messages
        ]
        holders = [message for message in chat.messages if name in message]
        if not differs(rewrite, without, texts):
            if name == "tool_calls":
                raise DataError(
                    f"{where} calls tools, which the chat template does not write: take a template "
                    "that does, or drop the row"
                )
            notes += [note(f"key {name}", "messages")] * len(holders)
        else:
            texts_of_key = [message[name] for message in holders if isinstance(message[name], str)]
            notes += [
                note(f"key {name}, which the template leaves out there", "messages")
                for value in texts_of_key
                if not is_written(value, texts)
            ]
    notes += [
        note("messages whose text the template changes or leaves out", "messages")
        for message in chat.messages
        if not is_written(message.get("content", ""), texts)
    ]
    if chat.tools:
        without_tools = partial(apply_template, tokenizer, None, where)
        if not differs(without_tools, chat.messages, texts):
            notes.append(note("column tools, which the template does not write", "rows"))
    return notes


def differs(write, messages, texts):
    """Return whether `write` makes texts of the messages that differ from `texts`."""
    try:
        return any(write(messages[: one.length])[0] != one.text for one in texts)
    except DataError:  # the template needs what the messages lack
        return True


def is_written(value, texts):
    """Return whether a value stands in one of the texts."""
    return any(value.strip() in one.text for one in texts)
