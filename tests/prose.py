"""Check the pages for long sentences and lines, and README.md for its length. `make check` runs this.

A sentence ends with a full stop, a question mark or an exclamation mark before a space. Code blocks
are not prose; code inside a sentence is one word. Table cells, headings, items and paragraphs are
separate texts. Lines are limited in paragraphs and items only.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

MOST = 35  # words of a sentence
WIDTH = 105  # columns of a line of prose
README = 150  # lines
ROOT = Path(__file__).parent.parent
ENDS = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!vs\.)\s+")


def sentences(page: str) -> Iterator[tuple[int, str]]:
    """The line of the text, and each sentence of a page of Markdown."""
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
    """Line, number of words, and text of each sentence with more than ``MOST`` words. Signs do not
    count as words.
    """
    found = [
        (line, len([word for word in said.split() if re.search(r"\w", word)]), said)
        for line, said in sentences(page)
    ]
    return [one for one in found if one[1] > MOST]


def wide(page: str) -> list[tuple[int, int]]:
    """Line and columns of each line of prose with more than ``WIDTH`` columns that could be wrapped."""
    lines = page.split("\n")
    prose = {
        number
        for token in MarkdownIt("commonmark").enable("table").parse(page)
        if token.type == "paragraph_open" and token.map
        for number in range(*token.map)
    }
    return [
        (number + 1, len(lines[number]))
        for number in sorted(prose)
        if len(lines[number]) > WIDTH and not lines[number].startswith("![")
    ]


def main() -> int:
    """Print what is too long; 1 if there is anything."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").count("\n")
    if count := int(readme > README):
        print(f"README.md has {readme} lines, at most {README}")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line, columns in wide(path.read_text(encoding="utf-8")):
            count += 1
            print(f"{path.relative_to(ROOT)}:{line}: {columns} columns, at most {WIDTH}")
        for line, words, said in too_long(path.read_text(encoding="utf-8")):
            count += 1
            print(f"{path.relative_to(ROOT)}:{line}: {words} words, at most {MOST}: {said[:1500]}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
