"""Patterns for the names of matrices: ``model.include``, ``model.exclude``, and manual sparsities."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline_lib.core.errors import SparselineError

EXPRESSION = "re:"  # llm-compressor's mark of a regular expression
Names = Sequence[str]  # of one matrix; the first is its own


@dataclass(frozen=True)
class Selection:
    """The matrices to prune, and the number of matches of each pattern."""

    included: list[bool]  # in the order of the matrices
    matched: list[tuple[str, str, int]]  # include or exclude, the pattern, how many

    def __str__(self) -> str:
        told = f"included {sum(self.included)} of {len(self.included)} matrices"
        return "; ".join(
            [
                told,
                *(
                    f"{key} {pattern!r} matched {count}"
                    for key, pattern, count in self.matched
                    if pattern != "*"
                ),
            ]
        )


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches: a shell pattern with ``*`` and ``?`` (brackets are literal), or ``re:``
    and a regular expression.

    A shell pattern matches a whole name, or the name of a module that contains it
    (``layers.0.mlp``). An expression must match from the name's start, but not to its end, as in
    llm-compressor.

    Raises:
        ValueError: the text after ``re:`` is not a regular expression.
    """
    if pattern.startswith(EXPRESSION):
        try:
            expression = re.compile(pattern.removeprefix(EXPRESSION))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return lambda name: expression.match(name) is not None
    literal = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    whole = re.compile(rf"{literal}(\..*)?", re.DOTALL)
    return lambda name: whole.fullmatch(name) is not None


def select(
    matrices: Sequence[Names], include: Sequence[str], exclude: Sequence[str], never: Sequence[str]
) -> Selection:
    """Apply the patterns; ``exclude`` has priority.

    Args:
        matrices: every name of each matrix.
        never: names of parameters that are never pruned, for the error of a pattern that matches
            only these.

    Raises:
        SparselineError: a pattern matches no matrix or is not a regular expression, or nothing is
            left to prune.
    """
    taken: dict[str, list[bool]] = {"include": [False] * len(matrices), "exclude": [False] * len(matrices)}
    matched = []
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            found = hits(f"model.{key}", pattern, matrices, never)
            taken[key] = [a or b for a, b in zip(taken[key], found, strict=True)]
            matched.append((key, pattern, sum(found)))
    included = [a and not b for a, b in zip(taken["include"], taken["exclude"], strict=True)]
    if not any(included):
        raise SparselineError(
            "params.yaml: model.include and model.exclude leave no matrix to prune; widen include."
        )
    return Selection(included, matched)


def hits(key: str, pattern: str, matrices: Sequence[Names], never: Sequence[str] = ()) -> list[bool]:
    """Whether the pattern, the value of ``key`` in params.yaml, matches each matrix.

    Raises:
        SparselineError: it matches none, or is not a regular expression.
    """
    try:
        matches = matcher(pattern)
    except ValueError as error:
        raise SparselineError(
            f"params.yaml: {key}: {pattern!r} is not a regular expression ({error}); correct it."
        ) from error
    found = [any(map(matches, names)) for names in matrices]
    if not any(found):
        raise SparselineError(_unmatched(key, pattern, matrices, next(filter(matches, never), None)))
    return found


def _unmatched(key: str, pattern: str, matrices: Sequence[Names], other: str | None) -> str:
    examples = f"names are, for example, {matrices[0][0]!r} and {matrices[-1][0]!r}"
    if other is not None:
        why = f"matches {other}, which is never pruned, and no matrix"
    elif "[" in pattern and not pattern.startswith(EXPRESSION):
        why = f"matches no matrix (brackets are literal; a set of letters needs {EXPRESSION})"
    else:
        why = "matches no matrix"
    return f"params.yaml: {key}: {pattern!r} {why}; {examples}: correct or remove the pattern."
