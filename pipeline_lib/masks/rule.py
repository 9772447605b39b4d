"""The rule for one matrix's mask: scores, comparison group, and learned selection weights."""

from dataclasses import dataclass, replace

import torch

from pipeline_lib.masks.scores import Curvature, saliency
from pipeline_lib.masks.select import select, select_n_of_m
from pipeline_lib.masks.settings import Group, Pattern, Score, SelectionParams


@dataclass(frozen=True)
class Rule:
    """Score, comparison group and selection weights. Shape letters: ``R`` outputs, ``C`` inputs of
    the matrix.
    """

    score: Score
    pattern: Pattern
    group: Group
    block: int  # columns of a block
    importance: torch.Tensor | None = None  # selection weights u > 0 [C]: scores are multiplied by u²

    @classmethod
    def of(cls, selection: SelectionParams, importance: torch.Tensor | None = None) -> "Rule":
        return cls(selection.score, selection.shape, selection.group, selection.block, importance)

    def at(self, columns: torch.Tensor | slice) -> "Rule":
        """The rule for some of the columns, in the given order."""
        return self if self.importance is None else replace(self, importance=self.importance[columns])

    def weighted(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [R, C] times u²."""
        return scores if self.importance is None else scores * self.importance.square()

    def scores(self, weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
        """Scores of weights [R, C], with u²; the lowest are pruned."""
        return self.weighted(saliency(self.score, weight, curvature))

    def mask(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        """The mask [R, C] of the ``kept`` highest scores [R, C], compared within the pattern or, if it
        is unstructured, within the group.
        """
        if self.pattern.m:
            return select_n_of_m(scores, kept * self.pattern.m // scores.numel(), self.pattern.m)
        return select(scores, kept, self.group, self.block)
