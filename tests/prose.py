"""Sentences of the pages that are too long to be read once: `make check` runs this on README.md,
CHANGELOG.md and docs/.

A sentence ends with a full stop, a question mark or an exclamation mark before a space. Code that
is set apart is no prose; code inside a sentence is one word. A table's cell is a text of its own,
and so is a heading, an item and a paragraph.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

MOST = 35  # words of a sentence
ROOT = Path(__file__).parent.parent
ENDS = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!vs\.)\s+")


def sentences(page: str) -> Iterator[tuple[int, str]]:
    """Line of the text that it stands in, and each sentence of a page of Markdown."""
    line = 0
    for token in MarkdownIt("commonmark").enable("table").parse(page):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            said = "".join(_said(child.type, child.content) for child in token.children or [])
            yield from ((line, " ".join(one.split())) for one in ENDS.split(said) if one.strip())


def _said(kind: str, content: str) -> str:
    match kind:
        case "text":
            return content
        case "code_inline":
            return "`code`"
        case "softbreak" | "hardbreak":
            return " "
    return ""


def too_long(page: str) -> list[tuple[int, int, str]]:
    """Line, number of words, and text of each sentence with more than ``MOST`` words; signs alone
    are no words.
    """
    found = [
        (line, len([word for word in said.split() if re.search(r"\w", word)]), said)
        for line, said in sentences(page)
    ]
    return [one for one in found if one[1] > MOST]


def main() -> int:
    """Print the long sentences of the pages; 1 if there are any."""
    count = 0
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line, words, said in too_long(path.read_text(encoding="utf-8")):
            count += 1
            print(f"{path.relative_to(ROOT)}:{line}: {words} words, at most {MOST}: {said[:1500]}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
