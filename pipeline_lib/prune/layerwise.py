"""Prune and compensate the matrices of one block independently, from the statistics of their inputs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline_lib.core import settings
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.threads import side_by_side, small
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.folding import site_factor
from pipeline_lib.prune.collect import Reference, collect
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.prune.window import NO_SCORES, Block, Dealt, Window
from pipeline_lib.solve import lsq
from pipeline_lib.solve.factor import ROWS, Factorisation, energy, factorise, layer_error, lost
from pipeline_lib.solve.grid import Grid, Scheme
from pipeline_lib.solve.matrix import prune_matrix, quantise_matrix
from pipeline_lib.solve.order import column_losses, rose_order
from pipeline_lib.solve.settings import LsqParams
from pipeline_lib.solve.sweep import target_weight
from pipeline_lib.stats.moments import Moments


@dataclass(frozen=True)
class Layerwise:
    """Prune each matrix of a block by itself: choose its mask, with or without the OBS sweep; then
    solve least squares; then round to a grid.
    """

    selection: SelectionParams
    compensate: bool  # the OBS sweep
    by_site: bool = False  # collect statistics before each site; otherwise once per block
    # target of compensation: outputs for the pruned activations (0) or for the dense activations (1)
    dense_target: float = 0.0
    reorder: float | None = None  # ROSE's minimum relative range; None: sweep columns from left to right
    lsq: LsqParams | None = None  # least squares for the weights on the mask; None: skipped
    scheme: Scheme | None = None  # grid of the remaining weights; None: not quantised
    # dtype of the pruned matrices; None: unchanged
    dtype: torch.dtype | None = None

    def run(self, window: Window) -> None:
        """Prune the window's only block in place, with the moments of the streams before it."""
        ((index, block),) = window.blocks.items()
        model, streams = window.model, window.rows
        hidden, reference = streams.pruned.hidden, window.reference if self.dense_target else None
        found: dict[str, Moments] = {}
        before = None  # the block before pruning, kept if its statistics do not fit into memory at once
        with block.settling():
            dealt, left = block.deal(()), block.sites
            while left:
                if left[0] not in dealt.ahead:
                    dealt.share()
                    module = before or model.block(index, block.tensors)
                    sites = block.ahead(left[0], self.by_site, settings.gram_bytes())
                    dealt = block.deal(sites)
                    found = {}  # free before the next ones are collected
                    found = collect(model, (index, module), hidden, streams.seen, dealt.sites(), reference)
                    before = module if not self.by_site and len(sites) < len(block.sites) else None
                    del module
                ready = list(itertools.takewhile(dealt.ahead.__contains__, left))
                self._prune_sites(dealt, ready, found)
                left = left[len(ready) :]
            dealt.share()

    def prune_block(self, block: Block, moments: dict[str, Moments]) -> None:
        """Prune all matrices of a block with moments collected earlier, and overwrite these moments
        (see ``prune_site``).
        """
        with block.settling():
            dealt = block.deal(block.sites)
            self._prune_sites(dealt, block.sites, moments)
            dealt.share()

    def _prune_sites(self, dealt: Dealt, sites: Sequence[str], moments: dict[str, Moments]) -> None:
        """Prune several sites, in parallel threads if the block is small. Results keep the order of
        the sites.
        """
        block = dealt.block
        weights = sum(tensor.numel() for tensor in block.tensors.values())
        device = next(iter(block.tensors.values())).device
        own = {site: dealt.take(site) for site in sites}

        def pruned(site: str) -> tuple[Block, SparselineError | None]:
            part = block.apart()
            try:
                self.prune_site(part, site, moments, own[site])
            except SparselineError as error:
                return part, error
            return part, None

        with side_by_side(small(device, weights), len(sites)) as each_site:
            for part, error in each_site(pruned, sites):
                block.join(part)
                if error is not None:
                    raise error

    def prune_site(
        self,
        block: Block,
        site: str,
        moments: dict[str, Moments],
        own: Sequence[Matrix] | None = None,
    ) -> None:
        """Choose the masks of a site's matrices, compensate as requested, and store masks and
        weights in the block. The block's checks run when it settles.

        The matrices share one factorisation, which is the only thing that the code waits for.
        Memory besides the block: two matrices [C, C] and one [R, C] for the sweep alone; a third
        [C, C] for a target or for a better mask.

        Args:
            moments: those of the site's inputs in the pruned stream, in folded coordinates; with
                ``cross`` for a target in the dense stream. The function takes ownership of them and
                overwrites them, to save memory.
            own: the matrices to prune; None: all.

        Raises:
            ValueError: ``cross`` is needed but missing.
        """
        own = block.consumers(site) if own is None else own
        if not own:
            moments.pop(site, None)
            return
        matrices = block.consumers(site)
        weights = {m: m.view(block.tensors[m.parameter]) for m in matrices}
        routed = moments[site].tokens if block.layout.site(site).pool is not None else None
        centred, shift, factor = _centred(block, site, moments.pop(site))
        rule = Rule.of(self.selection, block.transform.importance.get(site))
        order = None if self.reorder is None else self._ordering(weights, block, rule)
        where = f"{block.where} {site}"
        factorisation = factorise(
            centred.gram, self.selection.damping, self.selection.damping_of, where, factor, order
        )
        targets: dict[Matrix, torch.Tensor] = {matrix: weights[matrix] for matrix in own}
        weights = dict(targets)
        # an expert may receive other tokens in the dense stream
        share = self.dense_target if block.layout.site(site).pool is None else 0.0
        if share:
            if centred.cross is None:
                raise ValueError("dense_target needs the cross moment with the dense activations")
            difference = centred.cross.sub_(centred.gram)
            targets = {
                m: target_weight(w.float(), difference, factorisation, share) for m, w in weights.items()
            }
            del difference
        errors = _Errors(targets, centred, factorisation)
        del centred
        if self.compensate and not self.lsq:
            errors.forget()
        for matrix in own:
            weight, target = weights.pop(matrix), targets.pop(matrix)
            grid = None if self.scheme is None else Grid(target.shape, self.scheme, target.device)
            task = _Task(matrix, target, factorisation, block.kept[matrix], rule, grid)
            self._prune(task, errors, block)
            block.take(matrix, task.mask, self.dtype)
            _put(block, matrix, weight, task.new, shift)
            block.curvatures[matrix], block.rules[matrix] = factorisation.whole(), rule
            if grid is not None:
                block.grids[matrix] = grid
                task.facts["rounding_error"] = grid.error
            size = {"kind": matrix.kind, "size": weight.numel(), "kept": block.kept[matrix]}
            if routed is not None:
                size |= {"tokens": routed, "site": site}
            block.facts["matrices"][matrix.label] = {**size, **task.facts, "damping": factorisation.damping}
            del weight, target, task  # free before the next matrix

    def memory(self, shapes: Shapes) -> float:
        """Bytes: the window's blocks (twice if the dense one is needed again), and the larger of
        two phases. While statistics are collected, memory holds the running block, the Gram
        matrices (with statistics per site, only the site's), the cross moments, the same for one
        lane, a batch, and inputs in the dense stream: those of a batch, or those that are kept.
        While a site is solved, it holds the remaining Gram matrices and inputs, and what
        ``_solving`` counts.
        """
        targeted, wide = self.dense_target > 0, self.dtype is not None
        item = shapes.checkpoint.dtype.itemsize
        dense = (targeted or wide) * shapes.dtype.itemsize
        running = (item + dense + shapes.copied) * shapes.block + shapes.activations(shapes.batch)
        batch = shapes.dtype.itemsize * shapes.batch * shapes.length
        inputs = self._inputs(shapes)
        collecting, solving, left = 0.0, 0.0, 0 if self.by_site else shapes.grams
        for place, (channels, matrices) in enumerate(shapes.consumers):
            own, ahead = 4 * channels * channels, sum(inputs[place + 1 :])
            grams = (own if self.by_site else shapes.grams) * (1 + targeted)
            # the first pass fills what the later ones empty
            aims = ahead + inputs[place] * (place > 0) if any(inputs) else targeted * batch * channels
            collecting = max(collecting, running + 2 * grams + aims)
            held = (own if self.by_site else left) - own
            solving = max(solving, held + ahead + self._solving(channels, matrices))
            left -= own
        kept = self._kept(shapes) * shapes.block
        return kept * (shapes.window - 1) + max(collecting, kept + dense * shapes.block + solving)

    def _inputs(self, shapes: Shapes) -> list[float]:
        """Bytes of each site's inputs in the dense stream that are kept; a fit's held-out samples
        have none.
        """
        seen = 1 - shapes.held_out * (self.dtype is not None)
        inputs = [seen * one for one in shapes.inputs]
        return [(self.dense_target > 0 and sum(inputs) <= shapes.room) * one for one in inputs]

    def _kept(self, shapes: Shapes) -> int:
        """Bytes per weight of a pruned block."""
        return (
            shapes.checkpoint.dtype.itemsize
            if self.dtype is None
            else max(shapes.checkpoint.dtype.itemsize, self.dtype.itemsize)
        )

    def _solving(self, channels: int, matrices: list[tuple[int, int]]) -> float:
        """Bytes to solve one site, its Gram matrix included: the factorisation (its inverse needs
        as much again), the targets, and the steps' copies of the largest matrix. Least squares
        takes ``lsq.ROWS`` rows at a time.

        Bytes per weight: 5 in the sweep (weight and mask), and 13 in least squares (swept weight,
        mask, target, solution). ADMM needs 22 while it searches for another mask (also its linear
        term, iterate and scores), and its inverse. After the search, 18 remain (also the new mask
        and the weights on it).
        """
        square, targeted = 4 * channels * channels, self.dense_target > 0
        largest = max(rows * columns for rows, columns in matrices)
        part = 4 * max(min(rows, lsq.ROWS) * columns for rows, columns in matrices)
        # the factor U, and the targets
        held = square + targeted * 4 * sum(rows * columns for rows, columns in matrices)
        targeting = square + held + 8 * largest  # also the difference of the moments
        if self.lsq is None:
            return max(
                3 * square,
                targeted * (square + targeting),
                held + 5 * largest + 8 * largest * (self.selection.group != "block"),
            )
        steps = 13 * largest + 6 * part
        if self.lsq.mask_iterations:
            # small matrices are inverted by eigenvectors, in float64
            inverse = 7 * square if channels <= lsq.SPECTRAL else square
            steps = max(18 * largest + 6 * part, 22 * largest + 3 * part + inverse)
        return square + max(2 * square, targeted * targeting, held + steps)

    def flops(self, shapes: Shapes) -> float:
        """FLOPs of the passes that collect statistics, the statistics, the factorisations, and the
        products of each matrix. With statistics per site, a pass stops at its site. If the inputs
        in the dense stream are kept, they need no pass but the one that advances it. The products
        are a sweep for the mask and one for the grid, and least squares and ADMM with the maximum
        of iterations and their inverses.
        """
        targeted = self.dense_target > 0
        passes = (2.2 if self.by_site else 1) * (1 + (targeted and not any(self._inputs(shapes))))
        sweeps = self.compensate * (1 + (self.scheme is not None and self.lsq is not None))
        sweep, factor = shapes.solving(self.by_site)
        products = (sweeps + 4 * targeted) * sweep
        if self.lsq is not None:
            whole = sum(rows * columns**2 for rows, columns in shapes.matrices)
            for rows, columns in shapes.matrices:
                most = lsq.affordable(self.lsq, shapes.tokens, columns)
                iterations = 2 * (most.iterations + 2 * most.mask_iterations)
                products += iterations * rows * columns**2 * sweep / whole
        return passes * shapes.forward + (1 + targeted) * shapes.gram_flops + factor + products

    def _ordering(
        self, weights: Mapping[Matrix, torch.Tensor], block: Block, rule: Rule
    ) -> Callable[[Curvature], torch.Tensor | None]:
        """A function that returns ROSE's column order of a site, from the summed column losses of
        all its matrices.
        """

        def ordering(curvature: Curvature) -> torch.Tensor | None:
            losses = [column_losses(w.float(), curvature, block.kept[m], rule) for m, w in weights.items()]
            return rose_order(torch.stack(losses).sum(0), rule.block, rule.pattern.m, self.reorder or 0.0)

        return ordering

    def _prune(self, task: "_Task", errors: "_Errors", block: Block) -> None:
        """Set the task's new weights, its mask, and its facts: the layer errors after the steps,
        and the numbers of iterations.
        """
        factorisation, target, rule = task.factorisation, task.target, task.rule
        refit = self.lsq and lsq.affordable(self.lsq, errors.tokens, target.shape[1])
        grid = None if refit else task.grid
        task.new, task.mask, swept = prune_matrix(
            target, factorisation, task.kept, rule, self.compensate, grid
        )
        right = task.mask.count_nonzero() == task.kept  # a sum would widen the mask to 64 bits first
        block.checks.append((right, NO_SCORES.format(f"{block.where}.{task.matrix.label}")))
        task.facts["layer_error"] = errors.of(task, swept)
        if refit is None:
            return
        alive = target.float().masked_fill(factorisation.dead, 0)
        task.facts["selected_error"] = task.facts["layer_error"]
        if refit.mask_iterations:
            search = lsq.Search(
                lambda scores: rule.mask(rule.weighted(scores), task.kept), factorisation.independence, swept
            )
            task.new, task.mask, found = lsq.admm(alive, task.mask, errors.hessian, task.new, search, refit)
            task.facts |= {"mask_swapped": found["swapped"], "lsq_iterations": found["refit_iterations"]}
            swept = found["error"]
        else:
            task.new, task.facts["lsq_iterations"], swept = lsq.solve(
                alive, task.mask, errors.hessian, task.new, refit
            )
        del alive
        task.facts["layer_error"] = errors.of(task, swept)
        if task.grid is not None:
            task.new = quantise_matrix(
                task.new, task.mask, factorisation, task.grid, rule.block, self.compensate
            )
            task.facts |= {"layer_error": errors.of(task), "unquantised_error": task.facts["layer_error"]}


class _Task:
    """State of one matrix during pruning."""

    def __init__(
        self,
        matrix: Matrix,
        target: torch.Tensor,
        factorisation: Factorisation,
        kept: int,
        rule: Rule,
        grid: Grid | None,
    ) -> None:
        self.matrix, self.target, self.factorisation, self.kept, self.rule, self.grid = (
            matrix,
            target,
            factorisation,
            kept,
            rule,
            grid,
        )
        self.new = target
        self.mask = torch.empty(0, dtype=torch.bool)
        self.facts: dict[str, Any] = {}


class _Errors:
    """Layer errors E‖(W − Ŵ) X‖² / E‖W X‖² of the matrices that share a site. The object takes
    ownership of G and adds the damping, so that it holds H.
    """

    def __init__(
        self, targets: Mapping[Matrix, torch.Tensor], moments: Moments, factorisation: Factorisation
    ) -> None:
        gram, self.tokens = moments.gram, moments.tokens
        self.scales = {matrix: energy(target, gram).clamp_min(1e-30) for matrix, target in targets.items()}
        self.damping, self.dead = factorisation.diagonal - factorisation.second_moment, factorisation.dead
        gram.diagonal().copy_(factorisation.diagonal)
        self.hessian = gram

    def forget(self) -> None:
        """Free H. From then on, ``of`` needs the swept error."""
        del self.hessian

    def of(self, task: _Task, swept: torch.Tensor | None = None) -> torch.Tensor:
        """Layer error [] of a task in float64, on the device. ``swept`` is tr((W − Ŵ) H (W − Ŵ)ᵀ)
        from the sweep, without always-zero inputs; None: it is computed here. The part that the
        damping adds is subtracted.
        """
        target, new = task.target, task.new
        error = lost(target, new, self.hessian) if swept is None else swept
        damping = self.damping if swept is None else self.damping.masked_fill(self.dead, 0)
        moved = torch.zeros_like(damping, dtype=torch.float64)
        for a, b in zip(target.split(ROWS), new.split(ROWS), strict=True):
            moved += (a - b).float().square().sum(0)
        return (error - moved @ damping.double()).clamp_min(0) / self.scales[task.matrix]


@dataclass(frozen=True)
class Quantise:
    """Quantise the fitted blocks of a window, site by site. The target of each matrix is the output of
    the block before quantisation for the same stream.
    """

    selection: SelectionParams
    scheme: Scheme
    compensate: bool  # by the OBS sweep; otherwise round to nearest

    def run(self, window: Window) -> None:
        """Quantise in place. With more than one block, the pruned stream before the window is copied
        and advanced.
        """
        model, streams = window.model, window.rows
        stream = streams.pruned if len(window.blocks) == 1 else streams.pruned.copy("ahead")
        for index, block in window.blocks.items():
            fitted = index, model.block(index, block.tensors)
            reference = Reference(model, fitted, stream, streams.seen, block.sites, advances=False)
            found: dict[str, Moments] = {}
            with block.settling():
                dealt = block.deal(())
                for site in block.sites:
                    if site not in dealt.ahead:
                        dealt.share()
                        dealt = block.deal(block.ahead(site, True, settings.gram_bytes()))
                        dealt.copy()  # ``reference`` still uses the old ones
                        found = collect(
                            model,
                            (index, model.block(index, block.tensors)),
                            stream.hidden,
                            streams.seen,
                            dealt.sites(),
                            reference if self.compensate else None,
                        )
                    if own := dealt.take(site):
                        self.quantise_site(block, site, found.pop(site), own)
                dealt.share()
            if index != max(window.blocks):
                model.advance(model.block(index, block.tensors), index, stream)

    def memory(self, shapes: Shapes) -> float:
        """Bytes: the window's blocks before and after quantisation, the moments of the largest
        site, a batch, the inputs that are kept, and the larger of two: one lane's moments, or the
        factorisation with the largest matrix.
        """
        d = max(shapes.sites)
        grams = 4 * d * d * (1 + self.compensate)
        solver = 4 * d * d + 9 * shapes.largest
        batch = shapes.inner(shapes.batch_rows) + self._inputs(shapes)
        return 8 * shapes.block * shapes.window + grams + max(grams, solver) + batch

    def _inputs(self, shapes: Shapes) -> float:
        """Bytes of the fitted block's inputs that are kept after the first site."""
        inputs = [(1 - shapes.held_out) * one for one in shapes.inputs]
        return sum(inputs[1:]) if self.compensate and sum(inputs) <= shapes.room else 0

    def flops(self, shapes: Shapes) -> float:
        """FLOPs of statistics per site of the quantised and the fitted block, and of a sweep
        towards the fitted block's outputs. If the fitted block's inputs are kept, they need one pass.
        """
        passes = 2.2 + (1 if self._inputs(shapes) else 2.2)
        sweep, factor = shapes.solving(by_site=True)
        products = 5 * self.compensate * sweep
        return passes * shapes.forward + 2 * shapes.gram_flops + factor + products

    def quantise_site(
        self, block: Block, site: str, moments: Moments, own: Sequence[Matrix] | None = None
    ) -> None:
        """Quantise the pruned matrices of a site, on their masks.

        Args:
            moments: those of the site's inputs, after the earlier sites were quantised. ``cross``
                is with the block before quantisation, whose outputs are then the target.
            own: the matrices to quantise; None: all.
        """
        centred, shift, factor = _centred(block, site, moments)
        gram = centred.gram
        factorisation = factorise(
            gram, self.selection.damping, self.selection.damping_of, f"{block.where} {site}", factor
        )
        difference = None if centred.cross is None else centred.cross.sub_(gram)
        for matrix in block.consumers(site) if own is None else own:
            weight = matrix.view(block.tensors[matrix.parameter]).clone()
            mask = matrix.view(block.masks[matrix.parameter]).to(weight.device)
            target = weight if difference is None else target_weight(weight, difference, factorisation, 1.0)
            grid = block.grids[matrix] = Grid(weight.shape, self.scheme, weight.device)
            block.tensors[matrix.parameter] = block.tensors[matrix.parameter].clone()
            new = quantise_matrix(target, mask, factorisation, grid, self.selection.block, self.compensate)
            _put(block, matrix, weight, new, shift)
            block.facts["matrices"][matrix.label] |= {
                "rounding_error": grid.error,
                "quantised_error": layer_error(target, new, gram),
            }


def _centred(
    block: Block, site: str, moments: Moments
) -> tuple[Moments, torch.Tensor | None, torch.Tensor | None]:
    """A site's moments without the shift that biases absorb, this shift in folded coordinates, and
    the factor that is folded in. Shift and factor are [C] or None.
    """
    shift = block.transform.shifts.get(site)
    factor = site_factor(block.layout, site, block.transform.factors)
    if shift is not None and factor is not None:
        shift = shift * factor.to(shift.device)
    return moments if shift is None else moments.shifted(shift), shift, factor


def _put(
    block: Block, matrix: Matrix, weight: torch.Tensor, new: torch.Tensor, shift: torch.Tensor | None
) -> None:
    """Store ``new`` [R, C] in the place of ``weight``, and add to the bias what the shift
    contributes, because the inputs exclude it.
    """
    matrix.view(block.tensors[matrix.parameter]).copy_(new)
    if shift is not None and matrix.bias is not None:
        block.tensors[matrix.bias] = block.tensors[matrix.bias].clone()
        matrix.bias_view(block.tensors[matrix.bias]).add_((weight - new) @ shift.to(weight.device))
