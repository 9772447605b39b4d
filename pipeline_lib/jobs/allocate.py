"""Allocate the budget of a variant."""

from pipeline_lib.allocate.budget import Unit
from pipeline_lib.allocate.by_hand import by_hand, left
from pipeline_lib.allocate.methods import Measured, counts
from pipeline_lib.allocate.settings import CURVES, SENSITIVITIES
from pipeline_lib.core.counts import check, target
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.masks.settings import Pattern
from pipeline_lib.recipe.variants import AllocatePart


def allocate(workspace: Workspace, variant: str, part: AllocatePart) -> str:
    """Write matrix -> number of kept weights, checked against the budget. Returns a summary.

    Raises:
        SparselineError: an N:M pattern does not divide a matrix, a manual sparsity is impossible,
            or no allocation meets the budget.
    """
    listed = workspace.included()
    pattern = Pattern.parse(part.pattern)
    units = [
        Unit(
            m["name"],
            m["block"],
            m["shape"][0] * m["shape"][1],
            pattern.quantum(m["name"], tuple(m["shape"])),
        )
        for m in listed
    ]
    total = sum(unit.size for unit in units)
    measured: Measured = {}
    if part.allocation.method in CURVES:
        measured = workspace.load(workspace.curves(variant))
    elif part.allocation.method in SENSITIVITIES:
        measured = workspace.load(workspace.sensitivity / "sensitivity.json")
    key = f"selection.sparsity of {variant}"
    given = by_hand(units, [m["names"] for m in listed], part.by_hand, key)
    rest, sparsity = left(units, given, part.sparsity, key)
    found = given | dict(
        zip([unit.name for unit in rest], counts(rest, sparsity, part.allocation, measured), strict=True)
    )
    kept = [found[unit.name] for unit in units]
    check(sum(kept), target(part.sparsity, total), max(unit.quantum for unit in units))
    densities = [count / unit.size for count, unit in zip(kept, units, strict=True)]
    workspace.save(
        workspace.allocation(variant),
        {
            "kept": {unit.name: count for unit, count in zip(units, kept, strict=True)},
            "sparsity": 1 - sum(kept) / total,
            "least_density": min(densities),
            "greatest_density": max(densities),
        },
    )
    spread = (
        f", densities {min(densities):.1%} to {max(densities):.1%}" if max(densities) > min(densities) else ""
    )
    hand = f", manual for {len(given)} of {len(units)} matrices" if given else ""
    return f"{sum(kept):,} of {total:,} weights kept ({part.allocation.method}{hand}){spread}"
