"""Fold per-channel factors into a block's tensors without changing the block's function (2602.21652,
Eq. 3).
"""

from collections.abc import Mapping, Sequence

import torch

from pipeline_lib.models.architecture import Layout, Matrix


def fold(
    tensors: Mapping[str, torch.Tensor], layout: Layout, factors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A block's tensors with every coupling's ties multiplied by its factors.

    Args:
        tensors: the block's parameters, named relative to the block.
        factors: positive factors [size] for some of the couplings. A site's inputs become X' = D X
            with D = diag(factor[index]).

    Products are computed in the wider of the two dtypes, and rounded once to the parameter's dtype.
    Powers of two are exact.
    """
    folded = dict(tensors)
    own: set[str] = set()  # parameters that are already copied, and may be overwritten
    for coupling in layout.couplings:
        if coupling.name not in factors:
            continue
        factor = factors[coupling.name]
        if factor.shape != (coupling.size,):
            raise ValueError(
                f"{coupling.name} takes factors of shape ({coupling.size},), not {tuple(factor.shape)}"
            )
        for tie in coupling.ties:
            if tie.expert is not None and tie.parameter not in own:
                folded[tie.parameter] = folded[tie.parameter].clone()
                own.add(tie.parameter)
            old = folded[tie.parameter] if tie.expert is None else folded[tie.parameter][tie.expert]
            scale = factor[numbers(tie.index, factor.device)].to(old.device)
            if tie.positions is not None:
                whole = scale.new_ones(old.shape[tie.axis])
                scale = whole.index_copy(0, torch.tensor(tie.positions, device=old.device), scale)
            shape = [-1 if axis == tie.axis else 1 for axis in range(old.ndim)]
            wide = torch.promote_types(old.dtype, factor.dtype)
            scale = scale.to(wide).view(shape)
            new = old.to(wide) + tie.offset
            new = new * scale if tie.power > 0 else new / scale
            new = (new - tie.offset).to(old.dtype)
            if tie.expert is None:
                folded[tie.parameter] = new
            else:
                old.copy_(new)
    return folded


def numbers(index: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    """An index as a tensor."""
    if isinstance(index, range):
        return torch.arange(index.start, index.stop, index.step, device=device)
    return torch.tensor(index, device=device)


def site_factor(layout: Layout, site: str, factors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """D's diagonal [d] for a site's inputs, or None if no factor scales them."""
    entry = layout.site(site)
    if entry.coupling is None or entry.coupling not in factors:
        return None
    return factors[entry.coupling][numbers(entry.index)]


class MatrixScales:
    """The scales that couplings give to the rows and columns of one logical matrix [R, C].

    The constructor builds the indices once, for many calls.
    """

    def __init__(
        self, layout: Layout, matrix: Matrix, shape: tuple[int, int], device: torch.device | None = None
    ) -> None:
        self.shape, self.device = shape, device
        # per tie: coupling; 0 for rows or 1 for columns; their indices; the index of each one's factor; power
        self.ties: list[tuple[str, int, torch.Tensor, torch.Tensor, int]] = []
        for coupling in layout.couplings:
            for tie in coupling.ties:
                if (tie.parameter, tie.expert) != (matrix.parameter, matrix.expert):
                    continue
                axis = 1 - tie.axis if matrix.transposed else tie.axis
                start = matrix.rows[0] if matrix.rows is not None and axis == 0 else 0
                if tie.positions is None and start == 0 and len(tie.index) == shape[axis]:
                    whole = torch.arange(shape[axis], device=device)
                    self.ties.append((coupling.name, axis, whole, numbers(tie.index, device), tie.power))
                    continue
                taken = dict(zip(tie.positions or range(len(tie.index)), tie.index, strict=True))
                where = [i for i in range(shape[axis]) if start + i in taken]
                if where:
                    index = torch.tensor([taken[start + i] for i in where], device=device)
                    self.ties.append(
                        (coupling.name, axis, torch.tensor(where, device=device), index, tie.power)
                    )

    def __call__(self, log_factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log scales of rows [R] and columns [C], differentiable in the log factors. Missing couplings
        count as 0.
        """
        like = next(iter(log_factors.values()), torch.zeros((), device=self.device))
        scales = [like.new_zeros(size) for size in self.shape]
        for name, axis, where, index, power in self.ties:
            if name in log_factors:
                scales[axis] = scales[axis].index_add(0, where, log_factors[name][index], alpha=power)
        return scales[0], scales[1]
