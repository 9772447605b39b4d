"""Patterns for the names of matrices: ``model.include``, ``model.exclude``, and manual sparsities."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline_lib.core.errors import SparselineError

EXPRESSION = "re:"  # marks a regular expression, as in llm-compressor
Names = Sequence[str]  # all names of one matrix; the first is its own


@dataclass(frozen=True)
class Selection:
    """The matrices to prune, and the number of matches of each pattern."""

    included: list[bool]  # in the order of the matrices
    matched: list[tuple[str, str, int]]  # include or exclude, the pattern, the number of its matches

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
    """The function that tells whether a name matches. The pattern is a shell pattern with ``*`` and
    ``?`` (brackets are literal), or ``re:`` and a regular expression.

    A shell pattern must match the whole name of a matrix, or of a module that contains it
    (``layers.0.mlp``). A regular expression must match from the start of the name, but need not
    reach its end, as in llm-compressor.

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
        never: names of parameters that are never pruned. If a pattern matches only these, the error
            says so.

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
    """Whether the pattern matches, for each matrix. ``key`` is its key in params.yaml, for errors.

    Raises:
        SparselineError: the pattern matches no matrix, or is not a regular expression.
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
