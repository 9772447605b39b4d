"""Manual sparsities of single matrices. The other matrices share the rest of the budget."""

from collections.abc import Mapping, Sequence

from pipeline_lib.allocate.budget import Unit
from pipeline_lib.core.counts import target
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.names import Names, hits


def by_hand(
    units: Sequence[Unit], names: Sequence[Names], patterns: Sequence[tuple[str, float]], key: str
) -> dict[str, int]:
    """Matrix -> weights kept, for matrices that match a pattern: round((1 − p)·n), with the sparsity p
    of the first matching pattern.

    Args:
        names: every name of each unit.
        key: key of the patterns in params.yaml, for errors.

    Raises:
        SparselineError: a pattern matches no matrix, or only matrices of an earlier pattern; or an
            N:M pattern does not allow the sparsity.
    """
    kept: dict[str, int] = {}
    for pattern, sparsity in patterns:
        found = [unit for unit, hit in zip(units, hits(key, pattern, names), strict=True) if hit]
        taken = [unit for unit in found if unit.name not in kept]
        if not taken:
            raise SparselineError(
                f"params.yaml: {key}: patterns before {pattern!r} take all that it matches,"
                f" {found[0].name} for example; put it before them."
            )
        for unit in taken:
            count = target(sparsity, unit.size)
            if count % unit.quantum:
                raise SparselineError(
                    f"params.yaml: {key}: {pattern!r} gives {unit.name} a sparsity of {sparsity:g}, but its"
                    f" N:M pattern needs a multiple of {unit.quantum / unit.size:g}."
                )
            kept[unit.name] = count
    return kept


def left(
    units: Sequence[Unit], kept: Mapping[str, int], sparsity: float, key: str
) -> tuple[list[Unit], float]:
    """The units without a count in ``kept``, and their sparsity such that all units together have
    ``sparsity``.

    Raises:
        SparselineError: no unit is left, or the others cannot balance the manual sparsities.
    """
    rest = [unit for unit in units if unit.name not in kept]
    if not kept:
        return rest, sparsity
    total, size = sum(unit.size for unit in units), sum(unit.size for unit in rest)
    given = (
        f"the patterns give {len(kept)} of {len(units)} matrices a sparsity,"
        f" {1 - sum(kept.values()) / (total - size):.4g} together"
    )
    wanted = target(sparsity, total) - sum(kept.values())
    if not rest or not 0 <= wanted <= size:
        why = "the other matrices cannot balance this" if rest else "there is no other matrix"
        raise SparselineError(
            f"params.yaml: {key}: overall = {sparsity:g} is not met: {given}, and {why}; change overall or a"
            " pattern."
        )
    return rest, 1 - wanted / size
