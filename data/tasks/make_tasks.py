"""Make the two embedded zero-shot tasks from the standard library's held-out test modules.

    python data/tasks/make_tasks.py --output data/tasks

Reads the modules that ``data/held_out.json`` lists under "test" from this Python's own library (the
committed files: 3.11.7) and writes, next to the lm-eval task definitions:

``next_line.jsonl``  consecutive lines of a function, then which of four lines follows. The three
others begin statements elsewhere in the same module, are about as long, and get the true line's
indentation. Chance 1/4. ``corrupted.jsonl``  a function without its docstring, and the same
function with one corruption of equal length that still parses. Which is the real one? Chance 1/2.
``kind`` tells the corruption: lines      two adjacent statements exchanged, of which the second
uses a name that the first assigns names      two identifiers on different lines exchanged arguments
two positional arguments of a call exchanged operator   a comparison or an arithmetic operator
replaced by its opposite

Only complete functions found with ``ast`` are used, dedented, at most one item of each task from
each; text that the calibration or validation modules also contain is dropped. One seed and one
Python version give one result. The text is the Python Software Foundation's, under the PSF licence.
"""

import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import click

CONTEXT_LINES = (6, 10)
CONTEXT_CHARACTERS = (100, 450)
LINE_CHARACTERS = (14, 72)  # without indentation
PROGRAM_LINES = (4, 14)
PROGRAM_CHARACTERS = (100, 400)
OPPOSITES: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", ">"),
    ast.Gt: (">", "<"),
    ast.LtE: ("<=", ">="),
    ast.GtE: (">=", "<="),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
}
Item = dict[str, Any]


@dataclass(frozen=True)
class Function:
    """A function's dedented lines without its docstring."""

    module: str
    name: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def functions(module: str, source: str) -> Iterator[Function]:
    """A module's functions and methods (nested ones stay parts of theirs), without decorators,
    comment lines and docstrings.
    """
    lines = source.splitlines()
    for node in _outermost(ast.parse(source)):
        docstring = node.body[0] if ast.get_docstring(node) is not None else None
        skip = range(docstring.lineno, (docstring.end_lineno or 0) + 1) if docstring else range(0)
        kept = [
            lines[i - 1].rstrip() for i in range(node.lineno, (node.end_lineno or 0) + 1) if i not in skip
        ]
        text = textwrap.dedent("\n".join(line for line in kept if line and not line.lstrip().startswith("#")))
        if text.isascii() and "\t" not in text and _parses(text):  # ASCII: ast counts columns in bytes
            yield Function(module, node.name, tuple(text.splitlines()))


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child
        else:
            yield from _outermost(child)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _statements(function: Function) -> list[tuple[int, str]]:
    """Index and stripped text of the lines that begin a statement and say something: no else,
    nested def, or bare word.
    """
    nodes = [n for n in ast.walk(ast.parse(function.text)) if isinstance(n, ast.stmt)]
    found = {
        n.lineno - 1
        for n in nodes
        if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)
    }
    lines = [(i, function.lines[i].strip()) for i in sorted(found)]
    low, high = LINE_CHARACTERS
    return [
        (i, line)
        for i, line in lines
        if low <= len(line) <= high and not line.startswith(("elif", "else", "except", "finally"))
    ]


def next_line(function: Function, others: dict[str, None], rng: random.Random) -> Item | None:
    """An item whose true line is a random statement with enough lines of the function before it;
    ``others``: the module's lines.
    """
    targets = [(i, line) for i, line in _statements(function) if i >= CONTEXT_LINES[0]]
    rng.shuffle(targets)
    for index, line in targets:
        context = "\n".join(function.lines[max(0, index - rng.randint(*CONTEXT_LINES)) : index])
        if not CONTEXT_CHARACTERS[0] <= len(context) <= CONTEXT_CHARACTERS[1] or line in context:
            continue
        here = {text.strip() for text in function.lines}
        alike = [o for o in others if o not in here and abs(len(o) - len(line)) <= max(3, len(line) // 8)]
        # A line that opens a block, where none is opened (or the reverse), would need no
        # understanding to reject.
        alike = [o for o in alike if o.endswith(":") == line.endswith(":")]
        if len(alike) < 3:
            continue
        indent = " " * (len(function.lines[index]) - len(line))
        choices = [indent + text for text in [line, *rng.sample(alike, 3)]]
        order = rng.sample(range(4), 4)
        return {
            "context": context,
            "choices": [choices[i] for i in order],
            "gold": order.index(0),
            "module": function.module,
            "function": function.name,
        }
    return None


Span = tuple[int, int, int]  # line index, first column, end column


def _span(node: ast.expr) -> Span | None:
    """Where an expression stands, if on one line."""
    return (
        (node.lineno - 1, node.col_offset, node.end_col_offset or 0)
        if node.lineno == node.end_lineno
        else None
    )


def _exchange(lines: tuple[str, ...], one: Span, two: Span) -> str:
    """The text with two disjoint spans exchanged, which may stand on one line."""
    changed = list(lines)
    texts = {span: lines[span[0]][span[1] : span[2]] for span in (one, two)}
    # from the end, so that columns hold
    for span, text in sorted([(one, texts[two]), (two, texts[one])], reverse=True):
        line = changed[span[0]]
        changed[span[0]] = line[: span[1]] + text + line[span[2] :]
    return "\n".join(changed)


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, field, None), list):
                yield body


def corrupt_lines(function: Function, tree: ast.AST) -> list[str]:
    """Every text that exchanges an assignment and the one-line statement after it, which uses what
    is assigned.
    """
    results = []
    for body in _bodies(tree):
        for one, two in pairwise(body):
            single = one.lineno == one.end_lineno and two.lineno == two.end_lineno == one.lineno + 1
            if single and isinstance(one, ast.Assign) and _names(one, ast.Store) & _names(two, ast.Load):
                lines = list(function.lines)
                lines[one.lineno - 1], lines[two.lineno - 1] = lines[two.lineno - 1], lines[one.lineno - 1]
                results.append("\n".join(lines))
    return results


def corrupt_names(function: Function, tree: ast.AST) -> list[str]:
    """Every text that exchanges two different names on different lines."""
    used = [(n.id, span) for n in ast.walk(tree) if isinstance(n, ast.Name) and (span := _span(n))]
    pairs = [(a, b) for (x, a), (y, b) in combinations(used, 2) if x != y and a[0] != b[0]]
    return [_exchange(function.lines, a, b) for a, b in pairs]


def corrupt_arguments(function: Function, tree: ast.AST) -> list[str]:
    """Every text that exchanges two different positional arguments of one call."""
    results = []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        spans = [(ast.dump(a), s) for a in call.args if not isinstance(a, ast.Starred) and (s := _span(a))]
        results += [_exchange(function.lines, a, b) for (x, a), (y, b) in combinations(spans, 2) if x != y]
    return results


def corrupt_operator(function: Function, tree: ast.AST) -> list[str]:
    """Every text that replaces one operator by its opposite."""
    found: list[tuple[ast.expr, ast.AST, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            found.append((node.left, node.ops[0], node.comparators[0]))
        elif isinstance(node, ast.BinOp):
            found.append((node.left, node.op, node.right))
    results = []
    for left, operator, right in found:
        if type(operator) not in OPPOSITES or left.end_lineno != right.lineno:
            continue
        old, new = OPPOSITES[type(operator)]
        line, start, end = right.lineno - 1, left.end_col_offset or 0, right.col_offset
        between = function.lines[line][start:end]
        if between.strip() == old:  # no parentheses in between
            changed = function.lines[line][:start] + between.replace(old, new) + function.lines[line][end:]
            results.append("\n".join((*function.lines[:line], changed, *function.lines[line + 1 :])))
    return results


CORRUPTIONS: dict[str, Callable[[Function, ast.AST], list[str]]] = {
    "lines": corrupt_lines,
    "names": corrupt_names,
    "arguments": corrupt_arguments,
    "operator": corrupt_operator,
}


def corrupted(function: Function, kind: str, rng: random.Random) -> Item | None:
    """An item with a random corruption of the kind, if the function allows one."""
    text = function.text
    fits = (
        PROGRAM_LINES[0] <= len(function.lines) <= PROGRAM_LINES[1]
        and PROGRAM_CHARACTERS[0] <= len(text) <= PROGRAM_CHARACTERS[1]
    )
    if not fits:
        return None
    wrong = [
        w
        for w in CORRUPTIONS[kind](function, ast.parse(text))
        if len(w) == len(text) and w != text and _parses(w)
    ]
    if not wrong:
        return None
    gold = rng.randrange(2)
    programs = [rng.choice(wrong), text] if gold else [text, rng.choice(wrong)]
    return {
        "programs": programs,
        "gold": gold,
        "kind": kind,
        "module": function.module,
        "function": function.name,
    }


def _fair(items: dict[str, list[Item]], count: int, rng: random.Random) -> list[Item]:
    """``count`` items, taken in turns from the groups until they are used up, in random order."""
    pools = {name: rng.sample(pool, len(pool)) for name, pool in sorted(items.items())}
    chosen: list[Item] = []
    while len(chosen) < count and any(pools.values()):
        chosen += [pool.pop() for pool in pools.values() if pool]
    if len(chosen) < count:
        raise click.ClickException(f"The test modules give only {len(chosen)} items of {count}.")
    chosen = chosen[:count]
    rng.shuffle(chosen)
    return chosen


def _known(source: str) -> str:
    """Text to look for copies in: without indentation and blank lines."""
    return "\n".join(line.strip() for line in source.splitlines() if line.strip())


def _write(path: Path, items: list[Item]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    click.echo(f"{path}: {len(items)} items, {path.stat().st_size // 1024} KiB")


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=200, show_default=True, help="Items of each task.")
@click.option("--seed", default=0, show_default=True)
def main(output: Path, count: int, seed: int) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = json.loads((Path(__file__).parent.parent / "held_out.json").read_text(encoding="utf-8"))
    copied = _known(
        "\n".join(
            (root / name).read_text(encoding="utf-8") for name in names["calibration"] + names["validation"]
        )
    )
    lines: dict[str, list[Item]] = {}
    programs: dict[str, list[Item]] = {}
    seen: set[str] = set()
    for module in names["test"]:
        rng = random.Random(f"{seed}:{module}")  # one module's change leaves the others' items alone
        found = list(functions(module, (root / module).read_text(encoding="utf-8")))
        others = {line: None for function in found for _, line in _statements(function)}
        for function in found:
            if function.text in seen:
                continue
            seen.add(function.text)
            item = next_line(function, others, rng)
            if item and _known(item["context"]) not in copied:
                lines.setdefault(module, []).append(item)
            for kind in rng.sample(sorted(CORRUPTIONS), len(CORRUPTIONS)):
                item = corrupted(function, kind, rng)
                if item and _known(function.text) not in copied:
                    programs.setdefault(kind, []).append(item)
                    break
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "next_line.jsonl", _fair(lines, count, random.Random(f"{seed}:next_line")))
    _write(output / "corrupted.jsonl", _fair(programs, count, random.Random(f"{seed}:corrupted")))


if __name__ == "__main__":
    main()
