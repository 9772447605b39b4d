"""Finished blocks of an induction run, stored so that they survive a kill."""

from pathlib import Path

from pipeline_lib.core.artifacts import block_file
from pipeline_lib.core.kept import Kept
from pipeline_lib.induce.induce import Outcome
from pipeline_lib.models.transform import read_transforms, write_transforms


def keep(kept: Kept, index: int, outcome: Outcome) -> None:
    """Store one block's outcome."""
    path = _file(kept, index)
    write_transforms(path, {0: outcome.transform}, outcome.facts() | {"curve": outcome.curve})
    kept.finish(index, [path])


def finished(kept: Kept, index: int) -> Outcome | None:
    """The stored outcome of a block, equal to the last bit, or None."""
    if not kept.finished(index):
        return None
    (transform,), facts = read_transforms(_file(kept, index), 1)
    return Outcome(transform=transform, **facts)


def _file(kept: Kept, index: int) -> Path:
    return block_file(kept.directory, index)
