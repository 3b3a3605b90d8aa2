"""Read rows of the usual shapes as conversations, pairs or texts; name what is wrong with a row.

These columns are known, and the first that fits is used:

    messages                    list of {"role", "content"}, or {"from", "value"}; also
                                conversations or conversation
    prompt, completion          two strings, or two lists of messages
    instruction (input) output  also response instead of output; and question, query or prompt with
                                answer or response
    text                        or any other column of texts or conversations, by its name

Beside conversations, the column system (or system_prompt) is the first message, and tools are the
tools that the assistant may call; beside instructions, history holds earlier turns.

This file imports no other file of the project and can be copied along with a script.
"""

import ast
import json
from itertools import islice
from typing import NamedTuple

CHATS = ("messages", "conversations", "conversation")
INSTRUCTIONS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("input", "output"),
)
COLUMNS = (*CHATS, "prompt", "text", *dict.fromkeys(pair[0] for pair in INSTRUCTIONS))
SYSTEM = ("system", "system_prompt")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool")
# keys of a message: 0 or false for no label; loss counts only as true or false
WEIGHTS = ("weight", "train", "training", "loss_mask", "loss")
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
BROKEN = "broken row"  # a column that holds why a row of a stream cannot be read
BEGINNING = 1000  # rows that are looked at for the names of columns


class DataError(Exception):
    """Data that cannot be trained on: one sentence names the file or the row, and what to do."""


class EmptyRow(DataError):
    """A row with nothing to learn. It is left out and counted."""


class Conversation(NamedTuple):
    """A conversation as chat templates read it.

    Fields:
        messages: dicts with role, content, and what other keys the data has.
        learned: indices of the assistant's messages that are trained on.
        tools: list of JSON schemas, or None.
        notes: a `note` for everything that is not used, or is changed when it is read.
    """

    messages: list[dict]
    learned: list[int]
    tools: list | None
    notes: list[str]


def note(text, unit):
    """Return a note for the census: what was found, and the unit of its count."""
    return f"{text}|{unit}"


def census(counts):
    """Return notes with their counts as one text: "column id (20 rows); ..."."""
    parts = [(*key.rpartition("|")[::2], count) for key, count in counts.items()]
    return "; ".join(f"{text} ({count:,} {unit})" for text, unit, count in parts)


# Columns ------------------------------------------------------------------------------------------
def shape_of(rows, text_field=""):
    """Return which of the known shapes the rows have, as the names of its columns.

    Raises:
        DataError: there are no rows, or none of the known columns.
    """
    columns = list(dict.fromkeys(column for row in islice(rows, BEGINNING) for column in row))
    if not columns:
        raise DataError("the data has no rows: give some")
    for column in CHATS:
        if column in columns:
            return (column,)
    for pair in (("prompt", "completion"), *INSTRUCTIONS):
        if set(pair) <= set(columns):
            return pair
    field = text_field or "text"
    if field not in columns:
        raise DataError(
            f"the columns are {', '.join(columns)}: there must be messages, prompt and completion, "
            "instruction and output, or question and answer; or --dataset_text_field must name a "
            f"column of text (it says {field})"
        )
    return (field,)


def used_columns(shape):
    """Return the columns that are read from rows of this shape."""
    if shape in INSTRUCTIONS:
        return (*shape, "input", "history", "tools", *SYSTEM)
    return (*shape, "tools", *SYSTEM)


def holds_chats(rows, shape):
    """Return whether rows of a shape are conversations, and not pairs of strings or texts."""
    if shape == ("prompt", "completion"):
        values = (
            as_messages(row.get(column)) for row in islice(rows, BEGINNING) for column in shape
        )
        return any(isinstance(value, list) for value in values)
    if len(shape) == 1 and shape[0] not in CHATS:  # named by --dataset_text_field
        return any(isinstance(row.get(shape[0]), list) for row in islice(rows, BEGINNING))
    return True


def as_document(row, shape, where):
    """Return a row as a `Conversation`, or as the strings of a pair or a text.

    Args:
        row: column -> value. None counts as absent, also inside a value.
        shape: what `shape_of` returned for the split.
        where: the name of the row in an error.

    Raises:
        EmptyRow: there is nothing to learn.
        DataError: a value is of another type.
    """
    row = without_nulls(dict(row))
    if BROKEN in row:
        raise DataError(f"{where} {row[BROKEN]}: fix it")
    if shape[0] in CHATS or (len(shape) == 1 and isinstance(row.get(shape[0]), list)):
        return read_chat(row, shape[0], where)
    if shape in INSTRUCTIONS:
        return read_instruction(row, shape, where)
    notes = []
    values = [as_messages(row.get(column, "")) for column in shape]
    if len(values) == 2 and any(isinstance(value, list) for value in values):
        prompt, completion = values
        if not completion:
            raise EmptyRow(note("rows with an empty completion, which are left out", "rows"))
        for column, value in zip(shape, values):
            if isinstance(value, list) and isinstance(row[column], str):
                notes.append(note(f"{column} as text, which is parsed", "rows"))
        prompt = [message("user", prompt)] if isinstance(prompt, str) else prompt
        completion = (
            [message("assistant", completion)] if isinstance(completion, str) else completion
        )
        return converse(row, [*prompt, *completion], where, notes, first=len(prompt))
    texts = [as_text(row.get(column, ""), f"{where} has no text in {column}") for column in shape]
    if not texts[-1]:
        raise EmptyRow(note(f"rows with an empty {shape[-1]}, which are left out", "rows"))
    return tuple(texts)


def read_chat(row, column, where):
    """Return a row of messages as a `Conversation`."""
    messages, notes = row.get(column), []
    if isinstance(messages, str) and messages.strip():
        messages = parse(messages)
        if isinstance(messages, list):
            notes.append(note(f"{column} as text, which is parsed", "rows"))
    if not messages:
        raise EmptyRow(note(f"rows with an empty {column}, which are left out", "rows"))
    if not isinstance(messages, list):
        kind = type(row[column]).__name__
        raise DataError(f"{where} holds a {kind}, not a list of messages: convert it")
    return converse(row, messages, where, notes)


def read_instruction(row, shape, where):
    """Return an instruction, its input, the answer and earlier turns as a `Conversation`."""
    names = [shape[0], *(["input"] if shape[0] != "input" else []), shape[1]]
    texts = [as_text(row.get(name, ""), f"{where} has no text in {name}") for name in names]
    if not texts[-1].strip():
        raise EmptyRow(note(f"rows with an empty {shape[1]}, which are left out", "rows"))
    history = row.get("history") or []
    history = parse(history) if isinstance(history, str) else history
    messages, notes = [], []
    for turn in history if isinstance(history, list) else [history]:
        if isinstance(turn, list) and len(turn) == 2:
            messages += [message("user", turn[0]), message("assistant", turn[1])]
        elif isinstance(turn, dict) and "role" in turn:
            messages.append(turn)
        else:
            raise DataError(
                f"{where} has a history that is not pairs of question and answer: fix it"
            )
    question = "\n\n".join(part for part in texts[:-1] if part)
    messages += [message("user", question), message("assistant", texts[-1])]
    return converse(row, messages, where, notes)


def message(role, content):
    """Return a message as chat templates know it."""
    return {"role": role, "content": content}


# Messages -----------------------------------------------------------------------------------------
def converse(row, entries, where, notes, first=0):
    """Return messages, with the row's system message and tools, as a `Conversation`.

    Args:
        first: index of the first message that may be trained on.
    """
    messages, learned = [], []
    for number, entry in enumerate(entries):
        one, has_label = read_message(entry, f"{where}, message {number + 1}", notes)
        messages.append(one)
        if has_label and number >= first:
            learned.append(number)
    system = next((row[column] for column in SYSTEM if row.get(column)), "")
    system = as_text(system, f"{where} has no text in system")
    if system and messages and messages[0]["role"] == "system":
        notes.append(note("column system beside a system message, which is used", "rows"))
    elif system:
        messages = [message("system", system), *messages]
        learned = [number + 1 for number in learned]
    tools = row.get("tools")
    is_text = isinstance(tools, str) and tools.strip()
    tools = parse(tools, keeps_nulls=True) if is_text else tools or None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where} has tools that are not a list of JSON schemas: fix them")
    return Conversation(messages, learned, tools or None, notes)


def read_message(entry, where, notes):
    """Return a message with the names that chat templates know, and whether it may have a label.

    Args:
        notes: list that gets what is changed when it is read.

    Raises:
        DataError: it is no message, or its content is of another type.
    """
    keys = dict(entry) if isinstance(entry, dict) else {}
    said = keys.pop("role", None) or keys.pop("from", None)
    content = keys.pop("content", None)
    content = keys.pop("value", None) if content in (None, "") else content
    content = "" if content is None else content
    if said is None:
        raise DataError(f'{where} is not {{"role": ..., "content": ...}}: fix it')
    if not isinstance(said, str):
        raise DataError(f"{where} has the role {said!r}: it must be text")
    role = ROLES.get(said.strip().lower(), said)
    role = role.strip().lower() if role.strip().lower() in KNOWN_ROLES else role
    if role != said:
        notes.append(note(f"role {said} read as {role}", "messages"))
    elif role not in KNOWN_ROLES:
        notes.append(note(f"messages of the role {role}, which have no label", "messages"))
    if isinstance(content, dict | list) and role == "tool" and not is_parts(content):
        notes.append(note("results of tools as data, written as JSON", "messages"))
        content = json.dumps(content, ensure_ascii=False)
    elif isinstance(content, dict | list):
        content = join_parts(content, where, notes)
    content = as_text(content, f"{where} ({role}) has no text")
    names = [key for key in WEIGHTS if key in keys]
    names = [key for key in names if key != "loss" or isinstance(keys[key], bool)]
    weights = {key: keys.pop(key) for key in names}
    if any(weight not in (0, 1) for weight in weights.values()):
        raise DataError(f"{where} has {weights}: it must be 0 or 1, false or true")
    if "tool_calls" in keys:
        keys["tool_calls"] = read_tool_calls(keys["tool_calls"], where)
    is_empty = not content.strip() and not set(SPOKEN) & set(keys)
    if role == "assistant" and not all(weights.values()):
        notes.append(
            note(f"turns with {' and '.join(weights)} 0 or false, which have no label", "turns")
        )
    elif role == "assistant" and is_empty:
        notes.append(note("turns of the assistant without text, which have no label", "turns"))
    elif weights and role != "assistant" and any(weights.values()):
        name = " and ".join(weights)
        notes.append(note(f"key {name} of messages that are not the assistant's", "messages"))
    elif not content.strip() and role != "assistant":
        notes.append(note(f"messages of the role {role} without text", "messages"))
    has_label = role == "assistant" and not is_empty and all(weights.values())
    # some templates write an empty answer beside tool calls, if there is an empty content
    one = {"role": role} if "tool_calls" in keys and not content else message(role, content)
    return one | {key: keys[key] for key in keys if keys[key] != []}, has_label


def is_parts(content):
    """Return whether content is a list of parts, such as texts and images."""
    parts = [content] if isinstance(content, dict) else content
    return all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in parts
    )


def join_parts(content, where, notes):
    """Return the text of content that is in parts; raise DataError if a part is not text."""
    parts = [content] if isinstance(content, dict) else content
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"{where} has a part of the kind {kind}, and only text is trained on: drop the "
                "part or the row"
            )
        texts.append(part["text"])
    if len(texts) > 1:
        notes.append(note("content in several parts, joined by line breaks", "messages"))
    return "\n".join(texts)


def read_tool_calls(calls, where):
    """Return tool calls with their arguments as templates want them: as objects, not as text."""
    calls = parse(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where} has tool_calls that are not a list of objects: fix them")
    read = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = parse(function["arguments"], keeps_nulls=True)
            function = function | {"arguments": arguments}
        read.append(call | {"function": function} if "function" in call else function)
    return read


# Values -------------------------------------------------------------------------------------------
def without_nulls(value):
    """Return a value without the keys that hold None: Arrow adds the keys of other rows."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def as_text(value, complaint):
    """Return a text, or a whole number as text; raise DataError for other types."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{complaint}, but {type(value).__name__}: convert it")
    return value


def as_messages(value):
    """Return the list of messages that a text holds; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        parsed = parse(value)
        if isinstance(parsed, list) and all(
            isinstance(one, dict) and {"role", "from"} & set(one) for one in parsed
        ):
            return parsed
    return value


def parse(text, keeps_nulls=False):
    """Return the value that a text writes in JSON or Python; the text if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text) if keeps_nulls else without_nulls(read(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text
