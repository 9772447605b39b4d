"""Write a pruned variant in the requested formats, and record their sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core.artifacts import replacing, write_json, write_text
from pipeline_lib.core.progress import Progress
from pipeline_lib.export import bitmask, dense, gguf, manifest, packed
from pipeline_lib.export.card import FILE
from pipeline_lib.export.groups import Quantisation
from pipeline_lib.export.masks import Masks
from pipeline_lib.export.semi_structured import summary as semi_structured
from pipeline_lib.export.shards import one_by_one, partition
from pipeline_lib.export.sizes import Bytes, summary
from pipeline_lib.export.survey import Entry, survey
from pipeline_lib.export.tensorfile import Blob
from pipeline_lib.fit import grids
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.recipe.settings import Format

# passes over all tensors, besides the survey's
PASSES = {"dense": 1, "bitmask": 2, "compressed-tensors": 1, "gguf": 2}
Card = Callable[[str, Mapping[str, Any]], str]  # format, content of build/sizes -> README.md


@dataclass(frozen=True)
class _Counted(Checkpoint):
    """A checkpoint that counts the tensors that are read from it."""

    progress: Progress

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for item in super().read(names):
            yield item
            self.progress.advance()


@dataclass(frozen=True)
class Variant:
    """A variant after pruning."""

    name: str
    pattern: str  # of its selection
    directory: Path  # its masks, its checkpoint, and its scales if it is quantised
    trained: Path | None = None  # the trained checkpoint, which replaces that one; its scales lie beside it


def export(
    source: Checkpoint, variant: Variant, out: Path, formats: Sequence[Format], card: Card
) -> dict[str, Any]:
    """Write the variant in each format. Returns the content of build/sizes for it.

    Args:
        source: the original model; exported files have the same partition into files.
        out: a directory with one folder per format, and semi_structured.json for a 2:4 pattern.
        card: writes each folder's README.md.

    Raises:
        SparselineError: a format cannot express the variant, or the variant does not match its
            masks and codes.
    """
    left = variant.trained or variant.directory / "checkpoint"
    pruned = open_checkpoint(left, source.architecture, source.remote_code)
    quantisation = Quantisation(left.parent / grids.FOLDER, pruned)
    # Refuses before anything is written.
    scheme = packed.scheme(pruned, quantisation, variant.name) if "compressed-tensors" in formats else None
    file = gguf.scheme(pruned, quantisation, variant.name) if "gguf" in formats else None
    total = len(pruned.files) * (1 + sum(PASSES[name] for name in formats))
    with Progress(f"export {variant.name}", total, "tensors") as progress:
        counted = _Counted(**pruned.__dict__, progress=progress)
        entries = survey(counted, Masks(variant.directory / "masks", counted), quantisation, variant.pattern)
        writer = _Writer(counted, quantisation, entries, partition(source), source.indexed)
        with replacing(out) as directory:
            directory.mkdir()
            found = {"dense": writer.write_dense(directory / "dense" if "dense" in formats else None)}
            if "bitmask" in formats:
                found["bitmask"] = writer.write_bitmask(directory / "bitmask")
            if scheme is not None:
                found["compressed-tensors"] = writer.write_packed(directory / "compressed-tensors", scheme)
            if file is not None:
                found["gguf"] = writer.write_gguf(directory / "gguf", file, variant.name)
            if variant.pattern == "2:4":
                verdicts = {
                    name: entry.semi_structured
                    for name, entry in writer.matrices.items()
                    if entry.semi_structured is not None
                }
                write_json(directory / "semi_structured.json", semi_structured(verdicts))
            sizes = summary([entry.weights for entry in writer.matrices.values()], found)
            for name in formats:
                write_text(directory / name / FILE, card(name, sizes))
            if "bitmask" in formats:
                manifest.add(directory / "bitmask", FILE)
    return sizes


@dataclass(frozen=True)
class _Writer:
    """Writes a pruned checkpoint in each format, and returns the bytes of its matrices and of its
    weight files.
    """

    pruned: Checkpoint
    quantisation: Quantisation
    entries: Mapping[str, Entry]  # of every tensor
    shards: Mapping[str, list[str]]  # file name -> its tensors
    indexed: bool  # whether there is an index of files

    @property
    def others(self) -> dense.Others:
        return self.pruned.path, self.pruned.others

    @property
    def matrices(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self.entries.items() if entry.pruned}

    @property
    def blobs(self) -> dict[str, dict[str, Blob]]:
        return {
            file: {name: self.entries[name].dense for name in names} for file, names in self.shards.items()
        }

    def write_dense(self, folder: Path | None) -> Bytes:
        """Write the dense format; without a folder, only return its size."""
        if folder is not None:
            dense.write(
                folder,
                self.blobs,
                lambda file: one_by_one(self.pruned, self.shards[file]),
                self.others,
                self.indexed,
            )
        return Bytes(sum(entry.dense.bytes for entry in self.matrices.values()), dense.file_bytes(self.blobs))

    def write_bitmask(self, folder: Path) -> Bytes:
        plans = {
            file: {name: self.entries[name].bitmask for name in names} for file, names in self.shards.items()
        }
        bitmask.write(folder, plans, self.pruned, self.quantisation, self.others, self.indexed)
        return Bytes(sum(entry.bitmask.bytes for entry in self.matrices.values()), _file_bytes(folder))

    def write_packed(self, folder: Path, scheme: packed.Scheme) -> Bytes:
        packed.write(folder, self.blobs, self.pruned, self.quantisation, scheme, self.indexed)
        parts = packed.layout(
            {name: {name: entry.dense} for name, entry in self.matrices.items()}, self.quantisation
        )
        return Bytes(
            sum(blob.bytes for blobs in parts.values() for blob in blobs.values()), _file_bytes(folder)
        )

    def write_gguf(self, folder: Path, chosen: gguf.Scheme, title: str) -> Bytes:
        gguf.write(folder, self.pruned, self.quantisation, chosen, title)
        return Bytes(chosen.bytes(self.matrices), (folder / gguf.FILE).stat().st_size)


def _file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
