"""Prune a model by a recipe, through the library's own functions, in memory. What the recipes of
one seed share is measured once.
"""

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.testbed import Bed, Tensors
from pipeline_lib.allocate.budget import Unit
from pipeline_lib.allocate.methods import counts as allocate
from pipeline_lib.allocate.settings import CURVES, SENSITIVITIES
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import block_file, read_tensors
from pipeline_lib.core.params import Params
from pipeline_lib.induce.gate import Gate
from pipeline_lib.induce.induce import induce_block
from pipeline_lib.induce.scale import shifts, starting_factors
from pipeline_lib.induce.settings import ScaleParams
from pipeline_lib.measure import fisher
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.curves import measure
from pipeline_lib.measure.estimate import estimates
from pipeline_lib.measure.fisher import OutputMoments
from pipeline_lib.measure.settings import CurvesParams, SensitivityParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.run import Finished, Rows, Source, prune
from pipeline_lib.prune.window import Block
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.moments import SiteStatistics
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import walk

Changes = Mapping[str, Any]
Entries = dict[str, dict[str, Any]]
Kept = dict[tuple[int, Matrix], int]
SECTIONS: dict[str, type[Params]] = {
    "calibrate": CalibrateParams,
    "scale": ScaleParams,
    "sensitivity": SensitivityParams,
    "curves": CurvesParams,
}


@functools.cache
def section(name: str) -> Any:
    """A section of params.yaml; its content must not be changed."""
    return params.section(name)


@functools.cache
def settings(name: str) -> Any:
    """One of ``SECTIONS``, parsed."""
    return params.parse(SECTIONS[name], section(name), name)


def recipe(changes: Changes, variant: str | None = None) -> Recipe:
    """The recipe of section ``prune`` of params.yaml, overridden by a variant, and then by these
    changes.

    Raises:
        ValueError: the variant has a section ``curves`` of its own, which is not supported here.
    """
    merged = params.merge(
        section("prune"), params.merge(section(f"variants.{variant}") if variant else {}, changes)
    )
    if merged.get("curves"):
        raise ValueError(
            f"variants.{variant} has a section `curves`; here curves are measured as section `curves` says"
        )
    learned = merged.get("induce")
    induce = None if learned is None else params.merge(section("induce"), learned)
    return Recipe.model_validate(
        {name: merged[name] for name in Recipe.model_fields if name != "induce"} | {"induce": induce}
    )


@dataclass
class Run:
    """A pruned model."""

    blocks: dict[int, Block]
    # of pruning, induction included, and of all that its allocation reads; statistics that only
    # induction reads are not counted
    wall_s: float

    @property
    def tensors(self) -> Tensors:
        return {index: block.tensors for index, block in self.blocks.items()}


class Lab:
    """A model with calibration rows, and the measurements on them."""

    def __init__(self, bed: Bed, depth: int | None = None) -> None:
        """``depth``: prune so many of the first blocks, and leave the others dense; None: all."""
        self.bed, self.depth = bed, depth
        self.text: tuple[str, int, int, int] | None = None
        self.shared: dict[Any, tuple[Any, float]] = {}

    def at(self, source: str, count: int, seed: int, training: int = 0) -> "Lab":
        """Use these calibration rows, and so many more for training. Measurements on other rows are
        dropped.
        """
        asked = source, count, seed, training
        if self.text != asked:
            self.text, self.rows = asked, self.bed.calibration(*asked)
            self.forget()
        return self

    def forget(self) -> None:
        self.shared = {}

    def run(self, asked: Recipe) -> Run:
        if asked.induce:
            self.statistics()
        kept, seconds = self.allocated(asked)
        started = time.perf_counter()
        blocks = dict(self.blocks(asked, kept))
        return Run(blocks, seconds + time.perf_counter() - started)

    def blocks(
        self, asked: Recipe, kept: Kept, finished: Finished = lambda _: None
    ) -> Iterator[tuple[int, Block]]:
        """The pruned blocks that are not yet finished, one after the other."""
        model, steps = self.bed.stream(), plan(asked, self.bed.checkpoint.dtype)
        rows = Rows.of(self.rows, asked) if steps.needs.text else None
        blocks = prune(Source(model, self.transforms(asked, kept), kept), rows, steps, finished)
        return itertools.islice(blocks, self.depth)

    def transforms(self, asked: Recipe, kept: Kept) -> list[Transform]:
        """The results of the stages scale and induce."""
        entry, selection = self.bed.checkpoint.architecture, asked.selection
        if asked.induce is None:
            return [Transform()] * entry.depth
        start: ScaleParams = settings("scale")
        compensate = "obs" in asked.reconstruction.steps
        gate = Gate(self.bed.stream(), self.rows["held_out"], asked.batch_rows, selection, compensate)
        learned = []
        for index, dense in enumerate(self.dense()):
            counts = {matrix: kept[index, matrix] for matrix in dense.layout.matrices}
            factors = starting_factors(dense.layout, dense.tensors, dense.statistics, start)
            given = Transform(factors, shifts(dense.layout, dense.statistics, start))
            error_of = gate.enter(index, dense, counts)
            learned.append(induce_block(dense, counts, given, selection, asked.induce, error_of).transform)
        return learned

    def dense(self) -> Iterator[DenseBlock]:
        """The dense model's blocks with their statistics."""
        entry = self.bed.checkpoint.architecture
        for index, sites in enumerate(self.statistics()[0]):
            yield DenseBlock(
                entry.layouts[index], f"{entry.blocks}.{index}", self.bed.checkpoint.block(index), sites
            )

    def allocated(self, asked: Recipe) -> tuple[Kept, float]:
        """Numbers of kept weights, and the wall seconds of the measurements behind them."""
        entries, seconds = self.measured(asked)
        return self.counts(asked, entries), seconds

    def counts(self, asked: Recipe, entries: Entries) -> Kept:
        """Numbers of kept weights by these measurements."""
        entry, pattern = self.bed.checkpoint.architecture, asked.selection.shape
        depth = entry.depth if self.depth is None else self.depth
        places = [(index, matrix) for index, matrix in entry.places() if index < depth]
        units = []
        for index, matrix in places:
            name, shape = entry.matrix_name(index, matrix), self.bed.checkpoint.matrix_shape(index, matrix)
            units.append(Unit(name, index, shape[0] * shape[1], pattern.quantum(name, shape)))
        kept = allocate(units, asked.selection.overall, asked.allocation, entries)
        return dict(zip(places, kept, strict=True))

    def measured(self, asked: Recipe) -> tuple[Entries, float]:
        """The measurements that the allocation reads, and the seconds that they took."""
        if asked.allocation.method in CURVES:
            _, first = self.statistics()
            _, second = self.sensitivities(moments=True)
            selection, compensate = asked.selection, "obs" in asked.reconstruction.steps
            # curves cover all sparsities
            key = (selection.model_copy(update={"sparsity": 0.5}).model_dump_json(), compensate)
            curves, third = self.once(key, lambda: self.curves(asked, compensate))
            return curves, first + second + third
        if asked.allocation.method in SENSITIVITIES:
            (entries, _), seconds = self.sensitivities(moments=False)
            return entries, seconds
        return {}, 0.0

    def once(self, key: Any, compute: Callable[[], Any]) -> tuple[Any, float]:
        """A shared result, and the seconds that it took."""
        if key not in self.shared:
            started = time.perf_counter()
            value = compute()
            self.shared[key] = value, time.perf_counter() - started
        return self.shared[key]

    def statistics(self) -> tuple[list[Mapping[str, SiteStatistics]], float]:
        """The result of stage calibrate, per block, and the seconds that it took."""

        def compute() -> list[Mapping[str, SiteStatistics]]:
            blocks = walk(
                self.bed.stream(), self.rows["fit"], self.rows["held_out"], settings("calibrate"), grams=True
            )
            return [sites for _, sites in itertools.islice(blocks, self.depth)]

        return self.once("statistics", compute)

    def sensitivities(self, moments: bool) -> tuple[tuple[Entries, list[dict[str, torch.Tensor]]], float]:
        """The result of stage sensitivity, and its seconds. The result has an entry per matrix
        name, and per block the output moments by label, if requested.
        """
        entry, how = self.bed.checkpoint.architecture, settings("sensitivity")
        matrices = {
            index: {entry.matrix_name(index, matrix): matrix for matrix in entry.layouts[index].matrices}
            for index in range(entry.depth)
        }

        def compute() -> tuple[Entries, list[dict[str, torch.Tensor]]]:
            subject = Subject(self.bed.stream(), self.rows["fit"], matrices)
            with tempfile.TemporaryDirectory() as folder:
                taken = OutputMoments(Path(folder), full=True) if moments else None

                def sample(probes: Any) -> Any:
                    return fisher.samples(subject, how, probes, taken)

                summary = list(estimates(sample, how.probes, how.probes_per_pass, how.agreement))[
                    -1
                ].summary()
                if taken is not None:
                    taken.finish(entry.depth)
                found = (
                    [read_tensors(block_file(Path(folder), index))[0] for index in range(entry.depth)]
                    if moments
                    else []
                )
            places = {
                name: {"block": index, "kind": m.kind}
                for index, named in matrices.items()
                for name, m in named.items()
            }
            return {name: {**values, **places[name]} for name, values in summary.items()}, found

        return self.once(("sensitivities", moments), compute)

    def curves(self, asked: Recipe, compensate: bool) -> Entries:
        """The result of stage curves."""
        (entries, moments), _ = self.sensitivities(moments=True)
        found: Entries = {}
        for index, dense in enumerate(self.dense()):
            block = measure(
                dense, dense.layout.matrices, moments[index], asked.selection, compensate, settings("curves")
            )
            found |= {
                f"{dense.where}.{label}": entries[f"{dense.where}.{label}"] | facts
                for label, facts in block.items()
            }
        return found
