"""Fold per-channel factors into a block's tensors: the function stays, only its coordinates change (2602.21652, Eq. 3)."""

from collections.abc import Mapping

import torch

from pipeline_lib.models.architecture import Architecture


def fold(tensors: Mapping[str, torch.Tensor], architecture: Architecture, factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's tensors with every coupling's ties multiplied by its factors.

    Args:
        tensors: the block's parameters, named relative to the block.
        factors: for some of the couplings, positive factors [size]; a site's inputs become X' = D X with D = diag(factor[index]).

    Each product is taken in the wider of the two dtypes and rounded once to the parameter's own; with powers of two it is exact.
    """
    folded = dict(tensors)
    for coupling in architecture.couplings:
        if coupling.name not in factors:
            continue
        factor = factors[coupling.name]
        if factor.shape != (coupling.size,):
            raise ValueError(f"{coupling.name} takes factors of shape ({coupling.size},), not {tuple(factor.shape)}")
        for tie in coupling.ties:
            old = folded[tie.parameter]
            scale = factor[torch.tensor(tie.index, device=factor.device)].to(old.device)
            shape = [-1 if axis == tie.axis else 1 for axis in range(old.ndim)]
            wide = torch.promote_types(old.dtype, factor.dtype)
            scale = scale.to(wide).view(shape)
            new = old.to(wide) + tie.offset
            new = new * scale if tie.power > 0 else new / scale
            folded[tie.parameter] = (new - tie.offset).to(old.dtype)
    return folded


def site_factor(architecture: Architecture, site: str, factors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """D's diagonal [d] for a site's inputs, or None where nothing scales them."""
    entry = architecture.site(site)
    if entry.coupling is None or entry.coupling not in factors:
        return None
    return factors[entry.coupling][torch.tensor(entry.index)]
