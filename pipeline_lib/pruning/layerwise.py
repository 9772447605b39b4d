"""Prune and compensate the matrices of one block, each by itself, from the statistics of its inputs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline_lib.calibration.statistics import Moments
from pipeline_lib.errors import SparselineError
from pipeline_lib.models.architecture import Architecture, Matrix
from pipeline_lib.models.folding import site_factor
from pipeline_lib.pruning.matrix import chosen, prune_matrix, quantise_matrix
from pipeline_lib.pruning.scores import Curvature
from pipeline_lib.pruning.settings import LsqParams, SelectionParams
from pipeline_lib.quantization.grid import Grid, Scheme
from pipeline_lib.reconstruction import lsq
from pipeline_lib.reconstruction.obs import aim, column_losses, factorise, layer_error, rose_order
from pipeline_lib.transforms.transform import Transform

EVERY = 3  # ADMM's iterations between two changes of its penalty (ALPS)


@dataclass(frozen=True)
class Layerwise:
    """What is done to each matrix besides choosing its mask."""

    compensate: bool  # the OBS sweep
    towards_dense: float = 0.0  # what it aims at: outputs for its own stream, or (1) those that the dense stream gives
    reorder: float | None = None  # ROSE's least relative range; None: columns are swept from left to right
    lsq: LsqParams | None = None  # the best weights on the mask
    scheme: Scheme | None = None  # of the grid that what is left is put on; None: not on one


@dataclass
class PrunedBlock:
    """One block whose matrices are pruned."""

    tensors: dict[str, torch.Tensor]  # every parameter
    masks: dict[str, torch.Tensor]  # parameter -> bool, True = kept, in the checkpoint's orientation
    facts: dict[str, Any]  # per matrix: kept, size, layer error, damping; per step that fitted the block: its errors
    curvatures: dict[Matrix, Curvature] = field(default_factory=dict)  # what scores need, for masks chosen anew
    emphases: dict[Matrix, torch.Tensor | int] = field(default_factory=dict)  # u² of the selection weights, or 1
    grids: dict[Matrix, Grid] = field(default_factory=dict)  # of the matrices that are quantised


def prune_matrices(
    architecture: Architecture,
    tensors: Mapping[str, torch.Tensor],
    moments: Mapping[str, Moments],
    kept: Mapping[Matrix, int],
    transform: Transform,
    selection: SelectionParams,
    layerwise: Layerwise,
    where: str,
) -> PrunedBlock:
    """Prune all matrices of one (folded) block.

    Args:
        tensors: the folded block in float32.
        moments: of the pruned stream through the folded block, collected before any of its matrices is pruned.
        kept: how many weights each included matrix keeps.
    """
    result = PrunedBlock(dict(tensors), {}, {"matrices": {}})
    for site in architecture.sites:
        prune_site(result, architecture, site.name, moments[site.name], kept, transform, selection, layerwise, where)
    return result


def prune_site(
    block: PrunedBlock,
    architecture: Architecture,
    site: str,
    moments: Moments,
    kept: Mapping[Matrix, int],
    transform: Transform,
    selection: SelectionParams,
    layerwise: Layerwise,
    where: str,
) -> None:
    """Choose the masks of the matrices that share a site, compensate as asked, and put both into ``block``. They share one factorisation.

    Args:
        moments: of the site's inputs in the pruned stream, folded; with ``cross`` where the compensation aims towards the dense stream.

    Raises:
        ValueError: ``cross`` is wanted, and not there.
    """
    weights = {m: m.view(block.tensors[m.parameter]) for m in architecture.consumers(site) if m in kept}
    if not weights:
        return
    centred, shift, factor = _centred(architecture, site, moments, transform)
    gram = centred.gram
    importance = transform.importance.get(site)
    emphasis = 1 if importance is None else importance.square()

    def ordering(curvature: Curvature) -> torch.Tensor | None:
        how: Any = {"score": selection.score, "pattern": selection.shape, "group": selection.group, "block": selection.block}
        losses = [column_losses(w, curvature, kept=kept[m], importance=importance, **how) for m, w in weights.items()]
        return rose_order(torch.stack(losses).sum(0), selection.block, selection.shape.m, layerwise.reorder or 0.0)

    order = None if layerwise.reorder is None else ordering
    factorisation = factorise(gram, selection.damping, selection.damping_of, f"{where} {site}", factor, order)
    refit = layerwise.lsq
    hessian = factorisation.hessian(gram) if refit else gram  # what the sweep minimises, too
    spectrum = lsq.spectrum(hessian) if refit and refit.mask_iterations else None
    for matrix, weight in weights.items():
        target = weight
        if layerwise.towards_dense:
            if centred.cross is None:
                raise ValueError("what aims towards the dense stream wants the cross moment with its inputs")
            target = aim(weight, gram, centred.cross, factorisation, layerwise.towards_dense)
        grid = None if layerwise.scheme is None else Grid(target.shape, layerwise.scheme, target.device)
        joint = None if refit else grid
        new, mask = prune_matrix(target, factorisation, kept[matrix], selection, layerwise.compensate, importance, joint)
        if int(mask.sum()) != kept[matrix]:
            raise SparselineError(f"The scores of {where}.{matrix.label} hold NaN or infinity; check the model, or compute in float32.")
        told: dict[str, Any] = {"layer_error": layer_error(target, new, gram)}
        if refit:
            choose = functools.partial(_choose, emphasis=emphasis, kept=kept[matrix], selection=selection)
            alive = target.masked_fill(factorisation.dead, 0)
            new, mask, took = _refit(alive, new, mask, hessian, spectrum, choose, refit)
            told |= {"layer_error": layer_error(target, new, gram), "selected_error": told["layer_error"], **took}
            if grid is not None:
                new = quantise_matrix(new, mask, factorisation, grid, selection.block, layerwise.compensate)
                told |= {"layer_error": layer_error(target, new, gram), "unquantised_error": told["layer_error"]}
        if matrix.parameter not in block.masks:
            block.masks[matrix.parameter] = torch.ones_like(block.tensors[matrix.parameter], dtype=torch.bool)
            block.tensors[matrix.parameter] = block.tensors[matrix.parameter].clone()
        matrix.view(block.masks[matrix.parameter]).copy_(mask)
        _put(block, matrix, weight, new, shift)
        block.curvatures[matrix], block.emphases[matrix] = factorisation.whole(), emphasis
        if grid is not None:
            block.grids[matrix] = grid
            told["rounding_error"] = grid.error
        block.facts["matrices"][matrix.label] = {
            "kind": matrix.kind,
            "size": weight.numel(),
            "kept": kept[matrix],
            **told,
            "damping": factorisation.damping,
        }


def quantise_site(
    block: PrunedBlock,
    architecture: Architecture,
    site: str,
    moments: Moments,
    transform: Transform,
    selection: SelectionParams,
    scheme: Scheme,
    compensate: bool,
    where: str,
) -> None:
    """Quantise the pruned matrices that share a site, on their masks, and put them into ``block``.

    Args:
        moments: of the site's inputs in the stream that passes through what is quantised already; with ``cross``, the block before it
            was quantised stands for the dense one, and the compensation aims at its outputs.
        compensate: by the OBS sweep; else to nearest.
    """
    matrices = [matrix for matrix in architecture.consumers(site) if matrix in block.curvatures]
    if not matrices:
        return
    centred, shift, factor = _centred(architecture, site, moments, transform)
    gram = centred.gram
    factorisation = factorise(gram, selection.damping, selection.damping_of, f"{where} {site}", factor)
    for matrix in matrices:
        weight, mask = matrix.view(block.tensors[matrix.parameter]).clone(), matrix.view(block.masks[matrix.parameter])
        target = weight if centred.cross is None else aim(weight, gram, centred.cross, factorisation, 1.0)
        grid = block.grids[matrix] = Grid(weight.shape, scheme, weight.device)
        block.tensors[matrix.parameter] = block.tensors[matrix.parameter].clone()
        new = quantise_matrix(target, mask, factorisation, grid, selection.block, compensate)
        _put(block, matrix, weight, new, shift)
        block.facts["matrices"][matrix.label] |= {"rounding_error": grid.error, "quantised_error": layer_error(target, new, gram)}


def _centred(
    architecture: Architecture, site: str, moments: Moments, transform: Transform
) -> tuple[Moments, torch.Tensor | None, torch.Tensor | None]:
    """A site's moments without what the biases take over, that shift in folded coordinates, and the factor that is folded in; each [C] or None."""
    shift = transform.shifts.get(site)
    factor = site_factor(architecture, site, transform.factors)
    if shift is not None and factor is not None:
        shift = shift * factor.to(shift.device)
    return moments if shift is None else moments.shifted(shift), shift, factor


def _put(block: PrunedBlock, matrix: Matrix, weight: torch.Tensor, new: torch.Tensor, shift: torch.Tensor | None) -> None:
    """``new`` in the place of ``weight`` [R, C]; the bias makes up for the shift that the inputs are taken without."""
    matrix.view(block.tensors[matrix.parameter]).copy_(new)
    if shift is not None and matrix.bias is not None:
        block.tensors[matrix.bias] = block.tensors[matrix.bias].clone()
        matrix.bias_view(block.tensors[matrix.bias]).add_((weight - new) @ shift.to(weight.device))


def _choose(scores: torch.Tensor, emphasis: torch.Tensor | int, kept: int, selection: SelectionParams) -> torch.Tensor:
    return chosen(scores * emphasis, kept, selection)


def _refit(
    target: torch.Tensor,
    new: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    spectrum: lsq.Spectrum | None,
    choose: Callable[[torch.Tensor], torch.Tensor],
    params: LsqParams,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The best weights on the mask (or on a better one, where a spectrum is given), the mask, and what it took."""
    how: Any = {"iterations": params.iterations, "tolerance": params.tolerance}
    solved, steps = lsq.solve(target, mask, hessian, new, **how)
    if spectrum is None:
        return solved, mask, {"lsq_iterations": steps}
    how |= {"solve_iterations": params.iterations, "iterations": params.mask_iterations, "rho": params.mask_penalty, "every": EVERY}
    solved, mask, facts = lsq.admm(target, mask, hessian, solved, spectrum, choose, **how)
    return solved, mask, {"lsq_iterations": steps, "mask_swapped": facts["swapped"]}
