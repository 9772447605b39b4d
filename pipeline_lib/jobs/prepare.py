"""Find the model, check it, and record facts about it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click
import torch

from pipeline_lib.core import artifacts, environment, files, runtime
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.export.sizes import Bytes, Weights, summary
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint, own_code
from pipeline_lib.models.files import grouped
from pipeline_lib.models.names import Selection, select
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import fetch, identity, not_fetched, recorded_files
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.tokenizer import ids_beyond, load_tokenizer
from pipeline_lib.models.verify import verified, with_layouts
from pipeline_lib.models.written import to_json


def prepare(workspace: Workspace, source: ModelParams) -> str:
    """Write facts about the model, its logical matrices, and its size. Returns a summary."""
    directory = fetch(source)
    checkpoint = open_checkpoint(directory, None, source.remote_code, source.dequantize)
    tokenizer = load_tokenizer(directory, checkpoint.vocabulary, source.remote_code)
    checkpoint = _verified(checkpoint)
    entry = checkpoint.architecture
    matrices, selection = _matrices(checkpoint, source)
    parameters = {  # parameters with an included matrix -> number of weights
        name: math.prod(checkpoint.shapes[name])
        for name in dict.fromkeys(m["parameter"] for m in matrices if m["included"])
    }
    for matrix in matrices:
        del matrix["parameter"]
    facts = {
        "path": str(source.path),
        "id": source.id,
        "revision": source.revision,
        "remote_code": source.remote_code,
        "dequantize": source.dequantize,
        "family": entry.family,
        "architecture": to_json(entry),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "parameters": checkpoint.parameters,
        "versions": artifacts.read_json(environment.FILE),
        "sha256": {
            name: files.sha256(directory / name)
            for name in track(recorded_files(checkpoint), "prepare, hashes", "files")
        },
    }
    workspace.made_for(identity(facts["sha256"]), workspace.model)
    with workspace.directory(workspace.model.parent) as made:
        workspace.save(made / workspace.model.name, facts)
        artifacts.write_json(made / workspace.matrices.name, matrices)
    bits = 8 * checkpoint.dtype.itemsize
    size = Bytes(
        sum(parameters.values()) * bits // 8,
        sum((directory / name).stat().st_size for name in set(checkpoint.files.values())),
    )
    weights = [Weights(total, total, bits) for total in parameters.values()]
    workspace.save(workspace.sizes(DENSE), summary(weights, {"dense": size}))
    prunable = sum(math.prod(matrix["shape"]) for matrix in matrices if matrix["included"])
    for line in grouped({**not_fetched(source), **checkpoint.left_out}):
        click.echo(f"prepare: not copied to the result: {line}")
    if named := own_code(directory):
        instead = (
            "is used (model.remote_code)"
            if source.remote_code
            else f"is not used; transformers' {named[0]} replaces it"
        )
        click.echo(f"prepare: custom model code ({named[1]}) {instead}")
    for line in _absorbed(checkpoint):
        click.echo(f"prepare: {line}")
    if beyond := ids_beyond(tokenizer, checkpoint.vocabulary):
        click.echo(
            f"prepare: the tokenizer has tokens without an embedding in the model ({beyond}); a text"
            " with such a token is refused"
        )
    told = f"{checkpoint.parameters:,} parameters, {prunable:,} of them prunable in {entry.depth} blocks"
    return f"{entry.family}, {told}; {selection}"


def _verified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with only those couplings that hold on its own weights."""
    model, layouts = BlockModel(checkpoint, torch.float32, runtime.compute()), []
    for index, (layout, failed) in enumerate(
        track(verified(model), "prepare, couplings", "blocks", checkpoint.architecture.depth)
    ):
        layouts.append(layout)
        if failed:
            click.echo(
                f"prepare: block {index}: {', '.join(failed)} would change the block's outputs and is"
                " not used"
            )
    return replace(checkpoint, architecture=with_layouts(checkpoint.architecture, layouts))


def _absorbed(checkpoint: Checkpoint) -> Iterator[str]:
    """Lines on the couplings and on parameters that are in no matrix."""
    layouts = checkpoint.architecture.layouts
    for kind in dict.fromkeys(layouts):
        names = [coupling.name for coupling in kind.couplings if not coupling.name.startswith("expert_")]
        experts = len(
            {site.name for site in kind.sites if site.pool is not None and site.pool.endswith("input")}
        )
        fixed = [site.name for site in kind.sites if site.coupling is None and site.pool is None]
        told = [f"{layouts.count(kind)} of {len(layouts)} blocks: couplings {', '.join(names) or 'none'}"]
        told += [f"inputs of {', '.join(fixed)} cannot be scaled"] if fixed else []
        told += (
            [f"{experts} experts with separate matrices; never pruned: {', '.join(sorted(kind.routers))}"]
            if experts
            else []
        )
        yield "; ".join(told)
    if left := checkpoint.uncovered():
        yield (
            f"{checkpoint.coverage:.1%} of the blocks' weights are in matrices; in no matrix:"
            f" {', '.join(left)}"
        )
    if checkpoint.unread:
        yield (
            f"{len(checkpoint.unread)} tensors that do not process text are copied unchanged,"
            f" {min(checkpoint.unread)} for example"
        )


def _matrices(checkpoint: Checkpoint, source: ModelParams) -> tuple[list[dict[str, Any]], Selection]:
    """Every logical matrix, with the parameter that holds it, and whether ``model.include`` and
    ``.exclude`` take it.
    """
    entry = checkpoint.architecture
    places = list(entry.places())
    pruned = {checkpoint.block_prefix(block) + matrix.parameter for block, matrix in places}
    never = [
        full
        for full, pieces in checkpoint.pieces.items()
        if not pruned.intersection(piece.stored for piece in pieces)
    ]
    selection = select(
        [checkpoint.aliases(*place) for place in places], source.include, source.exclude, never
    )
    matrices = []
    for (block, matrix), kept in zip(places, selection.included, strict=True):
        parameter, shape = (
            checkpoint.block_prefix(block) + matrix.parameter,
            list(checkpoint.matrix_shape(block, matrix)),
        )
        facts = {
            "name": entry.matrix_name(block, matrix),
            "block": block,
            "label": matrix.label,
            "kind": matrix.kind,
        }
        facts["names"] = list(checkpoint.aliases(block, matrix))
        scaled = entry.layouts[block].site(matrix.site).coupling
        matrices.append(
            facts | {"shape": shape, "included": kept, "inputs_scaled_by": scaled, "parameter": parameter}
        )
    return matrices, selection
