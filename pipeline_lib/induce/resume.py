"""Finished blocks of an induction run, kept where a kill does not reach them."""

from pathlib import Path

from pipeline_lib.core.artifacts import read_tensors, write_tensors
from pipeline_lib.induce.induce import Outcome
from pipeline_lib.models.transform import read_transforms, write_transforms


def _files(directory: Path, index: int) -> tuple[Path, Path]:
    return directory / f"scores-{index:03d}.safetensors", directory / f"block-{index:03d}.safetensors"


def keep(directory: Path, index: int, outcome: Outcome) -> None:
    """Store one block's outcome; the transform with its facts is the last file."""
    scores, block = _files(directory, index)
    write_tensors(scores, {f"{kind}.{side}": sample for kind, pair in outcome.scores.items() for side, sample in enumerate(pair)})
    write_transforms(block, {0: outcome.transform}, outcome.facts() | {"curve": outcome.curve})


def kept(directory: Path, index: int) -> Outcome | None:
    """A finished block's outcome, equal to the last bit, or None."""
    scores, block = _files(directory, index)
    if not block.exists():
        return None
    (transform,), facts = read_transforms(block, 1)
    samples, _ = read_tensors(scores)
    kinds = {name.rpartition(".")[0] for name in samples}
    return Outcome(transform=transform, scores={kind: (samples[f"{kind}.0"], samples[f"{kind}.1"]) for kind in kinds}, **facts)
