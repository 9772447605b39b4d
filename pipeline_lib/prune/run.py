"""Prune a model block by block: the input of each block is the output of the pruned blocks before it.
A block is written when it is finished.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.folding import fold
from pipeline_lib.models.places import Storage
from pipeline_lib.models.stream import BlockModel, Stream
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.collect import Reference
from pipeline_lib.prune.plan import Plan
from pipeline_lib.prune.window import Block, Streams, Window
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.stats.lanes import Dealt, deal, together


@dataclass(frozen=True)
class Rows:
    """Calibration samples [N, T] of token ids, and their batch size."""

    fit: torch.Tensor
    held_out: torch.Tensor  # samples that judge fits; no statistic of a judged fit uses them
    batch_rows: int  # rows per forward pass; a batch never mixes splits or lanes
    training: torch.Tensor | None = None  # samples that only train blocks, a multiple of four

    @classmethod
    def of(cls, split: Mapping[str, torch.Tensor], recipe: Recipe) -> "Rows":
        """The samples of calibration, without those for training that the recipe does not use."""
        return cls(split["fit"], split["held_out"], recipe.batch_rows, split["training"][: recipe.training])

    def dealt(self, trains: bool) -> tuple[torch.Tensor, Dealt, Dealt]:
        """All samples, and the training and held-out ones in batches; the held-out batches come last.

        Args:
            trains: a step trains blocks; otherwise the samples for training are left out.
        """
        more = self.fit[:0] if self.training is None or not trains else self.training
        fit = deal(len(self.fit), self.batch_rows, more=len(more))
        held_out = deal(len(self.held_out), self.batch_rows, len(fit.sizes))
        return torch.cat([together(self.fit, more), self.held_out]), fit, held_out


@dataclass(frozen=True)
class Source:
    """The model, and the number of weights to keep."""

    model: BlockModel
    transforms: list[Transform]  # one per block
    kept: Mapping[tuple[int, Matrix], int]  # weights that each included matrix keeps, by block


# index -> a finished block's stored tensors, or None
Finished = Callable[[int], Mapping[str, torch.Tensor] | None]


def prune(
    source: Source, rows: Rows | None, plan: Plan, finished: Finished, storage: Storage | None = None
) -> Iterator[tuple[int, Block]]:
    """Yield every block, in order, of every window that is not yet ``finished``.

    If a step trains whole blocks, the held-out split decides whether its result is kept, and all
    statistics come from the training split. Otherwise the statistics come from both splits. Samples
    that only train enter no statistic.

    The streams before the first unfinished block are recomputed from the finished blocks' stored
    tensors. An uninterrupted run passes its stream through the same tensors (rounded to the
    checkpoint's dtype), so the bytes are the same.

    Memory: the streams, and one window of blocks with the needs of its step (``fit``). There is one
    stream, or two if a target needs the dense model, with one value of the computing dtype per
    token and channel each. Nothing grows with depth.

    Args:
        rows: None if the plan needs no text; then no forward pass is run.
        storage: the storage of the streams; None: on the device.
    """
    depth = source.model.checkpoint.architecture.depth
    streams = None if rows is None else _streams(source.model, rows, plan, storage)
    for first in range(0, depth, plan.window):
        window = range(first, min(first + plan.window, depth))
        stored = {index: tensors for index in window if (tensors := finished(index)) is not None}
        blocks = _pruned(source, streams, plan, window, done=len(stored) == len(window))
        stored |= {index: _rounded(block) for index, block in blocks.items()}
        if streams is not None:
            _advance(source.model, streams.pruned, window, stored)
        del stored
        yield from blocks.items()
        del blocks  # free before the next window


def stream_bytes(plan: Plan, tokens: int, width: int, itemsize: int) -> int:
    """Bytes of all streams of ``tokens`` tokens."""
    return (1 + plan.needs.dense_stream + (plan.window > 1)) * itemsize * tokens * width


def _streams(model: BlockModel, rows: Rows, plan: Plan, storage: Storage | None) -> Streams:
    every, fit, held_out = rows.dealt(plan.judged)
    own = fit.own + held_out.own
    pruned = model.embed(every, fit.sizes + held_out.sizes, "pruned", storage, own)
    dense = pruned.copy("dense") if plan.needs.dense_stream else None
    seen = (
        fit.leading
        if plan.judged
        else [own + others for own, others in zip(fit.lanes, held_out.lanes, strict=True)]
    )
    return Streams(pruned, dense, len(fit.sizes), seen)


def _pruned(
    source: Source, streams: Streams | None, plan: Plan, window: range, done: bool
) -> dict[int, Block]:
    """The pruned blocks of a window after all steps; none if they are done. The dense stream is
    advanced, the pruned one is not.
    """
    model, dense_stream = source.model, None if streams is None else streams.dense
    results: dict[int, Block] = {}
    if done and dense_stream is None:
        return results
    ahead = None
    if streams is not None:
        ahead = streams.pruned if done or len(window) == 1 else streams.pruned.copy("ahead")
    for index in window:
        block = _opened(source, index)
        reference = None
        if streams is not None and dense_stream is not None:
            dense = model.block(index, block.tensors)
            reference = Reference(model, (index, dense), dense_stream, streams.seen, block.sites)
            del dense
        if not done:
            own = (
                None
                if streams is None or ahead is None
                else Streams(ahead, dense_stream, streams.cut, streams.seen)
            )
            plan.select.run(Window(model, {index: block}, own, reference))
            results[index] = block
        if reference is not None:
            reference.advance()
        del block, reference
        if index != window[-1] and not done and ahead is not None:
            model.advance(model.block(index, results[index].tensors), index, ahead)
    del ahead
    if results:
        for step in plan.finetune:
            step.run(Window(model, results, streams, None))
    return results


def _opened(source: Source, index: int) -> Block:
    """A block with its factors folded in, on the model's device."""
    model, architecture = source.model, source.model.checkpoint.architecture
    layout = architecture.layouts[index]
    transform = source.transforms[index].to(model.device)
    wide = torch.float32 if transform.factors else None  # products with factors are not rounded
    stored = model.checkpoint.block(index)  # memory-mapped: one live tensor keeps the whole mapping alive
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    tensors = {name: stored.pop(name).to(model.device, wide, copy=True) for name in dtypes}
    kept = {
        matrix: source.kept[index, matrix] for matrix in layout.matrices if (index, matrix) in source.kept
    }
    folded = fold(tensors, layout, transform.factors)
    return Block(layout, f"{architecture.blocks}.{index}", transform, kept, folded, dtypes)


def _rounded(block: Block) -> dict[str, torch.Tensor]:
    """Round a block's tensors to the dtypes of the checkpoint, in place, and return them."""
    block.tensors = {name: tensor.to(block.dtypes[name]) for name, tensor in block.tensors.items()}
    return block.tensors


def _advance(
    model: BlockModel, stream: Stream, window: range, stored: Mapping[int, Mapping[str, torch.Tensor]]
) -> None:
    """Pass the stream through a window's stored blocks."""
    for index in window:
        block = model.block(index, stored[index])
        if index + 1 < model.checkpoint.architecture.depth:
            model.advance(block, index, stream)
        else:  # the last outputs are not used, and one batch shows whether they are finite
            for number in stream.hidden.own[:1]:
                with torch.no_grad():
                    model.check_finite(index, model.call(block, index, stream.hidden[number]))
