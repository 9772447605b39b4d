"""Prune a model block by block: each block sees the outputs of the pruned blocks before it, and is written when it is done."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field, ValidationInfo, field_validator

from pipeline_lib.allocation.plan import AllocationParams
from pipeline_lib.calibration.statistics import Moments, MomentSums
from pipeline_lib.core.params import Conflict, Params
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.folding import fold
from pipeline_lib.models.stream import BlockModel, Stream, tapped
from pipeline_lib.pruning.layerwise import Layerwise, PrunedBlock, prune_site, quantise_site
from pipeline_lib.pruning.matrix import chosen
from pipeline_lib.pruning.scores import saliency
from pipeline_lib.pruning.settings import LayerwiseParams, SelectionParams
from pipeline_lib.quantization.block import Scales
from pipeline_lib.quantization.grid import Scheme
from pipeline_lib.quantization.settings import QuantizationParams
from pipeline_lib.reconstruction.fit import BlockParams, FitParams, Masks, Pairs, fit
from pipeline_lib.transforms.transform import Transform

FITS = ("channel", "block")  # the steps that fit a whole block
REFIT = "refit"  # what is fitted once more where the block is quantised after these steps


class ReconstructionParams(LayerwiseParams):
    """Section ``prune.reconstruction``: the steps in order, and the parameters of each."""

    channel: FitParams
    block: BlockParams

    @property
    def fits(self) -> dict[str, FitParams]:
        """The steps that fit a whole block. Each passes a gate: held-out rows, which enter no statistic of the variant, keep it or not."""
        return {name: getattr(self, name) for name in FITS if name in self.steps}


class PruneParams(Params):
    """Section ``prune``, with ``variants.<name>`` laid over it."""

    batch_rows: int = Field(ge=1)
    activation_budget_bytes: int = Field(ge=0)
    quantization: QuantizationParams
    selection: SelectionParams
    allocation: AllocationParams
    reconstruction: ReconstructionParams

    @field_validator("selection")
    @classmethod
    def _does_something(cls, selection: SelectionParams, info: ValidationInfo) -> SelectionParams:
        quantization = info.data.get("quantization")
        if selection.sparsity == 0 and quantization is not None and quantization.bits is None:
            raise Conflict(
                "sparsity 0 prunes nothing, so it must be greater than 0 unless quantization.bits says what else to do", "sparsity"
            )
        return selection


class VariantParams(PruneParams):
    """A variant: the merged parameters and where its factors and sensitivities come from, below ``build/``."""

    factors: str
    sensitivity: str


class _Reached(Exception):
    """All sites that were asked for were reached: what comes after them in the block is not needed."""


def collect(
    model: BlockModel,
    block: torch.nn.Module,
    index: int,
    hidden: Sequence[torch.Tensor],
    site: str | None = None,
    beside: tuple[torch.nn.Module, Sequence[torch.Tensor]] | None = None,
) -> dict[str, Moments]:
    """Moments of the sites' inputs for the batches of a stream before a block. No more of the block is run than they need.

    Args:
        hidden: [B, T, D] each.
        site: only this one; all without.
        beside: the dense block and the dense stream's batches before it: the cross moments with its inputs are collected too.
    """
    sites = {one.name: one.module for one in model.checkpoint.architecture.sites if site in (None, one.name)}
    sums = {name: MomentSums() for name in sites}

    def run(through: torch.nn.Module, hidden: torch.Tensor, take: Callable[[str, torch.Tensor], None]) -> None:
        ahead = set(sites)

        def reach(name: str, x: torch.Tensor) -> None:
            take(name, x)
            ahead.discard(name)
            if not ahead:
                raise _Reached

        with suppress(_Reached), tapped(through, sites, reach):
            model.call(through, index, hidden)

    with torch.no_grad():
        for number, batch in enumerate(hidden):
            dense: dict[str, torch.Tensor] = {}
            if beside is not None:
                run(beside[0], beside[1][number], dense.__setitem__)
            run(block, batch, lambda name, x, dense=dense: sums[name].add(x, dense.get(name)))  # type: ignore[misc]
    return {name: sums.pop(name).finish(beside is not None) for name in list(sums)}


def prune(
    model: BlockModel,
    fit_rows: torch.Tensor,
    held_out_rows: torch.Tensor,
    kept: Mapping[tuple[int, Matrix], int],
    transforms: list[Transform],
    params: PruneParams,
    finished: Callable[[int], Mapping[str, torch.Tensor] | None],
    scratch: Path | None = None,
) -> Iterator[tuple[int, PrunedBlock]]:
    """Yield every block, in order, of every window that is not yet ``finished`` (which gives a block's stored tensors, or None).

    Where a step fits whole blocks, the held-out rows judge it, and all statistics come from the fitting rows alone. Otherwise nothing is
    judged, and the statistics come from all rows. No batch holds both kinds.

    The streams before the first unfinished block are recomputed from the finished blocks' stored tensors, which are the very
    tensors (rounded to the checkpoint's dtype) that an uninterrupted run passes its stream through: the bytes are the same.

    Memory: the streams (one, or two where something aims at the dense model, a value of the computing dtype per token and channel each;
    above ``activation_budget_bytes`` they are files in ``scratch``), and one window of blocks with what its step needs (``fit``); nothing grows with depth.
    """
    checkpoint, architecture = model.checkpoint, model.checkpoint.architecture
    how = params.reconstruction
    fits = how.fits
    scheme = params.quantization.scheme(checkpoint.dtype)
    aims = bool(fits) or how.towards_dense > 0
    size = how.block.window if "block" in how.steps else 1
    rows = torch.cat([fit_rows, held_out_rows])
    streams = (1 + aims + (size > 1)) * model.dtype.itemsize * rows.numel() * architecture.width
    directory = scratch if streams > params.activation_budget_bytes else None
    batches = [len(batch) for part in (fit_rows, held_out_rows) if len(part) for batch in part.split(params.batch_rows)]
    cut = -(-len(fit_rows) // params.batch_rows)  # batches before this one hold the fitting rows
    pruned_stream = model.embed(rows, batches, directory, "pruned")
    dense_stream = pruned_stream.copy(directory, "dense") if aims else None
    seen = slice(cut) if fits else slice(None)  # what statistics are taken from
    for first in range(0, architecture.depth, size):
        window = range(first, min(first + size, architecture.depth))
        stored = {index: tensors for index in window if (tensors := finished(index)) is not None}
        done = len(stored) == len(window)
        ahead = pruned_stream if done or len(window) == 1 else pruned_stream.copy(directory, "ahead")
        results: dict[int, PrunedBlock] = {}
        dtypes: dict[int, dict[str, torch.dtype]] = {}
        for index in window:
            if done and dense_stream is None:
                continue
            transform = transforms[index].to(model.device)
            wide = torch.float32 if transform.factors else None  # products with factors are not rounded
            source = checkpoint.block(index)  # maps the file: as long as one tensor lives, all do
            dtypes[index] = {name: tensor.dtype for name, tensor in source.items()}
            result = PrunedBlock({name: source.pop(name).to(model.device, wide, copy=True) for name in dtypes[index]})
            result.tensors = fold(result.tensors, architecture, transform.factors)
            dense = None if dense_stream is None else model.block(index, result.tensors)
            if not done:
                own = {matrix: kept[index, matrix] for matrix in architecture.matrices if (index, matrix) in kept}
                beside = None if dense is None or dense_stream is None else (dense, dense_stream.hidden[seen])
                _select(model, index, result, ahead.hidden[seen], beside, own, transform, params)
                results[index] = result
                del beside  # its batches, before they are passed on
            if dense is not None and dense_stream is not None:
                model.advance(dense, index, dense_stream)
            del result, dense
            if index != window[-1] and not done:
                model.advance(model.block(index, results[index].tensors), index, ahead)
        if results and dense_stream is not None:
            inputs, targets = pruned_stream.hidden, dense_stream.hidden
            fitting, held_out = Pairs(inputs[:cut], targets[:cut]), Pairs(inputs[cut:], targets[cut:])
            for step, settings in fits.items():
                _fit(model, results, kept, params.selection, step, settings, fitting, held_out)
            if fits and scheme is not None:
                ahead = pruned_stream if len(window) == 1 else pruned_stream.copy(directory, "ahead")
                _quantise(model, results, ahead, seen, transforms, params, scheme)
                if params.quantization.refit:
                    again = list(fits.values())[-1].model_copy(update={"parts": params.quantization.refit})
                    _fit(model, results, kept, params.selection, REFIT, again, fitting, held_out)
            del inputs, targets, fitting, held_out
        for index in window:
            if index in results:
                results[index].tensors = {name: tensor.to(dtypes[index][name]) for name, tensor in results[index].tensors.items()}
                stored[index] = results[index].tensors
            block = model.block(index, stored[index])
            if index + 1 < architecture.depth:
                model.advance(block, index, pruned_stream)
            else:  # nobody reads what comes after the last block: that it is finite shows on one batch
                with torch.no_grad():
                    model.check_finite(index, model.call(block, index, pruned_stream.hidden[0]))
        yield from results.items()


def _select(
    model: BlockModel,
    index: int,
    block: PrunedBlock,
    hidden: Sequence[torch.Tensor],
    beside: tuple[torch.nn.Module, Sequence[torch.Tensor]] | None,
    kept: Mapping[Matrix, int],
    transform: Transform,
    params: PruneParams,
) -> None:
    """Prune one folded block's matrices in their places by the moments of both streams before it, collected once or again for every site.

    Args:
        hidden: the pruned stream's batches before the block.
        beside: the dense block and the dense stream's batches before it.
    """
    architecture, how = model.checkpoint.architecture, params.reconstruction
    refit = how.lsq if "lsq" in how.steps else None
    fitted_later = any(step in how.steps for step in FITS)
    scheme = None if fitted_later else params.quantization.scheme(model.checkpoint.dtype)
    layerwise = Layerwise("obs" in how.steps, how.towards_dense, how.reorder, refit, scheme, torch.float32 if fitted_later else None)
    beside = beside if how.towards_dense else None
    pruned_sites = {matrix.site for matrix in kept}
    found: dict[str, Moments] = {}
    for site in (one.name for one in architecture.sites if one.name in pruned_sites):
        if site not in found:
            only = None if how.collect == "block" else site
            found = collect(model, model.block(index, block.tensors), index, hidden, only, beside)
        prune_site(block, architecture, site, found, kept, transform, params.selection, layerwise, f"{architecture.blocks}.{index}")


def _quantise(
    model: BlockModel,
    results: Mapping[int, PrunedBlock],
    stream: Stream,
    seen: slice,
    transforms: list[Transform],
    params: PruneParams,
    scheme: Scheme,
) -> None:
    """Quantise the fitted blocks of a window in place, site by site; each aims at what the block gave for the same stream before.

    The stream before the window is passed on if there is more than one block; statistics are of its batches ``seen``.
    """
    architecture, compensate = model.checkpoint.architecture, "obs" in params.reconstruction.steps
    for index, result in results.items():
        fitted = model.block(index, result.tensors)
        transform, where = transforms[index].to(model.device), f"{architecture.blocks}.{index}"
        hidden = stream.hidden[seen]
        for site in (one.name for one in architecture.sites if one.name in {matrix.site for matrix in result.curvatures}):
            found = collect(model, model.block(index, result.tensors), index, hidden, site, (fitted, hidden) if compensate else None)
            quantise_site(result, architecture, site, found[site], transform, params.selection, scheme, compensate, where)
        del hidden  # its batches, before they are passed on
        if index != max(results):
            model.advance(model.block(index, result.tensors), index, stream)


def _fit(
    model: BlockModel,
    results: Mapping[int, PrunedBlock],
    kept: Mapping[tuple[int, Matrix], int],
    selection: SelectionParams,
    step: str,
    params: FitParams,
    fitting: Pairs,
    held_out: Pairs,
) -> None:
    """Fit the pruned blocks of one window together, in place; each is told the window's errors under the step's name."""
    places = {  # matrices as they are called in the window -> block and matrix
        replace(m, parameter=f"{index}/{m.parameter}", bias=m.bias and f"{index}/{m.bias}"): (index, m)
        for index, result in results.items()
        for m in result.curvatures
    }
    if not places:
        return

    def run(hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for index in results:
            prefix = f"{index}/"
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            hidden = model.call(model.templates[index], index, hidden, scales[index].joined(own))
        return hidden

    def remask(tensors: Mapping[str, torch.Tensor]) -> Masks:
        masks = {}
        for matrix, (index, own) in places.items():
            pruned = results[index]
            scores = saliency(selection.score, matrix.view(tensors[matrix.parameter]), pruned.curvatures[own]) * pruned.emphases[own]
            masks[matrix] = chosen(scores, kept[index, own], selection)
        return masks

    scales = {index: Scales(result.tensors, result.grids if "scales" in params.parts else {}) for index, result in results.items()}
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    for index, result in results.items():
        given = {**result.tensors, **scales[index].free()}
        tensors |= {f"{index}/{name}": tensor.float() for name, tensor in given.items()}
        names[index] = list(given)
        result.tensors = {}  # the fit takes them over
    del given
    architecture = model.checkpoint.architecture
    masks = {matrix: own.view(results[index].masks[own.parameter]) for matrix, (index, own) in places.items()}
    offsets = {f"{index}/{name}": offset for index in results for name, offset in architecture.offsets.items()}
    where = f"{architecture.blocks}.{min(results)}"
    fitted = fit(run, tensors, masks, fitting, held_out, params, where, None if step == REFIT else remask, model.dtype, offsets)
    for index, result in results.items():
        result.tensors = scales[index].settle({name: fitted.tensors[f"{index}/{name}"] for name in names[index]})
        result.facts[step] = fitted.facts
    for matrix, mask in (fitted.masks or {}).items():
        index, own = places[matrix]
        whole = results[index].masks[own.parameter]
        own.view(whole).copy_(mask)
        results[index].masks[own.parameter] = whole
