"""Error curves: what pruning each matrix of a block to a few densities changes, on the dense stream; and what OWL and DLP read of a block.

Shape letters: ``R`` outputs, ``C`` inputs of a matrix. G = E[X Xᵀ] [C, C], M = E[g gᵀ] of the loss's gradients at the outputs, [R, R] or its diagonal [R].
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from pipeline_lib.core.counts import target
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.measure.settings import CurvesParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.solve.factor import factorise
from pipeline_lib.solve.matrix import prune_matrix
from pipeline_lib.stats.dense import DenseBlock

ROWS = 1024  # taken at a time: bounds the memory, and is enough for a matrix product to run at full speed


def counts(size: int, quantum: int, densities: Collection[float]) -> list[int]:
    """Kept counts to measure between none and all: every multiple of an N:M pattern's quantum, or the densities' nearest."""
    if quantum > 1:
        return list(range(quantum, size, quantum))
    return sorted({target(1 - density, size) for density in densities} - {0, size})


def errors(difference: torch.Tensor, gram: torch.Tensor, moment: torch.Tensor | None) -> tuple[float, float, float | None]:
    """‖ΔW‖²_F, the layer error tr(ΔW G ΔWᵀ) (= E‖ΔW X‖²), and the Kronecker error tr(M ΔW G ΔWᵀ), for ΔW [R, C]. A few rows at a time."""
    frobenius = layer = kronecker = 0.0
    for first in range(0, len(difference), ROWS):
        part = slice(first, first + ROWS)
        own = difference[part]
        product = own @ gram
        each = torch.linalg.vecdot(product, own)  # the diagonal of ΔW G ΔWᵀ
        frobenius += float(own.square().sum(dtype=torch.float64))
        layer += float(each.sum(dtype=torch.float64))
        if moment is not None and moment.ndim == 1:
            kronecker += float(moment[part].double() @ each.double())
        elif moment is not None:
            kronecker += float(torch.linalg.vecdot(moment[part] @ difference, product).sum(dtype=torch.float64))
    return frobenius, layer, None if moment is None else kronecker


def measure(
    block: DenseBlock,
    included: Collection[Matrix],
    moments: Mapping[str, torch.Tensor],
    selection: SelectionParams,
    compensate: bool,
    params: CurvesParams,
) -> dict[str, dict[str, Any]]:
    """Per label of an included matrix: ``curve``, ``damping``, and its block's ``outliers`` and ``median``.

    Masks, compensation and errors come from the fitting rows' Gram matrix: the held-out rows judge what the allocation leads to.
    One factorisation serves all matrices of a site at all densities. At density 0 ΔW = −W, at 1 it is 0: both are exact.

    Args:
        moments: M per label; may be empty.
        compensate: by the OBS sweep, as the variant does.

    Raises:
        SparselineError: an error is NaN or infinite.
    """
    tensors, statistics, where = block.tensors, block.statistics, block.where
    found: dict[str, dict[str, Any]] = {}
    scales: dict[str, torch.Tensor] = {}
    for site in block.layout.sites:
        consumers = [matrix for matrix in block.layout.consumers(site.name) if matrix in included]
        if not consumers:
            continue
        gram, share = statistics[site.name].second_moment_matrix, statistics[site.name].share
        scales[site.name] = statistics[site.name].second_moment.sqrt()
        factorisation = factorise(gram, selection.damping, selection.damping_of, f"{where} {site.name}")
        for matrix in consumers:
            weight = matrix.view(tensors[matrix.parameter]).float()
            moment, size = moments.get(matrix.label), weight.numel()
            quantum = selection.shape.quantum(f"{where}.{matrix.label}", (weight.shape[0], weight.shape[1]))
            inner = counts(size, quantum, params.densities)
            taken = [errors(weight, gram, moment)]  # of keeping none
            for kept in inner:
                new, *_ = prune_matrix(weight, factorisation, kept, Rule.of(selection), compensate)
                taken.append(errors(new.sub_(weight), gram, moment))
            taken.append((0.0, 0.0, 0.0))
            if not all(math.isfinite(value) for point in taken for value in point if value is not None):
                raise SparselineError(
                    f"The error curve of {where}.{matrix.label} holds NaN or infinity; check the model, or compute in float32."
                )
            frobenius, layer, kronecker = zip(*taken, strict=True)
            if share is not None:  # of an expert: over all tokens
                layer = tuple(error * float(share) for error in layer)
            curve = {"density": [0.0, *(kept / size for kept in inner), 1.0], "frobenius": list(frobenius), "layer": list(layer)}
            found[matrix.label] = {
                "curve": curve | {"kronecker": None if moment is None else list(kronecker)},
                "damping": factorisation.damping,
            }
        del factorisation
    if found:
        metric = np.empty(sum(matrix.view(tensors[matrix.parameter]).numel() for matrix in included), np.float32)
        filled = 0
        for matrix in included:
            scaled = matrix.view(tensors[matrix.parameter]).float().abs() * scales[matrix.site]
            metric[filled : filled + scaled.numel()] = scaled.flatten().numpy()
            filled += scaled.numel()
        outliers = float(np.count_nonzero(metric > params.outlier_factor * metric.mean(dtype=np.float64)) / metric.size)
        middle = (metric.size - 1) // 2
        metric.partition(middle)  # in its place: of a wide block one copy is enough
        found = {label: facts | {"outliers": outliers, "median": float(metric[middle])} for label, facts in found.items()}
    return found
