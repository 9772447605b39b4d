"""Try every coupling on the model's own weights before it is used: random powers of two must leave each block's function as it is."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from pipeline_lib.core.random import generator
from pipeline_lib.models.architecture import Architecture, Coupling, Layout
from pipeline_lib.models.folding import fold
from pipeline_lib.models.stream import BlockModel

TOKENS = 16  # of a row
LOST = 64  # how many times float32's spacing the outputs may differ where a factor is rounded (a norm's weight that is kept as 1 + w)


@torch.no_grad()
def verified(model: BlockModel, seed: int = 0) -> Iterator[tuple[Layout, tuple[str, ...]]]:
    """For each block its layout with the couplings that hold, and the names of those that do not.

    A row of random tokens is passed through the model. Memory: a block twice. The blocks of a kind share their layouts.
    """
    random = generator(seed, "couplings")
    vocabulary = model.checkpoint.config.get_text_config().vocab_size
    stream = model.embed(torch.randint(0, vocabulary, (1, TOKENS), generator=random), 1)
    for index, layout in enumerate(model.checkpoint.architecture.layouts):
        tensors = {name: tensor.to(model.device, torch.float32) for name, tensor in model.checkpoint.block(index).items()}
        hidden = stream.hidden[0]
        output = model.call(model.block(index, tensors), index, hidden)

        def holds(couplings: Sequence[Coupling], random: torch.Generator = random) -> bool:
            factors = {c.name: torch.exp2(torch.randint(-3, 4, (c.size,), generator=random).float()) for c in couplings}
            folded = model.block(index, fold(tensors, layout, factors))  # noqa: B023 - called before the next block
            difference = model.call(folded, index, hidden) - output  # noqa: B023
            rounded = any(tie.offset for coupling in couplings for tie in coupling.ties)
            return float(difference.abs().max()) <= rounded * LOST * torch.finfo(output.dtype).eps * float(output.abs().max())  # noqa: B023

        failed: tuple[str, ...] = ()
        if layout.couplings and not holds(layout.couplings):
            kept = [coupling for coupling in layout.couplings if holds([coupling])]
            failed = tuple(coupling.name for coupling in layout.couplings if coupling not in kept)
            layout = without(layout, failed)
        yield layout, failed
        model.check_finite(index, output)
        stream.hidden[0] = output


def without(layout: Layout, names: Sequence[str]) -> Layout:
    """A layout that lacks some couplings."""
    sites = tuple(replace(site, coupling=None, index=range(len(site.index))) if site.coupling in names else site for site in layout.sites)
    return replace(layout, sites=sites, couplings=tuple(coupling for coupling in layout.couplings if coupling.name not in names))


def with_layouts(architecture: Architecture, layouts: Sequence[Layout]) -> Architecture:
    """The architecture with other layouts; equal ones are one object."""
    same: dict[Layout, Layout] = {}
    return replace(architecture, layouts=tuple(same.setdefault(layout, layout) for layout in layouts))
