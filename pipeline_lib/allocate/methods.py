"""The methods of allocation behind one interface: from measurements to kept counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline_lib.allocate.budget import Unit, allocate, ranks
from pipeline_lib.allocate.predicted import Curve, minimise
from pipeline_lib.allocate.settings import AllocationParams
from pipeline_lib.core.errors import SparselineError

# matrix name -> its entry of sensitivity.json, or of a variant's curves
Measured = Mapping[str, Mapping[str, Any]]
KEYS = {
    "weight": "sensitivity",
    "layer": "sensitivity",
    "predicted": "curve",
    "owl": "outliers",
    "dlp": "median",
}  # the key of an entry that a method reads


def counts(units: Sequence[Unit], sparsity: float, params: AllocationParams, measured: Measured) -> list[int]:
    """Kept weights per matrix.

    ``uniform``: the same density everywhere. ``weight``, ``layer``: Algorithm 1 of 2310.09499, by
    the rank of a matrix's or block's sensitivity. ``owl``, ``dlp``, ``depth``: a density per block
    with half-width α as in Algorithm 1 (``_places``). ``predicted``: minimal sum of tempered
    predicted losses, with every density within α of the overall one (``minimise``).

    Raises:
        SparselineError: a measurement is missing, NaN or infinite, or no allocation meets the
            budget.
    """
    if key := KEYS.get(params.method):
        missing = [unit.name for unit in units if measured.get(unit.name, {}).get(key) is None]
        if missing:
            what = {"sensitivity": "sensitivities", "curve": "error curves"}.get(key, f"{key} per block")
            raise SparselineError(
                f"allocation.method = {params.method!r} needs {what}, but there is none for {missing[0]}; run"
                " `dvc repro`."
            )
        if key != "curve":
            for unit in units:
                _check_finite(unit.name, key, measured[unit.name][key])
    if params.method == "predicted":
        low, high = params.density_bounds
        within = max(low, 1 - sparsity - params.alpha), min(high, 1 - sparsity + params.alpha)
        return minimise(
            units, sparsity, [predicted(unit.name, measured[unit.name], params) for unit in units], within
        )
    return allocate(units, sparsity, _places(units, params, measured), params.alpha, params.density_bounds)


def predicted(name: str, entry: Mapping[str, Any], params: AllocationParams) -> Curve:
    """One matrix's predicted increase of the loss [nats/token] at its measured densities, to second
    order and to the power τ = ``temper``.

    ``trace``: ½·(Tr H/n)·‖ΔW‖², the Hessian as a multiple of the identity. ``kronecker``:
    ½·tr(E[ggᵀ] ΔW G ΔWᵀ), the Fisher matrix as E[ggᵀ] ⊗ G. τ = 1 uses the predictions unchanged; as
    τ approaches 0, only the relative fall of each curve counts, Σ log f.

    Raises:
        SparselineError: ``kronecker`` without output moments, or an error that is NaN or infinite.
    """
    curve = entry["curve"]
    if params.weighting == "kronecker" and curve["kronecker"] is None:
        raise SparselineError(
            f"allocation.weighting = 'kronecker' needs output moments, but there are none for {name}; set"
            " sensitivity.output_moments, or weighting: trace."
        )
    with np.errstate(invalid="ignore", over="ignore"):  # the result is refused below
        errors = (
            np.array(curve["kronecker"])
            if params.weighting == "kronecker"
            else entry["sensitivity"] * np.array(curve["frobenius"])
        )
    _check_finite(name, "error curve", errors)
    return Curve(np.array(curve["density"]), errors / 2, params.temper)


def _check_finite(name: str, what: str, values: Any) -> None:
    """Refuse values that cannot be ranked or weighed.

    Raises:
        SparselineError: a value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise SparselineError(
            f"The {what} of {name} contains NaN or infinity; check the model, or compute in float32."
        )


def _places(units: Sequence[Unit], params: AllocationParams, measured: Measured) -> np.ndarray:
    """Each matrix's place in [−1, 1]; 1 is densest.

    OWL (2310.05175): linear in the block's outlier ratio, over a width of 2λ (our α is λ). DLP
    (2505.23807): the median S of the block's |w|·‖X‖ measures how *un*important it is, and the
    density is linear in the importance 1 − S/ΣS over a width of 2α: it falls linearly with S.
    ``depth``: ATP (2502.14770), sparsities in arithmetic progression from the first block up to the
    last; its difference β is 2α/(blocks − 1).
    """
    if params.method == "uniform":
        return np.zeros(len(units))
    if params.method == "weight":
        return ranks([measured[unit.name]["sensitivity"] for unit in units])
    blocks = sorted({unit.block for unit in units})

    def by_block(combine: Callable[[list[float]], Any], key: str) -> list[float]:
        return [
            float(combine([measured[unit.name][key] for unit in units if unit.block == block]))
            for block in blocks
        ]

    if params.method == "layer":
        t = ranks(by_block(sum if params.layer_sensitivity == "sum" else np.mean, "sensitivity"))
    elif params.method == "owl":
        t = _spread(by_block(np.mean, "outliers"))
    elif params.method == "dlp":
        t = -_spread(by_block(np.mean, "median"))
    elif params.method == "depth":
        t = -_spread(blocks)
    else:
        raise ValueError(f"no places for {params.method}")
    place = dict(zip(blocks, t, strict=True))
    return np.array([place[unit.block] for unit in units])


def _spread(values: Sequence[float]) -> np.ndarray:
    """Map values linearly to [−1, 1], the least to −1; equal values become 0."""
    found = np.asarray(values, dtype=float)
    width = found.max() - found.min()
    return 2 * (found - found.min()) / width - 1 if width > 0 else np.zeros(len(found))
