"""Find the model, check it, and record what it is."""

import math
from typing import Any

import click

from pipeline_lib.core import artifacts, environment, files
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.export.sizes import Bytes, Weights, summary
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint, remote_code
from pipeline_lib.models.files import grouped
from pipeline_lib.models.names import Selection, select
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import fetch, identity, not_fetched, recorded_files
from pipeline_lib.models.tokenizer import ids_beyond, load_tokenizer


def prepare(workspace: Workspace, source: ModelParams) -> str:
    """Facts about the model, its logical matrices, and what it takes; a sentence on it."""
    directory = fetch(source)
    checkpoint = open_checkpoint(directory)
    tokenizer = load_tokenizer(directory, checkpoint.config.vocab_size)
    entry = checkpoint.architecture
    matrices, selection = _matrices(checkpoint, source)
    parameters = {  # that hold an included matrix -> weights
        name: math.prod(checkpoint.shapes[name]) for name in dict.fromkeys(m["parameter"] for m in matrices if m["included"])
    }
    for matrix in matrices:
        del matrix["parameter"]
    facts = {
        "path": str(source.path),
        "id": source.id,
        "revision": source.revision,
        "family": entry.family,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "parameters": checkpoint.parameters,
        "versions": artifacts.read_json(environment.FILE),
        "sha256": {name: files.sha256(directory / name) for name in track(recorded_files(checkpoint), "prepare, hashes", "files")},
    }
    workspace.made_for(identity(facts["sha256"]), workspace.model)
    with workspace.directory(workspace.model.parent) as made:
        workspace.save(made / workspace.model.name, facts)
        artifacts.write_json(made / workspace.matrices.name, matrices)
    bits = 8 * checkpoint.dtype.itemsize
    size = Bytes(sum(parameters.values()) * bits // 8, sum((directory / name).stat().st_size for name in set(checkpoint.files.values())))
    weights = [Weights(total, total, bits) for total in parameters.values()]
    workspace.save(workspace.sizes(DENSE), summary(weights, {"dense": size}))
    prunable = sum(math.prod(matrix["shape"]) for matrix in matrices if matrix["included"])
    for line in grouped({**not_fetched(source), **checkpoint.left_out}):
        click.echo(f"prepare: not in any result: {line}")
    if remote := remote_code(directory):
        click.echo(f"prepare: code of the model's own ({remote[1]}) is never run; transformers' {remote[0]} takes its place")
    if beyond := ids_beyond(tokenizer, checkpoint.config.vocab_size):
        click.echo(f"prepare: the tokenizer has tokens that the model has no embedding for ({beyond}); a text that holds one is refused")
    told = f"{checkpoint.parameters:,} parameters, {prunable:,} of them prunable in {entry.depth} blocks"
    return f"{entry.family}, {told}; {selection}"


def _matrices(checkpoint: Checkpoint, source: ModelParams) -> tuple[list[dict[str, Any]], Selection]:
    """Every logical matrix, with the parameter that holds it, and whether ``model.include`` and ``.exclude`` take it."""
    entry = checkpoint.architecture
    places = list(entry.places())
    pruned = {checkpoint.block_prefix(block) + matrix.parameter for block, matrix in places}
    never = [full for full, name in checkpoint.names.items() if name not in pruned]
    selection = select([checkpoint.aliases(*place) for place in places], source.include, source.exclude, never)
    matrices = []
    for (block, matrix), kept in zip(places, selection.included, strict=True):
        parameter, shape = checkpoint.block_prefix(block) + matrix.parameter, list(checkpoint.matrix_shape(block, matrix))
        facts = {"name": entry.matrix_name(block, matrix), "block": block, "label": matrix.label, "kind": matrix.kind}
        matrices.append(facts | {"shape": shape, "included": kept, "parameter": parameter})
    return matrices, selection
