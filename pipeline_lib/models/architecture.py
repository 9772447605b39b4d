"""The structure of a model as data: blocks, matrices, sites and couplings. ``discover.py`` finds them.

Shape letters: ``R`` outputs (rows), ``C`` inputs (columns) of a logical matrix, ``d`` channels of a
site.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Matrix:
    """A logical matrix [R, C] inside a block: the unit of scores, allocation, masks and sensitivities.

    ``rows``, ``transposed`` and ``expert`` select it from ``parameter`` (fused projections, Conv1D,
    3-D experts).
    """

    kind: str  # q, k, v, qkv, o, gate, up, down, fc1, fc2: the role, for plots and tables
    parameter: str  # relative to the block
    site: str  # the site whose activations it multiplies
    bias: str | None = None  # the whole stored bias; ``bias_view`` gives this matrix's part
    rows: tuple[int, int] | None = None
    transposed: bool = False
    expert: int | None = None

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The logical [R, C] matrix as a view of the stored parameter (or of any tensor of its shape)."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def bias_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bias [R] of this matrix as a view of the stored bias (or of any tensor of its shape)."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    @property
    def whole(self) -> bool:
        """Whether the matrix is the whole parameter."""
        return self.rows is None and self.expert is None

    @property
    def label(self) -> str:
        """A name that is unique inside the block."""
        part = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return (
            self.parameter.removesuffix(".weight") + part + ("" if self.expert is None else f".{self.expert}")
        )


def laid(
    matrices: Sequence[Matrix], values: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The stored parameters that contain ``matrices``, with ``values`` [R, C] inserted. The rest of
    each parameter comes from ``tensors``. Differentiable in the values.
    """
    by_parameter: dict[str, list[tuple[Matrix, torch.Tensor]]] = {}
    for matrix, value in zip(matrices, values, strict=True):
        by_parameter.setdefault(matrix.parameter, []).append((matrix, value))
    return {parameter: _whole(parts, tensors.get(parameter)) for parameter, parts in by_parameter.items()}


def _whole(parts: list[tuple[Matrix, torch.Tensor]], stored: torch.Tensor | None) -> torch.Tensor:
    """One stored parameter, concatenated from its parts. Inserting the parts one by one would cost a
    pass over the whole parameter for each, forwards and backwards.
    """
    if parts[0][0].whole:
        return _turned(*parts[0])
    if stored is None:
        raise ValueError(f"a part of {parts[0][0].parameter} needs the rest of it")
    by_expert: dict[int | None, list[tuple[Matrix, torch.Tensor]]] = {}
    for part in parts:
        by_expert.setdefault(part[0].expert, []).append(part)
    if None in by_expert:
        return _rows(by_expert[None], stored)
    return torch.stack(
        [_rows(by_expert[e], stored[e]) if e in by_expert else stored[e] for e in range(len(stored))]
    )


def _rows(parts: list[tuple[Matrix, torch.Tensor]], stored: torch.Tensor) -> torch.Tensor:
    """The stored matrix with the rows of ``parts`` replaced, in its stored orientation."""
    first = parts[0][0]
    if first.rows is None:
        return _turned(*parts[0])
    whole = stored.T if first.transposed else stored
    pieces, at = [], 0
    for matrix, value in sorted(parts, key=lambda part: part[0].rows or (0, 0)):
        start, stop = matrix.rows or (0, 0)
        pieces += [whole[at:start], value.to(whole.dtype)]
        at = stop
    joined = torch.cat([*pieces, whole[at:]])
    return joined.T if first.transposed else joined


def _turned(matrix: Matrix, value: torch.Tensor) -> torch.Tensor:
    return value.T if matrix.transposed else value


def compact(index: Sequence[int]) -> Sequence[int]:
    """An index in canonical form: a range if it counts up from 0 (which takes no memory), else a tuple."""
    return range(len(index)) if tuple(index) == tuple(range(len(index))) else tuple(index)


@dataclass(frozen=True)
class Tie:
    """One tensor that a coupling scales: entry ``positions[i]`` along ``axis`` is multiplied by
    ``factor[index[i]] ** power``.
    """

    parameter: str
    axis: int  # of the stored parameter, or of one expert's slice of it
    index: Sequence[int]
    power: int
    offset: float = 0.0  # Gemma keeps its norm weight as 1 + w
    # None: all entries in order; else the affected entries of a fused parameter, such as Q's rows
    positions: tuple[int, ...] | None = None
    expert: int | None = None  # set if the parameter holds several experts

    def entries(self, tensor: torch.Tensor) -> torch.Tensor:
        """The affected entries of the stored parameter (or of any tensor of its shape), ``axis``
        first: [len(index), ...].
        """
        tensor = (tensor if self.expert is None else tensor[self.expert]).movedim(self.axis, 0)
        return (
            tensor if self.positions is None else tensor[torch.tensor(self.positions, device=tensor.device)]
        )


@dataclass(frozen=True)
class Coupling:
    """``size`` positive factors that may be chosen freely: their effects on the ties cancel, so the
    block computes the same function (2602.21652, Eq. 3).
    """

    name: str
    size: int
    ties: tuple[Tie, ...]


@dataclass(frozen=True)
class Site:
    """A place in a block whose activations X [tokens, d] are the input of one or more matrices.

    ``parameter`` is one of the parameters that multiply X, as the block's modules name it.
    ``coupling`` scales X by ``factor[index]`` (X' = D X).
    """

    name: str
    parameter: str
    expert: int | None  # set if the parameter holds several experts
    coupling: str | None
    index: Sequence[int]
    # common name of the experts' sites, whose statistics supplement those of experts with few tokens
    pool: str | None = None


@dataclass(frozen=True)
class Layout:
    """The structure of one block. Names are relative to the block. Equal blocks share a layout."""

    matrices: tuple[Matrix, ...]
    sites: tuple[Site, ...]
    couplings: tuple[Coupling, ...]
    # parameters that choose and weigh experts, as the block's modules name them; never pruned
    routers: frozenset[str] = frozenset()

    @property
    def offsets(self) -> dict[str, float]:
        """Parameter -> offset, for parameters that act as offset + w (Gemma's norms multiply by 1 + w)."""
        return {
            tie.parameter: tie.offset for coupling in self.couplings for tie in coupling.ties if tie.offset
        }

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def consumers(self, site: str) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.site == site)


@dataclass(frozen=True)
class Architecture:
    """The structure of a model. Names are relative to the base model."""

    family: str
    blocks: str  # path of the module list inside the base model
    width: int  # channels of the residual stream
    layouts: tuple[Layout, ...]  # one per block
    outside: frozenset[str]  # parameters of the base model that process text before or after the blocks
    # length of the tuple that a block returns (hidden states first); 0: it returns a tensor
    returns: int = 0

    @property
    def depth(self) -> int:
        return len(self.layouts)

    def matrix_name(self, block: int, matrix: Matrix) -> str:
        """The logical matrix's name in allocations, sensitivities and patterns."""
        return f"{self.blocks}.{block}.{matrix.label}"

    def places(self) -> Iterator[tuple[int, Matrix]]:
        """Every logical matrix with its block, in order."""
        return ((block, matrix) for block, layout in enumerate(self.layouts) for matrix in layout.matrices)
