"""Prune and compensate the matrices of one block, each by itself, from the statistics of its inputs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline_lib.calibration.statistics import Moments
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.architecture import Architecture, Matrix
from pipeline_lib.models.folding import site_factor
from pipeline_lib.pruning.matrix import chosen, prune_matrix, quantise_matrix
from pipeline_lib.pruning.patterns import BitMasks
from pipeline_lib.pruning.scores import Curvature
from pipeline_lib.pruning.settings import LsqParams, SelectionParams
from pipeline_lib.quantization.grid import Grid, Scheme
from pipeline_lib.reconstruction import lsq
from pipeline_lib.reconstruction.obs import Factorisation, aim, column_losses, factorise, layer_error, rose_order, squared_error
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
    dtype: torch.dtype | None = None  # of the matrices that are put in the places of the old ones; None: theirs


@dataclass
class PrunedBlock:
    """One block whose matrices are pruned."""

    tensors: dict[str, torch.Tensor]  # every parameter
    masks: BitMasks = field(default_factory=BitMasks)  # parameter -> bool, True = kept, in the checkpoint's orientation
    # Per matrix: kept, size, layer error, damping; per step that fitted the block: its errors.
    facts: dict[str, Any] = field(default_factory=lambda: {"matrices": {}})
    curvatures: dict[Matrix, Curvature] = field(default_factory=dict)  # what scores need, for masks chosen anew
    emphases: dict[Matrix, torch.Tensor | int] = field(default_factory=dict)  # u² of the selection weights, or 1
    grids: dict[Matrix, Grid] = field(default_factory=dict)  # of the matrices that are quantised


def prune_matrices(
    architecture: Architecture,
    tensors: Mapping[str, torch.Tensor],
    moments: dict[str, Moments],
    kept: Mapping[Matrix, int],
    transform: Transform,
    selection: SelectionParams,
    layerwise: Layerwise,
    where: str,
) -> PrunedBlock:
    """Prune all matrices of one (folded) block.

    Args:
        tensors: the folded block; what is pruned comes in its dtype.
        moments: of the pruned stream through the folded block, collected before any of its matrices is pruned; used up (``prune_site``).
        kept: how many weights each included matrix keeps.
    """
    result = PrunedBlock(dict(tensors))
    for site in architecture.sites:
        prune_site(result, architecture, site.name, moments, kept, transform, selection, layerwise, where)
    return result


def prune_site(
    block: PrunedBlock,
    architecture: Architecture,
    site: str,
    moments: dict[str, Moments],
    kept: Mapping[Matrix, int],
    transform: Transform,
    selection: SelectionParams,
    layerwise: Layerwise,
    where: str,
) -> None:
    """Choose the masks of the matrices that share a site, compensate as asked, and put both into ``block``. They share one factorisation.

    Memory: besides the block, two matrices [C, C] and one [R, C] for the sweep alone; a third [C, C] while it is aimed or a mask is improved.

    Args:
        moments: holds those of the site's inputs in the pruned stream, folded; with ``cross`` where the compensation aims towards the dense
            stream. They are taken out and used up: in a wide block each weighs more than the largest matrix.

    Raises:
        ValueError: ``cross`` is wanted, and not there.
    """
    found = moments.pop(site)
    weights = {m: m.view(block.tensors[m.parameter]) for m in architecture.consumers(site) if m in kept}
    if not weights:
        return
    centred, shift, factor = _centred(architecture, site, found, transform)
    del found
    importance = transform.importance.get(site)
    emphasis = 1 if importance is None else importance.square()

    def ordering(curvature: Curvature) -> torch.Tensor | None:
        how: Any = {"score": selection.score, "pattern": selection.shape, "group": selection.group, "block": selection.block}
        losses = [column_losses(w.float(), curvature, kept=kept[m], importance=importance, **how) for m, w in weights.items()]
        return rose_order(torch.stack(losses).sum(0), selection.block, selection.shape.m, layerwise.reorder or 0.0)

    order = None if layerwise.reorder is None else ordering
    factorisation = factorise(centred.gram, selection.damping, selection.damping_of, f"{where} {site}", factor, order)
    targets: dict[Matrix, torch.Tensor] = dict(weights)
    if layerwise.towards_dense:
        if centred.cross is None:
            raise ValueError("what aims towards the dense stream wants the cross moment with its inputs")
        away = centred.cross.sub_(centred.gram)
        targets = {m: aim(w.float(), away, factorisation, layerwise.towards_dense) for m, w in weights.items()}
        del away
    errors = _Errors(targets, centred.gram, factorisation)
    del centred
    if layerwise.compensate and not layerwise.lsq:
        errors.forget()
    for matrix in list(weights):
        weight, target = weights.pop(matrix), targets.pop(matrix)
        grid = None if layerwise.scheme is None else Grid(target.shape, layerwise.scheme, target.device)
        here = f"{where}.{matrix.label}"
        new, mask, told = _pruned(target, factorisation, kept[matrix], selection, layerwise, importance, grid, errors, matrix, here)
        if matrix.parameter not in block.masks:
            block.tensors[matrix.parameter] = block.tensors[matrix.parameter].to(layerwise.dtype, copy=True)
        whole = block.masks.get(matrix.parameter, torch.ones(block.tensors[matrix.parameter].shape, dtype=torch.bool))
        matrix.view(whole).copy_(mask)
        block.masks[matrix.parameter] = whole
        _put(block, matrix, weight, new, shift)
        block.curvatures[matrix], block.emphases[matrix] = factorisation.whole(), emphasis
        if grid is not None:
            block.grids[matrix] = grid
            told["rounding_error"] = grid.error
        size = {"kind": matrix.kind, "size": weight.numel(), "kept": kept[matrix]}
        block.facts["matrices"][matrix.label] = {**size, **told, "damping": factorisation.damping}
        del weight, target, new, mask, whole  # before the next


def _pruned(
    target: torch.Tensor,
    factorisation: Factorisation,
    kept: int,
    selection: SelectionParams,
    layerwise: Layerwise,
    importance: torch.Tensor | None,
    grid: Grid | None,
    errors: "_Errors",
    matrix: Matrix,
    where: str,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What ``target`` [R, C] becomes, its mask [R, C], and facts: the layer errors after the steps, and what these took."""
    refit = layerwise.lsq
    new, mask, swept = prune_matrix(target, factorisation, kept, selection, layerwise.compensate, importance, None if refit else grid)
    if int(mask.count_nonzero()) != kept:  # a sum would widen the mask to 64 bits first
        raise SparselineError(f"The scores of {where} hold NaN or infinity; check the model, or compute in float32.")
    told: dict[str, Any] = {"layer_error": errors.of(matrix, target, new, swept)}
    if refit:
        choose = functools.partial(_choose, importance=importance, kept=kept, selection=selection)
        alive = target.float().masked_fill(factorisation.dead, 0)
        new, mask, took = _refit(alive, new, mask, errors.hessian, choose, refit)
        told |= {"layer_error": errors.of(matrix, target, new), "selected_error": told["layer_error"], **took}
        if grid is not None:
            new = quantise_matrix(new, mask, factorisation, grid, selection.block, layerwise.compensate)
            told |= {"layer_error": errors.of(matrix, target, new), "unquantised_error": told["layer_error"]}
    return new, mask, told


class _Errors:
    """Layer errors E‖(W − Ŵ) X‖² / E‖W X‖² of the matrices that share a site. Takes G over, and puts the damping on it: what it holds is H."""

    def __init__(self, targets: Mapping[Matrix, torch.Tensor], gram: torch.Tensor, factorisation: Factorisation) -> None:
        self.scales = {matrix: max(squared_error(target, None, gram), 1e-30) for matrix, target in targets.items()}
        self.damping, self.dead = factorisation.diagonal - factorisation.second_moment, factorisation.dead
        gram.diagonal().copy_(factorisation.diagonal)
        self.hessian = gram

    def forget(self) -> None:
        """H goes: from here on errors must be given."""
        del self.hessian

    def of(self, matrix: Matrix, target: torch.Tensor, new: torch.Tensor, swept: float | None = None) -> float:
        """From tr((W − Ŵ) H (W − Ŵ)ᵀ), which the sweep tells (without always-zero inputs) or is taken here, less what the damping adds."""
        lost = squared_error(target, new, self.hessian) if swept is None else swept
        damping = self.damping if swept is None else self.damping.masked_fill(self.dead, 0)
        damped = sum(float((a - b).float().square().sum(0) @ damping) for a, b in zip(target.split(256), new.split(256), strict=True))
        return max(lost - damped, 0.0) / self.scales[matrix]


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
    away = None if centred.cross is None else centred.cross.sub_(gram)
    for matrix in matrices:
        weight = matrix.view(block.tensors[matrix.parameter]).clone()
        mask = matrix.view(block.masks[matrix.parameter]).to(weight.device)
        target = weight if away is None else aim(weight, away, factorisation, 1.0)
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


def _choose(scores: torch.Tensor, importance: torch.Tensor | None, kept: int, selection: SelectionParams) -> torch.Tensor:
    return chosen(scores if importance is None else scores * importance.square(), kept, selection)


def _refit(
    target: torch.Tensor,
    new: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
    params: LsqParams,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The best weights on the mask (or on a better one, where that is looked for), the mask, and what it took."""
    how: Any = {"iterations": params.iterations, "tolerance": params.tolerance}
    solved, steps = lsq.solve(target, mask, hessian, new, **how)
    if not params.mask_iterations:
        return solved, mask, {"lsq_iterations": steps}
    how |= {"solve_iterations": params.iterations, "iterations": params.mask_iterations, "rho": params.mask_penalty, "every": EVERY}
    solved, mask, facts = lsq.admm(target, mask, hessian, solved, choose, **how)
    return solved, mask, {"lsq_iterations": steps, "mask_swapped": facts["swapped"]}
