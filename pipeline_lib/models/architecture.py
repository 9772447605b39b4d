"""Architectures as data: where blocks, matrices and sites are, and which tensors absorb a factor. ``families.py`` is the table.

Shape letters: ``R`` outputs (rows), ``C`` inputs (columns) of a logical matrix, ``d`` channels of a site.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Matrix:
    """A logical matrix [R, C] inside a block: the unit of scores, allocation, masks and sensitivities.

    ``rows``, ``transposed`` and ``expert`` say which part of ``parameter`` it is (fused projections, Conv1D, 3-D experts).
    """

    kind: str  # q, k, v, qkv, o, gate, up, down, fc1, fc2: the role, for plots and tables
    parameter: str  # relative to the block
    site: str  # whose inputs it multiplies
    bias: str | None = None  # the whole stored bias; ``bias_view`` gives this matrix's part
    rows: tuple[int, int] | None = None
    transposed: bool = False
    expert: int | None = None

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The logical [R, C] matrix as a view of the stored parameter (or of anything shaped like it)."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def bias_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part [R] of the stored bias that belongs to the matrix's rows, as a view (of anything shaped like the bias)."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    @property
    def whole(self) -> bool:
        """It is all of its parameter."""
        return self.rows is None and self.expert is None

    @property
    def label(self) -> str:
        """Unique name inside the block."""
        part = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return self.parameter.removesuffix(".weight") + part + ("" if self.expert is None else f".{self.expert}")


@dataclass(frozen=True)
class Tie:
    """One tensor that a coupling multiplies: entry ``positions[i]`` along ``axis`` takes ``factor[index[i]] ** power``."""

    parameter: str
    axis: int  # of the stored parameter
    index: tuple[int, ...]
    power: int
    offset: float = 0.0  # Gemma keeps its norm weight as 1 + w
    positions: tuple[int, ...] | None = None  # None: every entry in order; else the entries of a fused parameter, as Q's rows

    def entries(self, tensor: torch.Tensor) -> torch.Tensor:
        """The touched entries of the stored parameter (or of anything shaped like it), ``axis`` first: [len(index), ...]."""
        tensor = tensor.movedim(self.axis, 0)
        return tensor if self.positions is None else tensor[torch.tensor(self.positions, device=tensor.device)]


@dataclass(frozen=True)
class Coupling:
    """``size`` free positive factors whose ties cancel: the block's function does not depend on them (2602.21652, Eq. 3)."""

    name: str
    size: int
    ties: tuple[Tie, ...]


@dataclass(frozen=True)
class Site:
    """A place whose activations X [tokens, d] are the input of one or more matrices.

    ``module`` is a module that receives X; ``coupling`` scales X by ``factor[index]`` (X' = D X).
    """

    name: str
    module: str
    coupling: str | None
    index: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What one block is made of. Names are relative to the block. Blocks that are alike share theirs."""

    matrices: tuple[Matrix, ...]
    sites: tuple[Site, ...]
    couplings: tuple[Coupling, ...]

    @property
    def offsets(self) -> dict[str, float]:
        """Parameters that act as offset + w, and the offset (Gemma keeps its norm weights as 1 + w)."""
        return {tie.parameter: tie.offset for coupling in self.couplings for tie in coupling.ties if tie.offset}

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def consumers(self, site: str) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.site == site)


@dataclass(frozen=True)
class Architecture:
    """What the pipeline needs to know of a model. Names are relative to the base model."""

    family: str
    blocks: str  # path of the module list inside the base model
    width: int  # channels of the residual stream
    layouts: tuple[Layout, ...]  # of every block
    stored_head: str = "lm_head.weight"  # what checkpoint files call the head, where it is not tied

    @property
    def depth(self) -> int:
        return len(self.layouts)

    def matrix_name(self, block: int, matrix: Matrix) -> str:
        """The logical matrix's name in allocations, sensitivities and patterns."""
        return f"{self.blocks}.{block}.{matrix.label}"

    def places(self) -> Iterator[tuple[int, Matrix]]:
        """Every logical matrix with its block, in order."""
        return ((block, matrix) for block, layout in enumerate(self.layouts) for matrix in layout.matrices)
