"""The masks of ``prune``, read one block at a time."""

from functools import lru_cache
from pathlib import Path

import torch

from pipeline_lib.core import artifacts
from pipeline_lib.export.bits import unpack
from pipeline_lib.models.checkpoint import Checkpoint


class Masks:
    """The folder ``masks/`` beside a pruned checkpoint."""

    def __init__(self, directory: Path, checkpoint: Checkpoint) -> None:
        self._directory = directory
        self._place = checkpoint.place
        # block -> stored parameter -> mask (bool, True = kept)
        self.block = lru_cache(maxsize=1)(self._read)

    def of(self, name: str) -> torch.Tensor | None:
        """The mask of a stored parameter (bool, True = kept), if it was pruned."""
        place = self._place(name)
        return None if place is None else self.block(place[0]).get(name)

    def _read(self, block: int) -> dict[str, torch.Tensor]:
        tensors, facts = artifacts.read_tensors(artifacts.block_file(self._directory, block))
        found = {}
        for name, bits in tensors.items():
            shape = torch.Size(facts["shapes"][name])
            found[name] = unpack(bits, 1, shape.numel()).view(torch.bool).reshape(shape)
        return found
