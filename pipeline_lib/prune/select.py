"""Choose masks by scores without the inverse of H, and set pruned weights to zero: nothing is
factorised or compensated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.prune.collect import collect_diagonals
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.prune.window import NO_SCORES, Block, Window
from pipeline_lib.recipe.needs import Moments
from pipeline_lib.solve.factor import NOT_FINITE, damping_unit, finite


@dataclass(frozen=True)
class Select:
    """The step of Magnitude, Wanda and OBD."""

    selection: SelectionParams
    moments: Moments  # what the score reads: ``none``, or the ``diagonal`` of the second moment
    by_site: bool = False  # collect statistics before each site; otherwise once per block
    # dtype of the pruned matrices; None: unchanged
    dtype: torch.dtype | None = None

    def run(self, window: Window) -> None:
        """Prune the window's only block in place."""
        ((index, block),) = window.blocks.items()
        model = window.model
        found: dict[str, torch.Tensor] = {}
        with block.settling():
            dealt = block.deal(())
            for site in block.sites:
                if site not in dealt.ahead:
                    dealt.share()
                    sites = block.ahead(site, self.by_site)
                    dealt = block.deal(sites)
                    if self.moments != "none":
                        hidden, lanes = window.rows.pruned.hidden, window.rows.seen
                        found = collect_diagonals(
                            model, (index, model.block(index, block.tensors)), hidden, lanes, sites
                        )
                self.prune_site(block, site, found.get(site), dealt.take(site))
            dealt.share()

    def prune_site(
        self,
        block: Block,
        site: str,
        second_moment: torch.Tensor | None,
        own: Sequence[Matrix] | None = None,
    ) -> None:
        """Choose the masks of a site's matrices, and store weights and masks in the block. The
        block's checks run when it settles.

        Args:
            second_moment: the diagonal [C] of the second moment of the site's inputs, or None if
                the score reads none.
            own: the matrices to prune; None: all.
        """
        rule = Rule.of(self.selection)
        if second_moment is not None:
            block.checks.append((finite(second_moment), NOT_FINITE.format(f"{block.where} {site}")))
        for matrix in block.consumers(site) if own is None else own:
            weight = matrix.view(block.tensors[matrix.parameter])
            known = (
                torch.full((weight.shape[1],), torch.nan, device=weight.device)
                if second_moment is None
                else second_moment
            )
            diagonal = known + self.selection.damping * damping_unit(known, self.selection.damping_of)
            # the inverse stays NaN: these scores do not read it
            curvature = Curvature(known, diagonal, torch.full_like(known, torch.nan))
            mask = rule.mask(rule.scores(weight.float(), curvature), block.kept[matrix])
            block.checks.append(
                (
                    mask.count_nonzero() == block.kept[matrix],
                    NO_SCORES.format(f"{block.where}.{matrix.label}"),
                )
            )
            block.take(matrix, mask, self.dtype)
            matrix.view(block.tensors[matrix.parameter]).masked_fill_(~mask, 0)
            block.curvatures[matrix], block.rules[matrix] = curvature, rule
            block.facts["matrices"][matrix.label] = {
                "kind": matrix.kind,
                "size": weight.numel(),
                "kept": block.kept[matrix],
            }

    def memory(self, shapes: Shapes) -> float:
        """Bytes: the window's blocks (twice if they are fitted later), and the larger of two
        phases. While statistics are collected: the running block and a batch. While masks are
        chosen: the largest matrix in float32 with its scores and mask. If the whole matrix is one
        group, the positions of equal scores come on top.
        """
        item, wide = shapes.checkpoint.dtype.itemsize, self.dtype is not None
        kept, dense = max(item, 4 * wide), wide * shapes.dtype.itemsize
        collecting = (item + dense + shapes.copied) * shapes.block + shapes.activations(shapes.batch)
        choosing = (kept + dense) * shapes.block + (
            21 if self.selection.group == "matrix" else 13
        ) * shapes.largest
        return kept * (shapes.window - 1) * shapes.block + max(
            (self.moments != "none") * collecting, choosing
        )

    def flops(self, shapes: Shapes) -> float:
        """FLOPs of the passes that collect diagonals; with statistics per site, a pass stops at its
        site.
        """
        return 0 if self.moments == "none" else (2.2 if self.by_site else 1) * shapes.forward
