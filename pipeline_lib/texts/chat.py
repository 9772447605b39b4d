"""Chats: check messages, and render them by a chat template."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline_lib.core import bounded
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.texts.records import kind

Message = dict[str, Any]


def check_messages(values: list[Any], where: str) -> list[Message]:
    """The messages of one chat in a form that every template accepts.

    Text parts become one string, and null beside tool calls becomes an empty string, because
    templates without support for them would print Python's notation. Other keys with null are
    removed.

    Raises:
        SparselineError: a message has no role, no text, or parts that are not text.
    """
    return [_message(value, f"{where}: message {number}") for number, value in enumerate(values, 1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise SparselineError(f"{where} is {kind(value)}; a message is an object with 'role' and 'content'.")
    if (
        not isinstance(value.get("role"), str)
        or not value["role"]
        or not {"content", "tool_calls"} & value.keys()
    ):
        has = ", ".join(map(repr, value)) or "no keys"
        hint = (
            "; rename 'from' to 'role' and 'value' to 'content'" if {"from", "value"} <= value.keys() else ""
        )
        raise SparselineError(f"{where} has {has}; a message is an object with 'role' and 'content'{hint}.")
    content = value.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise SparselineError(
                f"{where} has a part that is not text; a list of parts may hold {{'type': 'text', 'text': …}}"
                " only."
            )
        content = "".join(map(str, parts))
    elif content is None and isinstance(value.get("tool_calls"), list) and value["tool_calls"]:
        content = ""
    if not isinstance(content, str):
        raise SparselineError(
            f"{where} has {kind(content)} as content; "
            "give a string, a list of text parts, or null beside a list of tool calls that is not empty."
        )
    return {key: kept for key, kept in value.items() if kept is not None} | {"content": content}


def is_blank(messages: list[Message]) -> bool:
    """Whether no message has content."""
    return not any(message["content"].strip() or message.get("tool_calls") for message in messages)


def ask(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[Message]], places: Sequence[str]
) -> list[str]:
    """Each chat as ``render`` writes it, up to its last answer, with the generation prompt. Chats
    without a message before the answer are skipped.

    Raises:
        SparselineError: as ``render``.
    """
    begun = [(_before_last_answer(chat), place) for chat, place in zip(chats, places, strict=True)]
    begun = [(chat, place) for chat, place in begun if chat]
    render(tokenizer, [chat for chat, _ in begun], [place for _, place in begun])
    return [_render(tokenizer, chat, place, ask=True) for chat, place in begun]


def _before_last_answer(messages: list[Message]) -> list[Message]:
    """The messages before the assistant's last one; all messages if there is none."""
    last = max(
        (at for at, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages)
    )
    return messages[:last]


def render(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[Message]], places: Sequence[str]
) -> list[str]:
    """Each chat as the model's chat template writes it. The template is a program; ``places`` are the
    sources of the chats, for errors.

    Raises:
        SparselineError: there is no template; it fails on a chat or does not finish; or it drops
            the content of a role.
    """
    if tokenizer.chat_template is None:
        raise SparselineError(
            "texts: chat_template is true, but this model's tokenizer has none; set it to false."
        )
    tried: set[tuple[str, bool, str]] = set()

    def one(item: tuple[list[Message], str]) -> str | SparselineError:
        try:
            return _rendered(tokenizer, *item, tried)
        except SparselineError as error:
            return error

    rendered: list[str] = []
    try:
        for found in bounded.each(one, list(zip(chats, places, strict=True))):
            if isinstance(found, SparselineError):
                raise found
            rendered.append(found)
    except bounded.BoundError as error:
        raise SparselineError(
            f"{places[len(rendered)]}: the model's chat template does not finish on this record ({error});"
            " take another template."
        ) from error
    return rendered


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, tried: set[tuple[str, bool, str]]
) -> str:
    """Render one chat, and test the template with each kind of message that was not ``tried`` yet.
    Each test costs a rendering.
    """
    text = _render(tokenizer, messages, where)
    for which, changed in _changes(messages):
        if which not in tried:
            tried.add(which)
            if _same(tokenizer, changed, text, where):
                role, _, part = which
                raise SparselineError(
                    f"{where}: the model's chat template leaves out the {part} of messages with the role"
                    f" {role!r}; use the template's own roles, or remove those messages."
                )
    return text


def _changes(messages: list[Message]) -> Iterator[tuple[tuple[str, bool, str], list[Message]]]:
    """The chat with one part of one message changed, for every such part, and the kind of message
    that this tests.
    """
    for index, message in enumerate(messages):
        calls = bool(message.get("tool_calls"))
        changes = (
            {"content": {**message, "content": message["content"] + " and more"}}
            if message["content"].strip()
            else {}
        )
        if calls:
            changes["tool calls"] = {key: value for key, value in message.items() if key != "tool_calls"}
        for part, changed in changes.items():
            yield (message["role"], calls, part), [*messages[:index], changed, *messages[index + 1 :]]


def _same(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, where: str) -> bool:
    try:
        return _render(tokenizer, messages, where) == text
    except SparselineError:  # the template reads what was changed
        return False


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, ask: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, **({"add_generation_prompt": True} if ask else {})
            )
        )
    except Exception as error:  # a template is foreign code that may raise anything
        reason = " ".join(str(error).split())
        raise SparselineError(
            f"{where}: the model's chat template does not take this record ({type(error).__name__}:"
            f" {reason}); correct the record or the template."
        ) from error
