"""Find the model, check it, and record what it is: the facts that every later stage's key hangs on."""

import math
from pathlib import Path
from typing import Any

import click

from pipeline_lib.core import artifacts, environment, params, runtime
from pipeline_lib.core.progress import track
from pipeline_lib.export.sizes import Bytes, Weights, summary
from pipeline_lib.models.checkpoint import open_checkpoint, remote_code
from pipeline_lib.models.files import grouped
from pipeline_lib.models.names import select
from pipeline_lib.models.source import ModelParams, fetch, not_fetched, recorded_files
from pipeline_lib.models.tokenizer import ids_beyond, load_tokenizer
from pipeline_lib.models.transform import write_transforms

OUT = Path("build/prepare")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage("prepare", OUT / "model.json") as tell:
        settings = params.load(ModelParams, "model")
        directory = fetch(settings)
        checkpoint = open_checkpoint(directory)
        tokenizer = load_tokenizer(directory, checkpoint.config.vocab_size)
        entry = checkpoint.architecture
        places = [(block, matrix) for block in range(entry.depth) for matrix in entry.matrices]
        pruned = {checkpoint.block_prefix(block) + matrix.parameter for block, matrix in places}
        never = [full for full, name in checkpoint.names.items() if name not in pruned]
        selection = select([checkpoint.aliases(*place) for place in places], settings.include, settings.exclude, never)
        matrices: list[dict[str, Any]] = []
        parameters: dict[str, int] = {}  # that hold an included matrix -> weights
        for (block, matrix), kept in zip(places, selection.included, strict=True):
            name, shape = entry.matrix_name(block, matrix), list(checkpoint.matrix_shape(block, matrix))
            matrices.append({"name": name, "block": block, "label": matrix.label, "kind": matrix.kind, "shape": shape, "included": kept})
            if kept:
                parameter = checkpoint.block_prefix(block) + matrix.parameter
                parameters[parameter] = math.prod(checkpoint.shapes[parameter])
        facts = {
            "path": str(settings.path),
            "id": settings.id,
            "revision": settings.revision,
            "family": entry.family,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
            "parameters": checkpoint.parameters,
            "versions": artifacts.read_json(environment.FILE),
            "sha256": {name: artifacts.sha256(directory / name) for name in track(recorded_files(checkpoint), "prepare, hashes", "files")},
        }
        artifacts.write_json(OUT / "model.json", facts)
        artifacts.write_json(OUT / "matrices.json", matrices)
        write_transforms(OUT / "identity.safetensors", {})
        artifacts.write_json(OUT / "unmeasured.json", {})
        bits = 8 * checkpoint.dtype.itemsize
        size = Bytes(
            sum(parameters.values()) * bits // 8, sum((directory / name).stat().st_size for name in set(checkpoint.files.values()))
        )
        weights = [Weights(total, total, bits) for total in parameters.values()]
        artifacts.write_json(Path("build/sizes/dense.json"), summary(weights, {"dense": size}))
        prunable = sum(math.prod(matrix["shape"]) for matrix in matrices if matrix["included"])
        for line in grouped({**not_fetched(settings), **checkpoint.left_out}):
            click.echo(f"prepare: not in any result: {line}")
        if remote := remote_code(directory):
            click.echo(f"prepare: code of the model's own ({remote[1]}) is never run; transformers' {remote[0]} takes its place")
        if beyond := ids_beyond(tokenizer, checkpoint.config.vocab_size):
            click.echo(
                f"prepare: the tokenizer has tokens that the model has no embedding for ({beyond}); a text that holds one is refused"
            )
        told = f"{checkpoint.parameters:,} parameters, {prunable:,} of them prunable in {entry.depth} blocks"
        tell(f"prepare: {entry.family}, {told}; {selection}")


if __name__ == "__main__":
    main()
