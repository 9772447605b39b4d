"""The pages say what the code says. Oracle: the messages in the code's own syntax trees."""

import ast
from functools import cache
from pathlib import Path

import prose
import pytest
import regex

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [message.strip("`").strip() for message in regex.findall(r"``.+?``(?!`)|`[^`]+`", PAGE)]
OURS = [message for message in QUOTED if message.startswith(("error: ", "make: ")) and message != "error: …"]
SHORTEST = 12  # characters of a message's own text: fewer say nothing
Template = tuple[str | None, ...]  # a message's own text, and None for each value in it


def _template(node: ast.expr) -> Template:
    match node:
        case ast.Constant(value=str(text)):
            return (text,)
        case ast.JoinedStr(values=parts):
            return tuple(piece for part in parts for piece in _template(part))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (*_template(left), *_template(right))
    return (None,)


@cache
def templates() -> frozenset[Template]:
    found: set[Template] = set()
    for folder in ("pipeline_lib", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                template = _template(node) if isinstance(node, ast.expr) else ()
                if any(piece and len(piece) >= SHORTEST for piece in template):
                    found.add(template)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(found | {(text,) for text in regex.findall(r'echo "(make: [^"]+)"', makefile)})


def says(template: Template, text: str, cut: bool) -> bool:
    """Whether the template gives the text, or, if it is cut, something that begins so; some of the
    template's own text must be in it.
    """
    pattern = "".join(
        ".*?" if piece is None else regex.escape(piece, literal_spaces=True) for piece in template
    )
    own = [piece for piece in template if piece and len(piece) >= SHORTEST]
    seen = any(
        piece in text or any(text.endswith(piece[:end]) for end in range(SHORTEST, len(piece)))
        for piece in own
    )
    return seen and regex.fullmatch(pattern, text, partial=cut) is not None


def exists(message: str) -> bool:
    """Whether the code has the message. An ellipsis at the end cuts it, one before the end stands
    for a value.
    """
    text = message.removeprefix("error: ")
    cut = text.endswith("…")
    text = text.removesuffix("…").rstrip() if cut else text
    return any(says(template, text, cut) for template in templates())


def test_there_are_messages_to_check() -> None:
    assert len(OURS) >= 10


@pytest.mark.parametrize("message", OURS)
def test_a_quoted_message_exists(message: str) -> None:
    assert exists(message), f"docs/troubleshooting.md quotes a message that the code does not have: {message}"


@pytest.mark.parametrize(
    "message",
    [
        "error: env.lock.json wants torch 2.12, but 2.13.0 runs here; run `make environment`.",
        "error: the disk is too small for …",
        "error: params.yaml: variants.wanda.selection.damping is gone; add it.",
    ],
)
def test_a_message_that_does_not_exist_is_found(message: str) -> None:
    assert not exists(message)


# Sentences; `make check` asks of every page what is asked of these here

LONG = "word " * (prose.MOST + 1)


@pytest.mark.parametrize(
    "page",
    [
        f"{LONG}end.\n",
        f"Short. {LONG}end.\n",
        f"# {LONG}\n",
        f"- an item\n- {LONG}\n",
        f"> {LONG}\n",
        f"| a | b |\n|---|---|\n| c | {LONG} |\n",
        f"A [link of {LONG}](x.md) and **{LONG}**.\n",
        "\n".join(["word"] * (prose.MOST + 1)) + "\n",  # wrapped
        f"{LONG[:50]}e.g. {LONG[:125]}\n",
    ],
)
def test_a_long_sentence_is_found(page: str) -> None:
    assert len(prose.too_long(page)) == 1


@pytest.mark.parametrize(
    "page",
    [
        "word " * prose.MOST,
        "Word word. " * prose.MOST,
        f"```sh\n{LONG}\n```\n",
        f"    {LONG}\n",
        f"Read `{LONG}` first.\n",
        f"[short](https://example.org/{'a/' * 99})\n",
        "| a | b |\n|---|---|\n" + "| word word | word word |\n" * prose.MOST,
        "word – · / " * prose.MOST,
    ],
)
def test_what_is_no_long_sentence(page: str) -> None:
    assert prose.too_long(page) == []


def test_a_sentence_is_told_with_its_line() -> None:
    assert prose.too_long(f"# Title\n\nShort.\n\n{LONG}end\n") == [(5, prose.MOST + 2, f"{LONG}end")]


# Lines

WIDE = "word " * 40


@pytest.mark.parametrize("page", [f"{WIDE}\n", f"Short.\n\n- {WIDE}\n", f"short\n{WIDE}\n"])
def test_a_wide_line_is_found(page: str) -> None:
    assert len(prose.wide(page)) == 1


@pytest.mark.parametrize(
    "page", [f"# {WIDE}\n", f"```\n{WIDE}\n```\n", f"| a |\n|---|\n| {WIDE} |\n", f"![{WIDE}](x.svg)\n"]
)
def test_what_cannot_be_wrapped_may_be_wide(page: str) -> None:
    assert prose.wide(page) == []
