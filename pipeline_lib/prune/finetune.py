"""Train the pruned blocks of a window together, by gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pipeline_lib.core import ranks
from pipeline_lib.core.threads import SMALL
from pipeline_lib.fit.fit import Masks, Remask, Sparse, fit
from pipeline_lib.fit.scales import Scales
from pipeline_lib.fit.settings import FitParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.prune.window import Window
from pipeline_lib.stats.lanes import LANES


@dataclass(frozen=True)
class Finetune:
    """One of the steps ``finetune_channels`` and ``finetune``, or the training after quantisation."""

    name: str  # key of its errors in the facts of a block
    params: FitParams
    remasks: bool  # whether masks may change

    def run(self, window: Window) -> None:
        """Train in place. The held-out split decides whether the result is kept."""
        model, blocks = window.model, window.blocks
        places = {  # matrix with its name in the window -> block index and matrix
            replace(m, parameter=f"{index}/{m.parameter}", bias=m.bias and f"{index}/{m.bias}"): (index, m)
            for index, block in blocks.items()
            for m in block.curvatures
        }
        if not places:
            return

        def run(hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            for index in blocks:
                prefix = f"{index}/"
                own = {
                    name.removeprefix(prefix): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
                hidden = model.call(model.templates[index], index, hidden, scales[index].joined(own))
            return hidden

        scales = {
            index: Scales(block.tensors, block.grids if "scales" in self.params.parts else {})
            for index, block in blocks.items()
        }
        tensors: dict[str, torch.Tensor] = {}
        names: dict[int, list[str]] = {}
        for index, block in blocks.items():
            given = {**block.tensors, **scales[index].free()}
            tensors |= {f"{index}/{name}": tensor.float() for name, tensor in given.items()}
            names[index] = list(given)
            block.tensors = {}  # the fit takes ownership
        del given
        masks = {
            matrix: own.view(blocks[index].masks[own.parameter]) for matrix, (index, own) in places.items()
        }
        first = blocks[min(blocks)]
        offsets = {
            f"{index}/{name}": offset
            for index in blocks
            for name, offset in blocks[index].layout.offsets.items()
        }
        sparse = Sparse(run, tensors, masks, first.where, self._remask(window, places), model.dtype, offsets)
        fitted = fit(sparse, *window.rows.pairs(), self.params)
        for index, block in blocks.items():
            block.tensors = scales[index].settle(
                {name: fitted.tensors[f"{index}/{name}"] for name in names[index]}
            )
            block.facts[self.name] = fitted.facts
        for matrix, mask in (fitted.masks or {}).items():
            index, own = places[matrix]
            blocks[index].take(own, mask)

    def _remask(self, window: Window, places: Mapping[Matrix, tuple[int, Matrix]]) -> Remask | None:
        if not self.remasks:
            return None

        def remask(tensors: Mapping[str, torch.Tensor]) -> Masks:
            weights = {matrix: matrix.view(tensors[matrix.parameter]) for matrix in places}

            def chosen(matrix: Matrix) -> torch.Tensor:
                index, own = places[matrix]
                block = window.blocks[index]
                scores = block.rules[own].scores(weights[matrix], block.curvatures[own])
                return block.rules[own].mask(scores, block.kept[own])

            return ranks.each({matrix: weight.numel() for matrix, weight in weights.items()}, chosen)

        return remask

    def memory(self, shapes: Shapes) -> float:
        """Bytes. Each weight takes 23 if weights are trained (weight, Adam's moments, gradient, the
        best so far, mask and bfloat16 copies), 22 for scales, otherwise 16. Each further lane that
        runs in parallel takes 10 more (its gradient, and the masked weight in float32 and
        bfloat16). One batch's graph comes on top.
        """
        each = 23 if "weights" in self.params.parts else 22 if "scales" in self.params.parts else 16
        each += 10 * (LANES - 1) * (shapes.window * shapes.block <= SMALL)
        return shapes.window * each * shapes.block + 3 * shapes.inner(self.params.batch_rows)

    def flops(self, shapes: Shapes) -> float:
        """FLOPs of the maximum of epochs, with gradients at twice a forward pass, and of the gate."""
        return 4 * self.params.epochs * shapes.extended * shapes.forward
