"""Error curves: the error of each matrix of a block at several densities, on the dense activations;
and the statistics of OWL and DLP.

Shape letters: ``R`` outputs, ``C`` inputs of a matrix. G = E[X Xᵀ], shape [C, C]; M = E[g gᵀ] of
the loss's gradients at the outputs, [R, R] or its diagonal [R].
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from pipeline_lib.core import ranks
from pipeline_lib.core.counts import target
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.measure.settings import CurvesParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.solve.factor import ROWS, factorise, quadratic
from pipeline_lib.solve.matrix import prune_matrix
from pipeline_lib.stats.dense import DenseBlock


def counts(size: int, quantum: int, densities: Collection[float]) -> list[int]:
    """Numbers of kept weights to measure between none and all: every multiple of an N:M pattern's
    quantum, or the nearest to the densities.
    """
    if quantum > 1:
        return list(range(quantum, size, quantum))
    return sorted({target(1 - density, size) for density in densities} - {0, size})


def errors(difference: torch.Tensor, gram: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """‖ΔW‖²_F, the layer error tr(ΔW G ΔWᵀ) (= E‖ΔW X‖²), and with M the Kronecker error tr(M ΔW G
    ΔWᵀ), for ΔW [R, C], in parts of a few rows.

    Returns:
        [3], or [2] without M; float64, on the device.
    """
    found = torch.zeros(2 if moment is None else 3, dtype=torch.float64, device=gram.device)
    for first in range(0, len(difference), ROWS):
        part = slice(first, first + ROWS)
        own = difference[part]
        product = own @ gram if moment is not None and moment.ndim == 2 else None
        # the diagonal of ΔW G ΔWᵀ
        each = quadratic(own, gram) if product is None else torch.linalg.vecdot(product, own)
        found[0] += own.square().sum(dtype=torch.float64)
        found[1] += each.sum(dtype=torch.float64)
        if product is not None and moment is not None:
            found[2] += torch.linalg.vecdot(moment[part] @ difference, product).sum(dtype=torch.float64)
        elif moment is not None:
            found[2] += moment[part].double() @ each
    return found


def measure(
    block: DenseBlock,
    included: Collection[Matrix],
    moments: Mapping[str, torch.Tensor],
    selection: SelectionParams,
    compensate: bool,
    params: CurvesParams,
) -> dict[str, dict[str, Any]]:
    """Per label of an included matrix: ``curve``, ``damping``, and its block's ``outliers`` and
    ``median``.

    Masks, compensation and errors use the Gram matrix of the training split. One factorisation
    serves all matrices of a site at all densities. At density 0 ΔW = −W, and at 1 it is 0; both are
    exact.

    Args:
        moments: M per label; may be empty.
        compensate: by the OBS sweep, as the variant does.

    Raises:
        SparselineError: an error is NaN or infinite.
    """
    tensors, statistics, where = block.tensors, block.statistics, block.where
    owners = ranks.deal(
        {matrix: math.prod(_shape(matrix, tensors)) * _shape(matrix, tensors)[1] for matrix in included}
    )
    found: dict[str, dict[str, Any]] = {}
    # label -> size and numbers of kept weights; errors [n, 2 or 3] at density 0 and at these numbers
    waiting: dict[str, tuple[list[int], torch.Tensor]] = {}
    scales: dict[str, torch.Tensor] = {}
    for site in block.layout.sites:
        consumers = [matrix for matrix in block.layout.consumers(site.name) if matrix in included]
        if not consumers:
            continue
        gram, share = statistics[site.name].second_moment_matrix, statistics[site.name].share
        scales[site.name] = statistics[site.name].second_moment.sqrt()
        own = [matrix for matrix in consumers if owners[matrix] == ranks.rank()]
        if not own:
            continue
        factorisation = factorise(gram, selection.damping, selection.damping_of, f"{where} {site.name}")
        for matrix in own:
            weight = matrix.view(tensors[matrix.parameter]).float()
            moment = moments.get(matrix.label)
            moment = None if moment is None else moment.to(gram.device)
            quantum = selection.shape.quantum(f"{where}.{matrix.label}", (weight.shape[0], weight.shape[1]))
            inner = counts(weight.numel(), quantum, params.densities)
            taken = [errors(weight, gram, moment)]  # density 0
            for kept in inner:
                new, *_ = prune_matrix(weight, factorisation, kept, Rule.of(selection), compensate)
                taken.append(errors(new.sub_(weight), gram, moment))
            points = torch.stack(taken)
            if share is not None:  # an expert's error, averaged over all tokens
                points[:, 1] *= share
            waiting[matrix.label] = [weight.numel(), *inner], points
            found[matrix.label] = {"damping": factorisation.damping}
        del factorisation
    if found:
        _read(waiting, found, where)
    found = {label: facts for part in ranks.gathered(found) for label, facts in part.items()}
    if found:
        views = [(matrix.view(tensors[matrix.parameter]), scales[matrix.site]) for matrix in included]
        metric = torch.empty(sum(view.numel() for view, _ in views), device=views[0][1].device)
        for part, (view, scale) in zip(metric.split([view.numel() for view, _ in views]), views, strict=True):
            torch.mul(view.float().abs(), scale, out=part.view(view.shape))
        outliers, middle = _outliers_and_median(metric, params.outlier_factor)
        found = {label: facts | {"outliers": outliers, "median": middle} for label, facts in found.items()}
    return found


def _shape(matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Size:
    return matrix.view(tensors[matrix.parameter]).shape


def _read(
    waiting: Mapping[str, tuple[list[int], torch.Tensor]], found: dict[str, dict[str, Any]], where: str
) -> None:
    """Read all errors of a block from the device in one transfer, and store them in ``found`` as
    curves from density 0 to 1.

    Raises:
        SparselineError: an error is NaN or infinite.
    """
    read = iter(torch.cat([points.flatten() for _, points in waiting.values()]).tolist())
    for label, ((size, *inner), points) in waiting.items():
        taken = [[next(read) for _ in range(points.shape[1])] for _ in range(len(points))]
        if not all(math.isfinite(value) for point in taken for value in point):
            raise SparselineError(
                f"The error curve of {where}.{label} contains NaN or infinity; check the model, or compute in"
                " float32."
            )
        taken.append([0.0] * points.shape[1])
        frobenius, layer, *kronecker = map(list, zip(*taken, strict=True))
        curve = {
            "density": [0.0, *(kept / size for kept in inner), 1.0],
            "frobenius": frobenius,
            "layer": layer,
        }
        found[label] = {"curve": curve | {"kronecker": kronecker[0] if kronecker else None}, **found[label]}


def _outliers_and_median(metric: torch.Tensor, factor: float) -> tuple[float, float]:
    """The share of values [n] that are larger than ``factor`` times their mean, and their lower
    median. Overwrites the values.
    """
    middle = (len(metric) - 1) // 2
    if metric.device.type != "cpu":
        large = (metric.double() > factor * metric.mean(dtype=torch.float64)).count_nonzero() / len(metric)
        outliers, median = torch.stack([large, metric.kthvalue(middle + 1).values.double()]).tolist()
        return outliers, median
    values = metric.numpy()
    outliers = float(np.count_nonzero(values > factor * values.mean(dtype=np.float64)) / values.size)
    values.partition(middle)  # in place, because a wide block allows only one copy
    return outliers, float(values[middle])
