"""The gate of induction: the error of a block's output on the held-out split, after its matrices are
pruned with a transform.
"""

import functools
from collections.abc import Callable, Mapping

import torch

from pipeline_lib.fit.fit import Pairs, block_error
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.layerwise import Layerwise
from pipeline_lib.prune.window import Block
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.lanes import deal
from pipeline_lib.stats.moments import refresh

BlockError = Callable[[Transform], float]


class Gate:
    """The dense activations of the held-out split, which pass through the model once, block by block."""

    def __init__(
        self,
        model: BlockModel,
        rows: torch.Tensor,
        batch_rows: int,
        selection: SelectionParams,
        compensate: bool,
    ) -> None:
        self.model, self.selection, self.compensate = model, selection, compensate
        dealt = deal(len(rows), batch_rows)
        self.stream = model.embed(rows, dealt.sizes, "gate", own=dealt.own)

    def enter(self, index: int, dense: DenseBlock, kept: Mapping[Matrix, int]) -> BlockError:
        """Pass the activations through block ``index`` (blocks come in order), and return the function that
        measures a transform's error.

        The function folds a transform in, updates the statistics for it (without a forward pass),
        prunes with the variant's selection, and returns E‖Y_dense − Y_sparse‖² / E‖Y_dense − E
        Y_dense‖².
        """
        model, layout = self.model, dense.layout
        block = model.block(index, dense.tensors)
        inputs = self.stream.copy("gate inputs").hidden
        model.advance(block, index, self.stream)
        # the stream advances before the function is called
        rows = Pairs(inputs, self.stream.copy("gate outputs").hidden)

        def error(transform: Transform) -> float:
            transform = transform.to(model.device)
            folded = fold(dense.tensors, layout, transform.factors)
            factors = {name: site_factor(layout, name, transform.factors) for name in dense.statistics}
            moved = {name: refresh(site, factors[name]).moments for name, site in dense.statistics.items()}
            pruned = Block(layout, dense.where, transform, kept, folded)
            Layerwise(self.selection, self.compensate).prune_block(pruned, moved)
            return block_error(functools.partial(model.call, block, index), pruned.tensors, rows)

        return error
