"""Scores of weights: the cost of removing each. All scores are squared, and rank weights as in the
papers.

Shape letters: ``R`` outputs, ``C`` inputs. H = G + damping, damped second moment; G = E[X Xᵀ].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline_lib.masks.settings import Score


@dataclass(frozen=True)
class Curvature:
    """Statistics of a matrix's inputs for the scores, each [C].

    ``inverse_diagonal`` is [H⁻¹]_mm of the columns that are still free: of the whole matrix before
    a sweep, U_mm² inside one.
    """

    second_moment: torch.Tensor  # G_mm, undamped
    diagonal: torch.Tensor  # H_mm, damped
    inverse_diagonal: torch.Tensor

    def columns(self, start: int, stop: int) -> "Curvature":
        part = slice(start, stop)
        return Curvature(self.second_moment[part], self.diagonal[part], self.inverse_diagonal[part])


def _magnitude(weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """w²."""
    return weight.square()


def _wanda(weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """w²·G_mm: the square of |w|·‖X_m‖ (2306.11695) up to the token count."""
    return weight.square() * curvature.second_moment


def _obd(weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """w²·H_mm."""
    return weight.square() * curvature.diagonal


def _obs(weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """w²/[H⁻¹]_mm."""
    return weight.square() / curvature.inverse_diagonal


def _isc(weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """w²·(H_mm + 1/[H⁻¹]_mm)  (2310.09499, Eq. 4)."""
    return weight.square() * (curvature.diagonal + 1 / curvature.inverse_diagonal)


# Each is w² times a factor per input: induction takes the factor alone.
SCORES: dict[Score, Callable[[torch.Tensor, Curvature], torch.Tensor]] = {
    "magnitude": _magnitude,
    "wanda": _wanda,
    "obd": _obd,
    "obs": _obs,
    "isc": _isc,
}


def saliency(score: Score, weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """Scores [R, C]; the lowest are pruned."""
    return SCORES[score](weight, curvature)
