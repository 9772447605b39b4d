"""Variants of params.yaml, and the part of a variant that each stage reads, which is the stage's key
in DVC.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline_lib.allocate.settings import AllocationParams
from pipeline_lib.core import params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.measure.settings import CurvesParams
from pipeline_lib.recipe.needs import Needs, needs
from pipeline_lib.recipe.settings import Format, InduceParams, PruneParams, Recipe
from pipeline_lib.solve.settings import QuantizationParams

OWN = ("induce", "curves", "distil")  # sections of a variant that override sections outside of ``prune``


class CurvesPart(Params):
    """The parameters of a variant that ``curves`` reads, without the sparsity."""

    selection: SelectionParams
    compensate: bool  # by the OBS sweep
    curves: CurvesParams


class AllocatePart(Params):
    """The parameters of a variant that ``allocate`` reads."""

    sparsity: float  # overall
    by_hand: list[tuple[str, float]]  # pattern, sparsity: the first match counts
    pattern: str
    allocation: AllocationParams


class InducePart(Params):
    """The parameters of a variant that ``induce`` reads; the budget comes from its allocation."""

    selection: SelectionParams
    compensate: bool
    induce: InduceParams


class DistilPart(Params):
    """The parameters of a variant that ``distil`` reads."""

    distil: DistilParams
    quantization: QuantizationParams | None  # None: its weights are on no grid


@dataclass(frozen=True)
class Variant:
    """A recipe, the parameters of its error curves, and those of the stages after pruning."""

    name: str
    recipe: Recipe
    measured: CurvesParams
    trained: DistilParams | None  # None: the pruned model is not trained as a whole
    export: list[Format]
    tasks: list[str]  # presets
    candidate: bool  # for the model-level gate

    @property
    def needs(self) -> Needs:
        return needs(self.recipe)

    @property
    def curves(self) -> CurvesPart | None:
        """The parameters of ``curves``; None if the allocation reads no curves."""
        if not self.needs.curves:
            return None
        return CurvesPart(selection=self._any_sparsity, compensate=self._compensates, curves=self.measured)

    @property
    def allocate(self) -> AllocatePart:
        selection = self.recipe.selection
        hand, allocation = selection.by_hand, self.recipe.allocation
        return AllocatePart(
            sparsity=selection.overall, by_hand=hand, pattern=selection.pattern, allocation=allocation
        )

    @property
    def induce(self) -> InducePart | None:
        """The parameters of ``induce``; None if no factors are learned."""
        induce = self.recipe.induce
        return (
            None
            if induce is None
            else InducePart(selection=self._any_sparsity, compensate=self._compensates, induce=induce)
        )

    @property
    def distil(self) -> DistilPart | None:
        """The parameters of ``distil``; None if nothing is trained."""
        grid = self.recipe.quantization
        return (
            None
            if self.trained is None
            else DistilPart(distil=self.trained, quantization=None if grid.bits is None else grid)
        )

    @property
    def _any_sparsity(self) -> SelectionParams:
        """The selection for a stage that does not read the sparsity, with a fixed value in its
        place. N:M has only one value.
        """
        pattern = self.recipe.selection.shape
        return self.recipe.selection.model_copy(
            update={"sparsity": 1 - pattern.n / pattern.m if pattern.m else 0.5}
        )

    @property
    def _compensates(self) -> bool:
        return "obs" in self.recipe.reconstruction.steps


def read(name: str, path: Path = params.FILE) -> Variant:
    """One variant of params.yaml.

    Raises:
        SparselineError: a key is missing, unknown, or cannot be used.
    """
    where = f"variants.{name}"
    written = params.merged("prune", where, path)
    found = params.parse(PruneParams, written.without(*OWN), where)
    induce = written.above.get("induce")
    induced = (
        None
        if induce is None
        else params.parse(InduceParams, params.merged("induce", f"{where}.induce", path), f"{where}.induce")
    )
    overlaid = (
        params.merged("curves", f"{where}.curves", path)
        if written.above.get("curves") is not None
        else params.section("curves", path)
    )
    trained = written.above.get("distil")
    distil = (
        None
        if trained is None
        else params.parse(DistilParams, params.merged("distil", f"{where}.distil", path), f"{where}.distil")
    )
    curves = params.parse(CurvesParams, overlaid, "curves")
    if induced is not None and found.selection.overall == 0:
        raise SparselineError(
            f"{params.FILE}: {where} prunes nothing (sparsity 0), so there is nothing to induce; remove"
            " its section `induce`."
        )
    pruning = {name: getattr(found, name) for name in Recipe.model_fields if name != "induce"}
    return Variant(
        name, Recipe(**pruning, induce=induced), curves, distil, found.export, found.tasks, found.candidate
    )


def read_all(path: Path = params.FILE) -> dict[str, Variant]:
    """Every variant, in the order of params.yaml.

    Raises:
        SparselineError: as ``read``.
    """
    return {name: read(name, path) for name in params.section("variants", path) or {}}
