"""The objects of pruning: blocks while they are pruned, the streams before them, and a window of
consecutive blocks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch

from pipeline_lib.core import ranks
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.fit.fit import Pairs
from pipeline_lib.masks.bits import BitMasks
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.models.architecture import Layout, Matrix
from pipeline_lib.models.stream import BlockModel, Stream
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.collect import Reference
from pipeline_lib.solve.grid import Grid

# the message for a mask that keeps a wrong number of weights
NO_SCORES = "The scores of {} contain NaN or infinity; check the model, or compute in float32."
NOTES = ("curvatures", "rules", "grids")  # the attributes of a block that are keyed by matrix


@dataclass
class Block:
    """One block during pruning. The transform's factors are folded into ``tensors``; its other
    parts go into masks and biases.
    """

    layout: Layout
    where: str  # its name in the model
    transform: Transform
    kept: Mapping[Matrix, int]  # how many weights each included matrix keeps
    tensors: dict[str, torch.Tensor]  # every parameter
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # dtypes in the checkpoint
    # parameter -> bool, True = kept, in the checkpoint's orientation
    masks: BitMasks = field(default_factory=BitMasks)
    # Per matrix: kept, size, layer error, damping (within ``settling``, some are tensors). Per step
    # that fitted the block: its errors.
    facts: dict[str, Any] = field(default_factory=lambda: {"matrices": {}})
    # statistics from which a later step recomputes scores
    curvatures: dict[Matrix, Curvature] = field(default_factory=dict)
    rules: dict[Matrix, Rule] = field(default_factory=dict)  # the rules that chose the masks
    grids: dict[Matrix, Grid] = field(default_factory=dict)  # the grids of quantised matrices
    # conditions [] that must hold, and the error message for each
    checks: list[tuple[torch.Tensor, str]] = field(default_factory=list)

    # guards parameters that several threads may copy
    lock: Lock = field(default_factory=Lock)

    def apart(self) -> "Block":
        """The same block, with the same tensors and masks, but with its own notes, facts and checks."""
        notes: dict[str, Any] = {name: {} for name in NOTES}
        return replace(self, facts={"matrices": {}}, checks=[], **notes)

    def join(self, other: "Block") -> None:
        """Take over the notes, facts and checks of a block from ``apart``."""
        for name in NOTES:
            getattr(self, name).update(getattr(other, name))
        self.facts["matrices"].update(other.facts["matrices"])
        self.checks += other.checks

    @property
    def sites(self) -> list[str]:
        """The sites of its included matrices, in order."""
        wanted = {matrix.site for matrix in self.kept}
        return [site.name for site in self.layout.sites if site.name in wanted]

    def ahead(self, site: str, alone: bool, budget: float = math.inf) -> list[str]:
        """The sites whose statistics are collected in one pass: this one and later ones.

        Args:
            alone: collect only this site and, for an expert's site, those of the other experts of
                its layer.
            budget: bytes for Gram matrices of experts; at least one is collected.
        """
        pool, used = self.layout.site(site).pool, 0.0
        names: list[str] = []
        for name in self.sites[self.sites.index(site) :]:
            entry = self.layout.site(name)
            if alone and name != site and (pool is None or entry.pool != pool):
                continue
            if entry.pool is not None:
                used += 2 * 4 * len(entry.index) ** 2  # the total, and one lane's sum
                if used > budget and names:
                    continue
            names.append(name)
        return names

    def consumers(self, site: str) -> list[Matrix]:
        """The included matrices of a site."""
        return [matrix for matrix in self.layout.consumers(site) if matrix in self.kept]

    def take(self, matrix: Matrix, mask: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Store a matrix's mask [R, C]. Replace the matrix's parameter by a copy, in this dtype,
        whose weights may be changed.
        """
        name = matrix.parameter
        with self.lock:  # another matrix may be in the same parameter
            if name not in self.masks:
                self.tensors[name] = self.tensors[name].to(dtype, copy=True)
            whole = self.masks.get(name)
            if whole is None:
                whole = torch.ones(self.tensors[name].shape, dtype=torch.bool, device=mask.device)
            matrix.view(whole).copy_(mask)
            self.masks[name] = whole

    def made(self, matrix: Matrix) -> "Made":
        """Result of pruning a matrix, for other processes."""
        return Made(
            matrix.view(self.tensors[matrix.parameter]),
            matrix.view(self.masks[matrix.parameter]),
            None if matrix.bias is None else matrix.bias_view(self.tensors[matrix.bias]),
            self.facts["matrices"][matrix.label],
            self.curvatures.get(matrix),
            self.rules.get(matrix),
            self.grids.get(matrix),
        )

    def put(self, matrix: Matrix, made: "Made") -> None:
        """Store another process's result for a matrix."""
        self.take(matrix, made.mask, made.weight.dtype)
        matrix.view(self.tensors[matrix.parameter]).copy_(made.weight)
        if matrix.bias is not None and made.bias is not None:
            self.tensors[matrix.bias] = self.tensors[matrix.bias].clone()
            matrix.bias_view(self.tensors[matrix.bias]).copy_(made.bias)
        self.facts["matrices"][matrix.label] = made.facts
        if made.curvature is not None:
            self.curvatures[matrix] = made.curvature
        if made.rule is not None:
            self.rules[matrix] = made.rule
        if made.grid is not None:
            self.grids[matrix] = made.grid

    def deal(self, sites: Sequence[str]) -> "Dealt":
        """Assign the matrices of these sites to the stage's processes, by their cost rows ·
        columns².
        """
        costs = {
            matrix: matrix.view(self.tensors[matrix.parameter]).numel() * len(self.layout.site(site).index)
            for site in sites
            for matrix in self.consumers(site)
        }
        return Dealt(self, tuple(sites), ranks.deal(costs))

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Keep results on the device and postpone checks within this context, so that a step does
        not wait for the device.

        At the end, one transfer reads all of them. If a step fails earlier, a failed check is
        raised in its place, because it came first.

        Raises:
            SparselineError: one of the ``checks`` fails.
        """
        try:
            yield
        except SparselineError:
            self._settle()
            raise
        self._settle()

    def _settle(self) -> None:
        checks, self.checks = self.checks, []
        matrices = self.facts["matrices"].values()
        places = [
            (facts, key)
            for facts in matrices
            for key, value in facts.items()
            if isinstance(value, torch.Tensor)
        ]
        waiting = [good for good, _ in checks] + [facts[key] for facts, key in places]
        read = torch.stack([value.double() for value in waiting]).tolist() if waiting else []
        for (_, message), good in zip(checks, read, strict=False):
            if not good:
                raise SparselineError(message)
        for (facts, key), value in zip(places, read[len(checks) :], strict=True):
            facts[key] = value


@dataclass(frozen=True)
class Dealt:
    """Matrices of a block whose statistics are collected together, and the process that prunes each."""

    block: Block
    ahead: Sequence[str]  # their sites
    owners: Mapping[Matrix, int]
    _done: list[str] = field(default_factory=list)

    def take(self, site: str) -> list[Matrix]:
        """Mark a site as taken, and return its matrices that this process prunes."""
        self._done.append(site)
        return [matrix for matrix in self.block.consumers(site) if self.owners[matrix] == ranks.rank()]

    def sites(self) -> dict[str, list[int]]:
        """For each site, the processes that need its statistics."""
        found: dict[str, set[int]] = {}
        for matrix, owner in self.owners.items():
            found.setdefault(matrix.site, set()).add(owner)
        return {site: sorted(found[site]) for site in self.block.sites if site in found}

    def copy(self) -> None:
        """Replace the parameters by copies, which may be changed."""
        tensors = self.block.tensors
        tensors |= {name: tensors[name].clone() for name in {matrix.parameter for matrix in self.owners}}

    def share(self) -> None:
        """Give every process the owners' results for the sites that were taken."""
        block = self.block
        for matrix, owner in self.owners.items() if ranks.count() > 1 else ():
            if matrix.site in self._done:
                made = ranks.broadcast(block.made(matrix) if owner == ranks.rank() else None, owner)
                if owner != ranks.rank() and made is not None:
                    block.put(matrix, made)
        maps: tuple[dict[Matrix, Any], ...] = (block.curvatures, block.rules, block.grids)
        for matrix in [matrix for site in self._done for matrix in block.consumers(site)]:
            for known in maps:  # the same order in every process
                if matrix in known:
                    known[matrix] = known.pop(matrix)


@dataclass(frozen=True)
class Made:
    """Result of pruning one matrix."""

    weight: torch.Tensor  # [R, C]
    mask: torch.Tensor  # [R, C] bool
    bias: torch.Tensor | None  # [R]
    facts: dict[str, Any]
    curvature: Curvature | None
    rule: Rule | None
    grid: Grid | None


@dataclass(frozen=True)
class Streams:
    """Hidden states before a window. Batches with an index below ``cut`` are the training split,
    the others the held-out split. Each batch belongs to one lane.
    """

    pruned: Stream
    dense: Stream | None  # the dense model's hidden states at the same depth; None if no step needs them
    cut: int
    seen: Sequence[Sequence[int]]  # per lane, the indices of its batches that enter statistics

    def pairs(self) -> tuple[Pairs, Pairs]:
        """Training and held-out pairs: inputs from the pruned stream before the window, targets
        from the dense stream after it.
        """
        if self.dense is None:
            raise ValueError("fitting needs the dense activations")
        inputs, targets = self.pruned.hidden, self.dense.hidden
        return Pairs(inputs[: self.cut], targets[: self.cut]), Pairs(inputs[self.cut :], targets[self.cut :])


@dataclass(frozen=True)
class Window:
    """Consecutive blocks that a step changes in place."""

    model: BlockModel
    blocks: Mapping[int, Block]
    # The pruned stream is before the first block. The dense stream is there too while masks are
    # chosen, and later after the last block. None: no text is read.
    streams: Streams | None
    reference: Reference | None = None  # the block before pruning, while masks of a single block are chosen

    @property
    def rows(self) -> Streams:
        """The streams, for a step that needs them.

        Raises:
            ValueError: there is no text.
        """
        if self.streams is None:
            raise ValueError("this step needs calibration samples")
        return self.streams
