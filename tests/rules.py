"""Short ways to say how a mask is chosen and how least squares are solved."""

import torch

from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.settings import Group, Pattern, Score
from pipeline_lib.solve.factor import Factorisation
from pipeline_lib.solve.settings import LsqParams

PLAIN = Pattern.parse("unstructured")


def rule(
    score: Score = "obs",
    pattern: Pattern = PLAIN,
    group: Group = "block",
    block: int = 128,
    importance: torch.Tensor | None = None,
) -> Rule:
    return Rule(score, pattern, group, block, importance)


def lsq(iterations: int, tolerance: float, mask_iterations: int = 0, mask_penalty: float = 0.1) -> LsqParams:
    """Unchecked: tests ask for no iterations and no tolerance, too. Masks are searched in float32,
    or in float64 where matrices are.
    """
    masks = {"mask_iterations": mask_iterations, "mask_penalty": mask_penalty, "mask_dtype": "float32"}
    return LsqParams.model_construct(iterations=iterations, tolerance=tolerance, **masks)


def hessian_of(factorisation: Factorisation, gram: torch.Tensor) -> torch.Tensor:
    """H [C, C] from the G that was factorised, columns in their own order."""
    hessian = gram.clone()
    hessian.diagonal().copy_(factorisation.diagonal)
    return hessian
