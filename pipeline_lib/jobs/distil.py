"""Train one variant's whole pruned model; the held-out split decides whether the result is kept."""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import click
import torch

from pipeline_lib.core import artifacts, ranks, runtime, scratch, seals
from pipeline_lib.core.kept import Kept
from pipeline_lib.core.progress import Progress, track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.export.masks import Masks
from pipeline_lib.fit import grids
from pipeline_lib.fit.distil import (
    Trained,
    TrainingData,
    held_out_divergence,
    storage_of,
    train,
    training_data,
)
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.models.architecture import Architecture
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter, open_checkpoint
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.recipe.variants import DistilPart
from pipeline_lib.solve.grid import Scheme, scheme
from pipeline_lib.stats.inputs import calibration_file, calibration_rows, open_model

SECONDS = 300.0  # minimum time between two states on the disk, see ``_States.keep``
STATES = "states"


def distil(workspace: Workspace, source: ModelParams, variant: str, part: DistilPart) -> str:
    """Train all blocks together, step by step. A killed run resumes. Returns a summary."""
    params = part.distil
    what = f"distil {variant}"
    model = open_model(workspace, source)
    directory = workspace.opened(workspace.pruned(variant))
    pruned = open_checkpoint(directory / "checkpoint", model.checkpoint.architecture, source.remote_code)
    found = calibration_rows(workspace)
    rows = {"fit": torch.cat([found["fit"], found["training"]]), "held_out": found["held_out"]}
    if not len(rows["held_out"]):
        click.echo(
            f"{what}: there is no held-out split (held_out: 0), so the training samples decide what is kept"
        )
    described = f"{part.model_dump_json()} {source.model_dump_json()}"
    inputs = [workspace.model, directory / seals.FILE, calibration_file(workspace)]
    with scratch.hold("distil", runtime.resume_key("distil", described, inputs), what) as held:
        watched = partial(track, what=f"{what}, dense model", units="blocks")
        data = training_data(model, rows, params, storage_of(model, rows, held.own), watched)
        grid = scheme(part.quantization, pruned.dtype) if part.quantization else None
        blocks = opened(model, pruned, Masks(directory / "masks", pruned), params, grid)
        before = held_out_divergence(data, pruned.block)
        curve = _trained(data, blocks, params, _States(held.kept, what))
        after = (
            held_out_divergence(data, lambda index: blocks[index].stored())
            if math.isfinite(curve[-1])
            else math.nan
        )
        kept = after < before
        if not ranks.writes():
            return ""
        with workspace.directory(workspace.distilled(variant)) as made:
            if kept:
                writer = ShardWriter(pruned, made / "checkpoint")
                for index, block in enumerate(blocks):
                    writer.write(index, block.stored())
                    if grid is not None:
                        grids.write(artifacts.block_file(made / grids.FOLDER, index), block.grids)
                writer.finish()
        facts = {
            "settings": params.model_dump(mode="json"),
            "rows": len(rows["fit"]),
            "steps": len(curve),
            "held_out_before": before,
            "held_out_after": after if math.isfinite(after) else None,
            "kept": kept,
            "curve": [value for value in curve if math.isfinite(value)],
            "zeros": _zeros(workspace, blocks, pruned.architecture) if kept else None,
        }
        workspace.save(workspace.training(variant), facts)
    became = f"{after:.4f}" if math.isfinite(after) else "no number"
    return (
        f"KL divergence from the dense model on the held-out split {before:.4f} → {became} nats per token;"
        f" {'kept' if kept else 'not kept, the pruned checkpoint is used'}"
    )


def opened(
    model: BlockModel, pruned: Checkpoint, masks: Masks, params: DistilParams, grid: Scheme | None = None
) -> list[Trained]:
    """A pruned checkpoint's blocks, ready to be trained on the model's device.

    Args:
        grid: the scheme of a quantised checkpoint, whose grids are in files beside it. None: not
            quantised.
    """
    found, folder = [], pruned.path.parent / grids.FOLDER
    for index, layout in enumerate(model.checkpoint.architecture.layouts):
        prefix = pruned.block_prefix(index)
        own = {name.removeprefix(prefix): mask.to(model.device) for name, mask in masks.block(index).items()}
        # without a copy they would stay mapped to the file
        tensors = {name: tensor.to(model.device, copy=True) for name, tensor in pruned.block(index).items()}
        of_block = grids.read(artifacts.block_file(folder, index), tensors, layout, grid) if grid else None
        found.append(Trained(tensors, own, layout, params, of_block))
    return found


def _trained(
    data: TrainingData, blocks: Sequence[Trained], params: DistilParams, states: "_States"
) -> list[float]:
    """Train the blocks in place, from the latest state on. Returns each step's mean KL, up to the
    first that is not finite.
    """
    curve, steps = states.latest(blocks), data.steps(params)
    if curve:
        click.echo(f"{states.what}: resuming after {len(curve)} of {steps} steps")
    with (
        Progress(states.what, steps, "steps", len(curve)) as progress,
        closing(train(data, blocks, params, len(curve))) as values,
    ):
        for value in values:
            curve.append(value)
            if not math.isfinite(value):
                click.echo(f"{states.what}: the loss of step {len(curve)} is not a number; lower distil.rate")
                break
            progress.advance()
            if len(curve) < steps:
                states.keep(blocks, curve)
    return curve


class _States:
    """The states from which a killed run resumes: every block's weights and averages after some
    step, in a file per block.
    """

    def __init__(self, directory: Path, what: str) -> None:
        self.what, self.directory = what, directory
        self.kept = Kept(directory, what, (STATES,), "step") if ranks.first() else None
        self._next = time.monotonic() + SECONDS

    def latest(self, blocks: Sequence[Trained]) -> list[float]:
        """Restore the blocks' latest state, and return the curve until then; empty if there is no
        state.
        """
        done = ranks.broadcast(self.kept.latest() if self.kept else None, 0)
        for left in (
            self.directory.glob(f"{STATES}/*") if self.kept else ()
        ):  # files of a state that was not finished
            if done is None or left.name != str(done):
                artifacts.remove(left)
        if done is None:
            return []
        curve: list[float] = []
        for index, block in enumerate(blocks):
            found = artifacts.read_tensors(self._file(done, index)) if self.kept else ({}, {})
            state, facts = ranks.broadcast(found, 0)
            block.restore(state)
            curve = facts["curve"]
        return curve

    def keep(self, blocks: Sequence[Trained], curve: Sequence[float]) -> None:
        """Store a state, if the last one is old enough."""
        started = time.monotonic()
        if self.kept is None or started < self._next:
            return
        done, before = len(curve), self.kept.latest()
        files = [self._file(done, index) for index in range(len(blocks))]
        for file, block in zip(files, blocks, strict=True):
            artifacts.write_tensors(file, block.state(), {"curve": list(curve)})
        self.kept.finish(done, files)
        if before is not None:
            self.kept.forget(before)
            artifacts.remove(self._file(before, 0).parent)
        now = time.monotonic()
        self._next = now + max(SECONDS, 20 * (now - started))

    def _file(self, done: int, index: int) -> Path:
        return artifacts.block_file(self.directory / STATES / str(done), index)


def _zeros(workspace: Workspace, blocks: Sequence[Trained], architecture: Architecture) -> int:
    """Number of weights that are zero in the included matrices, as they are stored."""
    included, zeros = {(m["block"], m["label"]) for m in workspace.included()}, 0
    for index, block in enumerate(blocks):
        stored = block.stored()
        for matrix in architecture.layouts[index].matrices:
            if (index, matrix.label) in included:
                weight = matrix.view(stored[matrix.parameter])
                zeros += weight.numel() - int(weight.count_nonzero())
    return zeros
