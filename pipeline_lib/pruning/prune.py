"""Prune a model block by block: each block sees the outputs of the pruned blocks before it, and is written when it is done."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from pipeline_lib.allocation.plan import AllocationParams
from pipeline_lib.calibration.statistics import Accumulator, SiteStatistics, refresh
from pipeline_lib.errors import SparselineError
from pipeline_lib.models.architecture import Architecture, Matrix
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import BlockModel, Stream, tapped
from pipeline_lib.params import Params
from pipeline_lib.pruning.matrix import prune_matrix
from pipeline_lib.pruning.settings import SelectionParams, StepsParams
from pipeline_lib.reconstruction.channel import ChannelParams, Stage, fit
from pipeline_lib.reconstruction.obs import factorise, layer_error
from pipeline_lib.transforms.transform import Transform


class ReconstructionParams(StepsParams):
    """Section ``prune.reconstruction``: the steps in order, and the parameters of each."""

    channel: ChannelParams


class PruneParams(Params):
    """Section ``prune``, with ``variants.<name>`` laid over it."""

    batch_rows: int = Field(ge=1)
    selection: SelectionParams
    allocation: AllocationParams
    reconstruction: ReconstructionParams


class VariantParams(PruneParams):
    """A variant: the merged parameters and where its factors and sensitivities come from, below ``build/``."""

    factors: str
    sensitivity: str


@dataclass
class PrunedBlock:
    """One finished block."""

    tensors: dict[str, torch.Tensor]  # every parameter, in the checkpoint's dtype
    masks: dict[str, torch.Tensor]  # parameter -> bool, True = kept, in the checkpoint's orientation
    facts: dict[str, Any]  # per matrix: kept, size, layer error, damping; per block: reconstruction


def prune_matrices(
    architecture: Architecture,
    tensors: Mapping[str, torch.Tensor],
    statistics: Mapping[str, SiteStatistics],
    kept: Mapping[Matrix, int],
    transform: Transform,
    selection: SelectionParams,
    compensate: bool,
    where: str,
) -> PrunedBlock:
    """Choose the masks of one (folded) block and, if asked to, compensate (OBS). Linears that share a site share one factorisation.

    Args:
        tensors: the folded block in float32.
        statistics: of the pruned stream through the folded block, collected before any of its matrices is pruned.
        kept: how many weights each included matrix keeps.
    """
    pruned, masks = dict(tensors), {}
    facts: dict[str, Any] = {"matrices": {}}
    for site in architecture.sites:
        consumers = [matrix for matrix in architecture.consumers(site.name) if matrix in kept]
        if not consumers:
            continue
        plain = statistics[site.name]
        shift = transform.shifts.get(site.name)
        factor = site_factor(architecture, site.name, transform.factors)
        if shift is not None and factor is not None:
            shift = shift * factor.to(shift.device)
        centred = plain if shift is None else refresh(plain, None, shift)
        gram = centred.second_moment_matrix
        factorisation = factorise(gram, selection.damping, selection.damping_of, f"{where} {site.name}", factor)
        importance = transform.importance.get(site.name)
        for matrix in consumers:
            weight = matrix.view(tensors[matrix.parameter])
            new, mask = prune_matrix(weight, factorisation, kept[matrix], selection, compensate, importance)
            if int(mask.sum()) != kept[matrix]:
                raise SparselineError(f"The scores of {where}.{matrix.label} hold NaN or infinity; check the model, or compute in float32.")
            if matrix.parameter not in masks:
                masks[matrix.parameter] = torch.ones_like(tensors[matrix.parameter], dtype=torch.bool)
                pruned[matrix.parameter] = tensors[matrix.parameter].clone()
            matrix.view(masks[matrix.parameter]).copy_(mask)
            matrix.view(pruned[matrix.parameter]).copy_(new)
            if shift is not None and matrix.bias is not None:
                pruned[matrix.bias] = pruned[matrix.bias].clone()
                matrix.bias_view(pruned[matrix.bias]).add_((weight - new) @ shift.to(weight.device))
            facts["matrices"][matrix.label] = {
                "kind": matrix.kind,
                "size": weight.numel(),
                "kept": kept[matrix],
                "layer_error": layer_error(weight, new, gram),
                "damping": factorisation.damping,
            }
    return PrunedBlock(pruned, masks, facts)


def collect(model: BlockModel, block: torch.nn.Module, index: int, stream: Stream, tokens: int) -> dict[str, SiteStatistics]:
    """Second moments of every site for the given stream through a block, without moving the stream on."""
    sites = {site.name: site.module for site in model.checkpoint.architecture.sites}
    accumulators = {site: Accumulator(tokens, 1024, gram=True) for site in sites}
    with torch.no_grad(), tapped(block, sites, lambda site, x: accumulators[site].add(x)):
        for hidden in stream.hidden:
            model.call(block, index, hidden)
    return {site: accumulator.finish() for site, accumulator in accumulators.items()}


def prune(
    model: BlockModel,
    fit_rows: torch.Tensor,
    held_out_rows: torch.Tensor,
    kept: Mapping[tuple[int, Matrix], int],
    transforms: list[Transform],
    params: PruneParams,
    finished: Callable[[int], Mapping[str, torch.Tensor] | None],
) -> Iterator[tuple[int, PrunedBlock]]:
    """Yield every block that is not yet ``finished`` (which gives a block's stored tensors, or None), in order.

    The streams before the first unfinished block are recomputed from the finished blocks' stored tensors, which are the very
    tensors (rounded to the checkpoint's dtype) that an uninterrupted run passes its stream through: the bytes are the same.
    """
    checkpoint, architecture = model.checkpoint, model.checkpoint.architecture
    rows = torch.cat([fit_rows, held_out_rows])
    channel = "channel" in params.reconstruction.steps
    pruned_stream = model.embed(rows, params.batch_rows)
    dense_stream = Stream(list(pruned_stream.hidden)) if channel else None
    for index in range(architecture.depth):
        where = f"{architecture.blocks}.{index}"
        source = checkpoint.block(index)
        stored = finished(index)
        result = None
        inputs = list(pruned_stream.hidden)
        if stored is None:
            transform = transforms[index].to(model.device)
            folded = {name: tensor.to(model.device, torch.float32) for name, tensor in source.items()}
            folded = fold(folded, architecture, transform.factors)
            block = model.block(index, folded)
            statistics = collect(model, block, index, pruned_stream, rows.numel())
            own = {matrix: kept[index, matrix] for matrix in architecture.matrices if (index, matrix) in kept}
            compensate = "obs" in params.reconstruction.steps
            result = prune_matrices(architecture, folded, statistics, own, transform, params.selection, compensate, where)
        if dense_stream is not None:
            model.advance(model.block(index, source), index, dense_stream)
        if result is not None and dense_stream is not None and own:
            cut = len(inputs) - _batches(len(held_out_rows), inputs)
            targets = dense_stream.hidden
            result.tensors, result.facts["channel"] = fit(
                functools.partial(model.call, block, index),
                result.tensors,
                list(own),
                Stage(inputs[:cut], targets[:cut]),
                Stage(inputs[cut:], targets[cut:]),
                params.reconstruction.channel,
                where,
            )
        if result is not None:
            result.tensors = {name: tensor.to(source[name].dtype) for name, tensor in result.tensors.items()}
        model.advance(model.block(index, result.tensors if result is not None else stored), index, pruned_stream)
        if result is not None:
            yield index, result


def _batches(rows: int, stream: list[torch.Tensor]) -> int:
    """How many whole batches at the stream's end hold at least ``rows`` rows, leaving at least one for fitting."""
    count = held = 0
    while held < rows and count < len(stream) - 1:
        count += 1
        held += len(stream[-count])
    return count
