"""Read conversations from the layouts that data sets have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from curlora.data.errors import DataError, LayoutError
from curlora.data.read_table import Table
from curlora.data.row_template import RowTemplate, RowTemplateError

__all__ = ["LAYOUTS", "Conversation", "fault_of", "read_conversations", "trained_turns"]

Conversation = list[dict[str, Any]]
"""Messages with ``role`` and ``content``. A message with ``weight`` 0 is not trained."""

LAYOUTS = ("messages", "sharegpt", "alpaca")

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def read_conversations(
    table: Table,
    where: str,
    number_of: Callable[[int], object],
    *,
    layout: str | None = None,
    column: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
) -> list[Conversation]:
    """Read the conversations of a table in one of these layouts.

    - ``messages``: a column of lists of messages with ``role`` and ``content``, as OpenAI and TRL have it.
    - ``sharegpt``: the same with ``from`` and ``value``.
    - ``alpaca``: the columns ``instruction``, ``input`` (which may be missing or empty) and ``output``.
    - Pairs: ``prompt`` and ``completion``, each a column of text, a template, or a column of messages. Only messages of
      the completion are trained.

    Args:
        table: the table.
        where: how errors call the table.
        number_of: returns the number that errors give for a row.
        layout: one of ``LAYOUTS``; detected from the columns if ``None``.
        column: the column of messages; the layout's usual one if ``None``.
        prompt, completion: columns or templates, for a table of pairs.

    Raises:
        DataError: naming the row, if it holds no conversation, a role is unknown, or no message of the assistant's is
            to be trained.
    """
    if prompt is not None and completion is not None:
        read = _pairs(table, where, prompt, completion)
    elif layout == "alpaca":
        read = _alpaca(table, where)
    elif layout is not None or column is not None:
        usual = ("conversations", "messages") if layout == "sharegpt" else ("messages", "conversations")
        column = column or next((name for name in usual if name in table.columns), usual[0])
        read = _messages(table, where, column, layout)
    else:
        read = _recognised(table, where)
    found = []
    for i, row in enumerate(table):
        try:
            conversation = read(row)
            fault = fault_of(conversation) or _fault_of_tools(row.get("tools"))
        except RowTemplateError as error:
            fault = str(error)
        if fault is not None:
            raise DataError(f"{where}: row {number_of(i)} {fault}")
        found.append(conversation)
    return found


def trained_turns(conversation: Conversation, turns: str = "all") -> list[int]:
    """Return the indices of the trained messages: ``"all"`` of the assistant's answers, or only the ``"last"``.

    Assistant messages before the first user or tool message are not answers, and messages with ``weight`` 0 are
    context: neither is trained.
    """
    roles = [message["role"] for message in conversation]
    asked = next((i for i, role in enumerate(roles) if role in ("user", "tool")), len(roles))
    found = [i for i in range(asked, len(roles)) if roles[i] == "assistant" and conversation[i].get("weight", 1)]
    return found[-1:] if turns == "last" else found


def fault_of(conversation: Any) -> str | None:
    """Return what is wrong with a conversation, worded to follow "row 3", or ``None`` if nothing is."""
    if not isinstance(conversation, (list, tuple)) or not all(isinstance(m, Mapping) for m in conversation):
        return f"is not a list of messages: {_short(conversation)}"
    if not conversation:
        return "is an empty conversation"
    for number, message in enumerate(conversation):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return (
                f"has the unknown role {role!r} in message {number}; known roles are {', '.join(_ROLES)}, and in "
                f"ShareGPT's layout {', '.join(_SHAREGPT)}"
            )
        if not isinstance(content, str):
            return f"has a message whose content is not text: message {number}, {_short(content)}"
        if any(message.get(key) for key in ("tool_calls", "function_call")):
            return f"has a tool call in message {number}: only conversations of plain text can be trained"
    if not trained_turns(list(conversation)):
        roles = ", ".join(message["role"] for message in conversation)
        masked = sum(message.get("weight", 1) == 0 for message in conversation)
        more = f", and {masked} of them have weight 0" if masked else ""
        return f"has no assistant message that answers a user message: its roles are {roles}{more}"
    return None


def _fault_of_tools(tools: Any) -> str | None:
    """Return what is wrong with a row's column ``tools``: schemas of functions, as a list or as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):  # a column of another kind
            return None
    schemas = tools if isinstance(tools, list) else [tools]
    if any(isinstance(schema, Mapping) and schema for schema in schemas):
        return "has tools, which would not reach the prompt: only conversations without tools can be trained"
    return None


def _recognised(table: Table, where: str) -> Callable[[Mapping[str, Any]], Any]:
    columns = set(table.columns)
    for column in ("messages", "conversations"):
        if column in columns:
            return _messages(table, where, column, None)
    if {"instruction", "output"} <= columns:
        return _alpaca(table, where)
    if {"prompt", "completion"} <= columns:
        return _pairs(table, where, "prompt", "completion")
    raise LayoutError(
        f"{where}: the columns {', '.join(table.columns)} match no layout of conversations",
        f"Set messages to the column that holds them, set layout ({', '.join(LAYOUTS)}), or set prompt and completion",
    )


def _messages(table: Table, where: str, column: str, layout: str | None) -> Callable[[Mapping[str, Any]], Any]:
    table.check_columns([column], where)
    return lambda row: _conversation(row.get(column), layout)


def _alpaca(table: Table, where: str) -> Callable[[Mapping[str, Any]], Any]:
    table.check_columns(["instruction", "output"], where)
    texts = {name: RowTemplate(name, table.columns) for name in ("instruction", "output")}
    if "input" in table.columns:
        texts["input"] = RowTemplate("input", table.columns)

    def read(row: Mapping[str, Any]) -> Conversation:
        asked = texts["instruction"].fill(row)
        more = texts["input"].fill(row) if row.get("input") is not None else ""
        return _turns(f"{asked}\n\n{more}" if more.strip() else asked, texts["output"].fill(row))

    return read


def _pairs(table: Table, where: str, prompt: str, completion: str) -> Callable[[Mapping[str, Any]], Any]:
    templates = []
    for given in (prompt, completion):
        try:
            templates.append(RowTemplate(given, table.columns))
        except RowTemplateError as error:
            raise DataError(f"{where}: {error}") from error

    def read(row: Mapping[str, Any]) -> Any:
        if not any(_is_messages(row.get(column)) for column in (prompt, completion)):
            return _turns(*(template.fill(row) for template in templates))
        parts = []
        for given, role, template in zip((prompt, completion), ("user", "assistant"), templates, strict=True):
            value = row.get(given)
            parts.append(_conversation(value, None) if _is_messages(value) else [_message(role, template.fill(row))])
        return [*({**message, "weight": 0} for message in parts[0]), *parts[1]]

    return read


def _turns(asked: str, answered: str) -> Conversation:
    return [_message("user", asked), _message("assistant", answered)]


def _message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _conversation(value: Any, layout: str | None) -> Any:
    """Convert messages to the layout ``messages``; other values are left for :func:`fault_of` to report."""
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        # The library datasets returns a sequence of dicts as a dict of lists.
        length = min(len(part) for part in value.values())
        value = [{key: part[i] for key, part in value.items()} for i in range(length)]
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return value
    return [_laid_out(message, layout) for message in value]


def _laid_out(message: Mapping[str, Any], layout: str | None) -> dict[str, Any]:
    given = {key: part for key, part in message.items() if part is not None}  # datasets fills missing keys with None
    sharegpt = "from" in given and "role" not in given if layout is None else layout == "sharegpt"
    role, content = (given.get("from"), given.get("value")) if sharegpt else (given.get("role"), given.get("content"))
    if sharegpt:
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        content = "".join(part["text"] for part in parts)
    kept = {key: given[key] for key in ("weight", "tool_calls", "function_call") if given.get(key) not in (None, [])}
    return {**_message(role, content), **kept}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
