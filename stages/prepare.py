"""Find the model, check it, and record what it is: the facts that every later stage's key hangs on."""

import fnmatch
import math
from pathlib import Path
from typing import Any

import click

from pipeline_lib.core import artifacts, environment, params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.export.sizes import Bytes, Weights, summary
from pipeline_lib.models.checkpoint import locate, open_checkpoint
from pipeline_lib.models.source import ModelParams
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.transforms.transform import write_transforms

OUT = Path("build/prepare")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage("prepare", OUT / "model.json") as tell:
        settings = params.load(ModelParams, "model")
        directory = locate(settings.path, settings.id, settings.revision)
        checkpoint = open_checkpoint(directory)
        load_tokenizer(directory, checkpoint.config.vocab_size)
        entry = checkpoint.architecture
        matrices: list[dict[str, Any]] = []
        parameters: dict[str, int] = {}  # that hold an included matrix -> weights
        for block in range(entry.depth):
            for matrix in entry.matrices:
                name = entry.matrix_name(block, matrix)
                kept = any(fnmatch.fnmatch(name, p) for p in settings.include) and not any(
                    fnmatch.fnmatch(name, p) for p in settings.exclude
                )
                shape = list(checkpoint.matrix_shape(block, matrix))
                matrices.append(
                    {"name": name, "block": block, "label": matrix.label, "kind": matrix.kind, "shape": shape, "included": kept}
                )
                if kept:
                    parameter = checkpoint.block_prefix(block) + matrix.parameter
                    parameters[parameter] = math.prod(checkpoint.shapes[parameter])
        if not any(matrix["included"] for matrix in matrices):
            raise SparselineError("params.yaml: model.include and model.exclude leave no matrix to prune; widen include.")
        files = sorted(
            {*checkpoint.files.values(), *(p.name for p in directory.iterdir() if p.suffix in {".json", ".txt", ".model", ".jinja"})}
        )
        facts = {
            "path": str(settings.path),
            "id": settings.id,
            "revision": settings.revision,
            "family": entry.family,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
            "parameters": checkpoint.parameters,
            "versions": artifacts.read_json(environment.FILE),
            "sha256": {name: artifacts.sha256(directory / name) for name in track(files, "prepare, hashes", "files")},
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
        tell(f"prepare: {entry.family}, {checkpoint.parameters:,} parameters, {prunable:,} of them prunable in {entry.depth} blocks")


if __name__ == "__main__":
    main()
