"""Parameters of the choice of masks, and patterns."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Conflict, Params

Score = Literal["magnitude", "wanda", "obd", "obs", "isc"]
DampingOf = Literal["mean", "diagonal"]
Group = Literal["row", "matrix", "block"]
Share = Annotated[float, Field(ge=0, lt=1)]
OVERALL = "overall"  # key of a mapping of sparsities


@dataclass(frozen=True)
class Pattern:
    """``unstructured``, or N:M: N kept of every M consecutive inputs of an output. ``m`` is 0 for
    unstructured.
    """

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Raises ValueError for anything but ``unstructured`` and ``N:M`` with 0 < N < M."""
        if text == "unstructured":
            return cls(0, 0)
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(
                f'a pattern is unstructured or "N:M" (N kept of M, quoted) with 0 < N < M, not {text!r}'
            )
        return cls(int(match[1]), int(match[2]))

    def quantum(self, name: str, shape: tuple[int, int]) -> int:
        """The smallest step of a matrix's number of kept weights.

        Raises:
            SparselineError: M does not divide the matrix's inputs.
        """
        if self.m == 0:
            return 1
        if shape[1] % self.m:
            raise SparselineError(
                f"Pattern {self.n}:{self.m} does not divide the {shape[1]} inputs of {name}; choose another"
                " M, or exclude it (model.exclude)."
            )
        return shape[0] * shape[1] // self.m


def _valid_pattern(text: str) -> str:
    Pattern.parse(text)
    return text


def _in_order(value: Any) -> Any:
    """A mapping of patterns to sparsities as a list: the order of a JSON object's keys is lost in
    files with sorted keys.
    """
    if not isinstance(value, Mapping):
        return value
    if OVERALL not in value:
        raise ValueError(
            f"a mapping of patterns to sparsities needs the key {OVERALL}, the sparsity of all matrices"
            " together"
        )
    for name, share in value.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(
                f"the sparsity of {name!r} must be a number from 0 to less than 1, not {share!r}"
            )
    return list(value.items())


class SelectionParams(Params):
    """Section ``prune.selection``, overridden by ``variants.<name>.selection``."""

    # a mapping becomes pairs, because its order counts
    sparsity: Annotated[Share | list[tuple[str, Share]], BeforeValidator(_in_order)]
    pattern: Annotated[str, AfterValidator(_valid_pattern)]
    score: Score
    group: Group
    block: int = Field(ge=1)
    damping: float = Field(gt=0, le=1)
    damping_of: DampingOf

    @property
    def overall(self) -> float:
        """Sparsity of all matrices together."""
        return dict(self.sparsity)[OVERALL] if isinstance(self.sparsity, list) else self.sparsity

    @property
    def by_hand(self) -> list[tuple[str, float]]:
        """Pattern of names and sparsity; the first pattern that matches a matrix counts."""
        return (
            [pair for pair in self.sparsity if pair[0] != OVERALL] if isinstance(self.sparsity, list) else []
        )

    @property
    def shape(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @model_validator(mode="after")
    def _agree(self) -> Any:
        pattern = Pattern.parse(self.pattern)
        if pattern.m and abs(self.overall - (1 - pattern.n / pattern.m)) > 1e-9:
            wanted = 1 - pattern.n / pattern.m
            reason = (
                f"pattern {self.pattern} keeps {pattern.n} of {pattern.m}, so sparsity must be {wanted:g},"
                f" not {self.overall:g}"
            )
            raise Conflict(reason, "pattern", "sparsity")
        return self
