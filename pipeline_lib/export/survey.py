"""One pass over the tensors of a pruned checkpoint: their encodings in each format."""

from dataclasses import dataclass

import torch

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export.encoding import Plan, plan
from pipeline_lib.export.groups import Quantisation
from pipeline_lib.export.masks import Masks
from pipeline_lib.export.semi_structured import Verdict, verdict
from pipeline_lib.export.shards import one_by_one
from pipeline_lib.export.sizes import Weights
from pipeline_lib.export.tensorfile import Blob, blob
from pipeline_lib.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Entry:
    """Facts about one stored tensor."""

    dense: Blob
    bitmask: Plan
    weights: Weights
    pruned: bool  # prune stored a mask of it
    semi_structured: Verdict | None  # of pruned matrices of a 2:4 variant


def survey(pruned: Checkpoint, masks: Masks, quantisation: Quantisation, pattern: str) -> dict[str, Entry]:
    """Name -> entry, for the whole checkpoint; one tensor is in memory at a time.

    Raises:
        SparselineError: a 2:4 variant is not exactly 2:4, or a quantised one does not match its
            codes.
    """
    transposed = {
        pruned.block_prefix(block) + matrix.parameter
        for block, matrix in pruned.architecture.places()
        if matrix.transposed
    }
    found = {}
    for name, tensor in one_by_one(pruned, sorted(pruned.files)):
        mask, groups = masks.of(name), quantisation.of(name)
        judged = None
        if mask is not None and pattern == "2:4":
            judged = verdict(name, tensor, mask, name in transposed)
        bits = tensor.element_size() * 8 if groups is None else groups.bits
        if groups is not None:
            try:
                groups.codes(tensor)
            except ValueError as error:
                raise SparselineError(
                    f"{pruned.path}: {name}: {error}; prune the variant again, and change none of its files."
                ) from error
        weights = Weights(tensor.numel(), int(torch.count_nonzero(tensor)), bits)
        found[name] = Entry(blob(tensor), plan(tensor, groups), weights, mask is not None, judged)
    return found
