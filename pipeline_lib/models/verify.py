"""Verify every coupling on the model's own weights: random powers of two must not change any block's
function.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from pipeline_lib.core.random import generator
from pipeline_lib.models.architecture import Architecture, Coupling, Layout
from pipeline_lib.models.folding import fold
from pipeline_lib.models.stream import BlockModel

TOKENS = 16  # in the sample
# allowed difference of the outputs, in units of epsilon times the largest output, if folding rounds (a
# norm's weight that is stored as w and acts as 1 + w)
LOST = 64


@torch.no_grad()
def verified(model: BlockModel, seed: int = 0) -> Iterator[tuple[Layout, tuple[str, ...]]]:
    """For each block, its layout with the couplings that hold, and the names of those that fail.

    A sample of random tokens passes through the model. Memory: two copies of a block.
    """
    random = generator(seed, "couplings")
    stream = model.embed(torch.randint(0, model.checkpoint.vocabulary, (1, TOKENS), generator=random), 1)
    for index, layout in enumerate(model.checkpoint.architecture.layouts):
        trial = _Trial(model, index, stream.hidden[0], random)
        failed: tuple[str, ...] = ()
        if layout.couplings and not trial.holds(layout.couplings):
            failed = tuple(coupling.name for coupling in layout.couplings if not trial.holds([coupling]))
        yield without(layout, failed), failed
        model.check_finite(index, trial.output)
        stream.hidden[0] = trial.output


class _Trial:
    """One block with its inputs [B, T, D] and the output to reproduce."""

    def __init__(self, model: BlockModel, index: int, hidden: torch.Tensor, random: torch.Generator) -> None:
        self.model, self.index, self.hidden, self.random = model, index, hidden, random
        self.tensors = {
            name: tensor.to(model.device, torch.float32)
            for name, tensor in model.checkpoint.block(index).items()
        }
        self.output = self._of(self.tensors)

    def _of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.model.call(self.model.block(self.index, tensors), self.index, self.hidden)

    def holds(self, couplings: Sequence[Coupling]) -> bool:
        """Whether random factors for these couplings leave the output unchanged."""
        factors = {
            c.name: torch.exp2(torch.randint(-3, 4, (c.size,), generator=self.random).float())
            for c in couplings
        }
        folded = self._of(fold(self.tensors, self.model.checkpoint.architecture.layouts[self.index], factors))
        rounded = any(tie.offset for coupling in couplings for tie in coupling.ties)
        allowed = rounded * LOST * torch.finfo(folded.dtype).eps * float(self.output.abs().max())
        return float((folded - self.output).abs().max()) <= allowed


def without(layout: Layout, names: Sequence[str]) -> Layout:
    """A layout without the named couplings; the same object if there are no names."""
    if not names:
        return layout
    sites = tuple(
        replace(site, coupling=None, index=range(len(site.index))) if site.coupling in names else site
        for site in layout.sites
    )
    return replace(
        layout,
        sites=sites,
        couplings=tuple(coupling for coupling in layout.couplings if coupling.name not in names),
    )


def with_layouts(architecture: Architecture, layouts: Sequence[Layout]) -> Architecture:
    """The architecture with other layouts. Equal layouts become one object."""
    same: dict[Layout, Layout] = {}
    return replace(architecture, layouts=tuple(same.setdefault(layout, layout) for layout in layouts))
