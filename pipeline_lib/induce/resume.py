"""Finished blocks of an induction run, kept where a kill does not reach them."""

from pathlib import Path

from pipeline_lib.induce.induce import Outcome
from pipeline_lib.models.transform import read_transforms, write_transforms


def _file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:03d}.safetensors"


def keep(directory: Path, index: int, outcome: Outcome) -> None:
    """Store one block's outcome."""
    write_transforms(_file(directory, index), {0: outcome.transform}, outcome.facts() | {"curve": outcome.curve})


def kept(directory: Path, index: int) -> Outcome | None:
    """A finished block's outcome, equal to the last bit, or None."""
    if not _file(directory, index).exists():
        return None
    (transform,), facts = read_transforms(_file(directory, index), 1)
    return Outcome(transform=transform, **facts)
