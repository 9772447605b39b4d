"""Write a pruned variant in the formats asked for, and say what each takes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core.artifacts import replacing, write_json, write_text
from pipeline_lib.core.progress import Progress
from pipeline_lib.export import bitmask, dense, manifest, packed
from pipeline_lib.export.card import FILE
from pipeline_lib.export.groups import Quantisation
from pipeline_lib.export.masks import Masks
from pipeline_lib.export.semi_structured import summary as semi_structured
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.export.shards import one_by_one, partition
from pipeline_lib.export.sizes import Bytes, summary
from pipeline_lib.export.survey import survey
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint

PASSES = {"dense": 1, "bitmask": 2, "compressed-tensors": 1}  # over all tensors, beside the survey's
Card = Callable[[str, Mapping[str, Any]], str]  # format, what build/sizes will hold -> README.md


@dataclass(frozen=True)
class _Counted(Checkpoint):
    """A checkpoint whose readers are counted."""

    progress: Progress

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for item in super().read(names):
            yield item
            self.progress.advance()


def export(source: Checkpoint, prune: Path, out: Path, settings: ExportParams, pattern: str, variant: str, card: Card) -> dict[str, Any]:
    """What build/sizes holds of the variant.

    Args:
        source: the model that was pruned: exported files are cut where its files are.
        prune: what the prune stage left of the variant.
        out: a directory with one folder per format, and semi_structured.json for a 2:4 pattern.
        card: writes each folder's README.md.

    Raises:
        SparselineError: a format cannot express the variant; it is not what its masks and codes say.
    """
    pruned = open_checkpoint(prune / "checkpoint")
    quantisation = Quantisation(prune / "quantization", pruned)
    if "compressed-tensors" in settings.formats:
        packed.scheme(pruned, quantisation, variant)  # refuses before anything is written
    total = len(pruned.files) * (1 + sum(PASSES[name] for name in settings.formats))
    with Progress(f"export {variant}", total, "tensors") as progress:
        return _export(source, _Counted(**pruned.__dict__, progress=progress), quantisation, prune, out, settings, pattern, variant, card)


def _export(
    source: Checkpoint,
    pruned: Checkpoint,
    quantisation: Quantisation,
    prune: Path,
    out: Path,
    settings: ExportParams,
    pattern: str,
    variant: str,
    card: Card,
) -> dict[str, Any]:
    entries = survey(pruned, Masks(prune / "masks", pruned), quantisation, pattern)
    shards = partition(source)
    blobs = {file: {name: entries[name].dense for name in names} for file, names in shards.items()}
    others, indexed = (pruned.path, pruned.others), source.indexed
    matrices = {name: entry for name, entry in entries.items() if entry.pruned}
    formats = {"dense": Bytes(sum(entry.dense.bytes for entry in matrices.values()), dense.file_bytes(blobs))}
    with replacing(out) as directory:
        directory.mkdir()
        if "dense" in settings.formats:
            dense.write(directory / "dense", blobs, lambda file: one_by_one(pruned, shards[file]), others, indexed)
        if "bitmask" in settings.formats:
            plans = {file: {name: entries[name].bitmask for name in names} for file, names in shards.items()}
            bitmask.write(directory / "bitmask", plans, pruned, quantisation, others, indexed)
            formats["bitmask"] = Bytes(sum(entry.bitmask.bytes for entry in matrices.values()), _file_bytes(directory / "bitmask"))
        if "compressed-tensors" in settings.formats:
            folder = directory / "compressed-tensors"
            packed.write(folder, blobs, pruned, quantisation, variant, others, indexed)
            parts = packed.layout({name: {name: entry.dense} for name, entry in matrices.items()}, quantisation)
            formats["compressed-tensors"] = Bytes(
                sum(blob.bytes for found in parts.values() for blob in found.values()), _file_bytes(folder)
            )
        if pattern == "2:4":
            verdicts = {name: entry.semi_structured for name, entry in matrices.items() if entry.semi_structured is not None}
            write_json(directory / "semi_structured.json", semi_structured(verdicts))
        sizes = summary([entry.weights for entry in matrices.values()], formats)
        for name in settings.formats:
            write_text(directory / name / FILE, card(name, sizes))
        if "bitmask" in settings.formats:
            manifest.add(directory / "bitmask", FILE)
    return sizes


def _file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
