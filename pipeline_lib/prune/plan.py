"""From a recipe to the steps of pruning a block; no tensors are touched."""

from dataclasses import dataclass

import torch

from pipeline_lib.prune.choose import Choose
from pipeline_lib.prune.finetune import Finetune
from pipeline_lib.prune.layerwise import Layerwise, Quantise
from pipeline_lib.prune.step import Step
from pipeline_lib.recipe.needs import Needs, needs
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.solve.grid import Scheme, scheme

REFIT = "refit"  # what is fitted once more where a block is quantised after it was fitted


@dataclass(frozen=True)
class Plan:
    """The steps of pruning a model."""

    needs: Needs
    select: Step  # block by block: each sees what comes out of the pruned blocks before it
    mend: tuple[Step, ...]  # window by window, in order: what fits and quantises the weights that are left
    window: int  # consecutive blocks that are mended together

    @property
    def judged(self) -> bool:
        """Whether a step has a gate; then the held-out split enters no statistic."""
        return any(isinstance(step, Finetune) for step in self.mend)

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.select, *self.mend)


def plan(recipe: Recipe, dtype: torch.dtype) -> Plan:
    """The steps of a recipe for a checkpoint of this dtype.

    Raises:
        SparselineError: the dtype cannot distinguish all codes of a quantisation.
    """
    need, how, selection = needs(recipe), recipe.reconstruction, recipe.selection
    grid = scheme(recipe.quantization, dtype)
    fits = how.fits
    wide = torch.float32 if fits else None  # what is fitted later is not rounded before
    by_site = how.collect == "site"
    select: Step
    if need.moments == "full":
        refit = how.lsq if "lsq" in how.steps else None
        rounded: Scheme | None = None if fits else grid
        select = Layerwise(
            selection, "obs" in how.steps, by_site, how.towards_dense, how.reorder, refit, rounded, wide
        )
    else:
        select = Choose(selection, need.moments, by_site, wide)
    mend: list[Step] = [Finetune(name, params, True) for name, params in fits.items()]
    if fits and grid is not None:
        mend.append(Quantise(selection, grid, "obs" in how.steps))
        if recipe.quantization.refit:
            again = list(fits.values())[-1].model_copy(update={"parts": recipe.quantization.refit})
            mend.append(Finetune(REFIT, again, False))
    return Plan(need, select, tuple(mend), how.window)
