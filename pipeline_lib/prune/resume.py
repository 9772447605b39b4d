"""Finished blocks of a pruning run, stored so that they survive a kill, and published by one rename
when all are finished.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core import artifacts
from pipeline_lib.core.kept import Kept
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.fit import grids
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter
from pipeline_lib.prune.window import Block
from pipeline_lib.solve.settings import QuantizationParams


def _place(source: Path, target: Path) -> None:
    """Place a file as a hard link, or as a copy if links are impossible. A link copies nothing, and
    a kill loses nothing until the scratch directory is deleted.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


PARTS = ("checkpoint", "masks", grids.FOLDER, "facts")


class FinishedBlocks:
    """Blocks as files: ``checkpoint/`` (one shard per block), ``masks/``, ``quantization/`` with
    quantisation, and ``facts/``.
    """

    def __init__(self, kept: Kept, source: Checkpoint, quantization: QuantizationParams) -> None:
        self.kept, self.directory = kept, kept.directory
        self.source = source
        self.quantization = quantization
        self.writer = ShardWriter(source, self.directory / "checkpoint")

    def _facts(self, index: int) -> Path:
        return self.directory / "facts" / f"block-{index:03d}.json"

    def finished(self, index: int) -> dict[str, torch.Tensor] | None:
        """A finished block's stored tensors, or None."""
        return self.writer.read(index) if self.kept.finished(index) else None

    def done(self) -> int:
        """Number of finished blocks."""
        return sum(map(self.kept.finished, range(self.source.architecture.depth)))

    def keep(self, index: int, result: Block) -> None:
        self.writer.write(index, result.tensors)
        prefix = self.source.block_prefix(index)
        packed = result.masks.packed()
        shapes = {prefix + name: list(shape) for name, (_, shape) in packed.items()}
        masks = {prefix + name: bits for name, (bits, _) in packed.items()}
        written = [
            self.writer.shard(index),
            artifacts.block_file(self.directory / "masks", index),
            self._facts(index),
        ]
        artifacts.write_tensors(written[1], masks, {"shapes": shapes})
        if self.quantization.bits is not None:
            written.append(artifacts.block_file(self.directory / grids.FOLDER, index))
            grids.write(written[-1], result.grids)
        by_label = {matrix.label: matrix for matrix in self.source.architecture.layouts[index].matrices}
        weights = [
            by_label[label].view(result.tensors[by_label[label].parameter])
            for label in result.facts["matrices"]
        ]
        left = torch.stack([weight.count_nonzero() for weight in weights]).tolist() if weights else []
        for (label, facts), weight, count in zip(
            result.facts["matrices"].items(), weights, left, strict=True
        ):
            matrix = by_label[label]
            # quantisation may round further weights to zero
            facts["zeros"] = weight.numel() - count
            # counted in the stored mask
            facts["kept"] = int(matrix.view(result.masks[matrix.parameter]).count_nonzero())
        artifacts.write_json(self._facts(index), result.facts)
        self.kept.finish(index, written)

    def publish(self, workspace: Workspace, out: Path) -> dict[int, Any]:
        """Complete the checkpoint, move it with its masks and grids to ``out``, and return every
        block's facts.
        """
        facts = {
            index: artifacts.read_json(self._facts(index)) for index in range(self.source.architecture.depth)
        }
        self.writer.finish()
        with workspace.directory(out, self.kept.digests()) as temporary:
            for part in (
                "checkpoint",
                "masks",
                *([grids.FOLDER] if self.quantization.bits is not None else []),
            ):
                (temporary / part).mkdir()
                # side files may lie in a subdirectory
                for path in sorted((self.directory / part).rglob("*")):
                    target = temporary / path.relative_to(self.directory)
                    target.mkdir() if path.is_dir() else _place(path, target)
        return facts
