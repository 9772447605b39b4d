"""Translate a recipe into the steps that prune a block; no tensors are touched."""

from dataclasses import dataclass

import torch

from pipeline_lib.prune.finetune import Finetune
from pipeline_lib.prune.layerwise import Layerwise, Quantise
from pipeline_lib.prune.select import Select
from pipeline_lib.prune.step import Step
from pipeline_lib.recipe.needs import Needs, needs
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.solve.grid import Scheme, scheme

REFIT = "refit"  # the step that trains a block once more after it was trained and then quantised


@dataclass(frozen=True)
class Plan:
    """The steps of pruning a model."""

    needs: Needs
    select: Step  # block by block, on the outputs of the preceding pruned blocks
    finetune: tuple[Step, ...]  # window by window, in order: train and quantise the remaining weights
    window: int  # number of consecutive blocks that are trained together

    @property
    def judged(self) -> bool:
        """Whether a step has a gate; then the held-out split enters no statistic."""
        return any(isinstance(step, Finetune) for step in self.finetune)

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.select, *self.finetune)


def plan(recipe: Recipe, dtype: torch.dtype) -> Plan:
    """The steps of a recipe for a checkpoint of this dtype.

    Raises:
        SparselineError: the dtype cannot distinguish all codes of a quantisation.
    """
    need, how, selection = needs(recipe), recipe.reconstruction, recipe.selection
    grid = scheme(recipe.quantization, dtype)
    fits = how.fits
    wide = torch.float32 if fits else None  # weights that are trained later are not rounded yet
    by_site = how.statistics == "per_site"
    select: Step
    if need.moments == "full":
        refit = how.lsq if "lsq" in how.steps else None
        rounded: Scheme | None = None if fits else grid
        select = Layerwise(
            selection, "obs" in how.steps, by_site, how.dense_target, how.reorder, refit, rounded, wide
        )
    else:
        select = Select(selection, need.moments, by_site, wide)
    trained: list[Step] = [Finetune(name, params, True) for name, params in fits.items()]
    if fits and grid is not None:
        trained.append(Quantise(selection, grid, "obs" in how.steps))
        if recipe.quantization.refit:
            again = list(fits.values())[-1].model_copy(update={"parts": recipe.quantization.refit})
            trained.append(Finetune(REFIT, again, False))
    return Plan(need, select, tuple(trained), how.window)
