"""Divergence of a model's predictions from the dense model's, token by token.

One block of the dense model is in memory at a time, then its head. Its predictions are not stored:
they are computed beside the model's own. Shape letters: ``N`` samples, ``T`` tokens per sample,
``t`` tokens of a piece, ``V`` tokens of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline_lib.core import ranks, settings
from pipeline_lib.core.progress import Watched
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.places import allowed_storage
from pipeline_lib.models.stream import HEAD_TOKENS, BlockModel

PERCENT = 99


@dataclass(frozen=True)
class Dense:
    """The checkpoint of the dense model, with which others are compared."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device

    def logits(self, rows: torch.Tensor, batch_rows: int, watched: Watched = iter) -> Iterator[torch.Tensor]:
        """The logits [t, V] of the first T - 1 tokens of every sample of ``rows`` [N, T], sample by
        sample, in pieces of ``HEAD_TOKENS`` tokens.

        Hidden states are kept for as many samples as SPARSELINE_ACTIVATION_BYTES allows; the blocks
        are read once for these. ``watched`` counts the blocks.
        """
        size = rows.shape[1] * self.checkpoint.architecture.width * self.dtype.itemsize
        together = max(1, settings.activation_bytes() // (batch_rows * size)) * batch_rows
        for group in rows.split(together):
            model = BlockModel(self.checkpoint, self.dtype, self.device, storage=allowed_storage(self.device))
            stream = model.embed(group, batch_rows, "dense")
            for index in watched(range(self.checkpoint.architecture.depth)):
                model.advance(model.block(index), index, stream)
            with model.head() as logits:
                for number, count in enumerate(stream.hidden.sizes()):
                    for row in range(count):
                        for piece in stream.hidden.row(number, row)[:, :-1].split(HEAD_TOKENS, 1):
                            yield logits(piece)[0]


class Divergence:
    """KL(dense ‖ own) in nats and whether the most likely token is the same, for every predicted
    token.
    """

    def __init__(self, dense: Iterator[torch.Tensor], reverse: bool) -> None:
        """``dense`` gives logits [t, V] in pieces; ``reverse`` asks for KL(own ‖ dense) too."""
        self.dense, self.reverse = dense, reverse
        self._found: dict[str, list[torch.Tensor]] = {"kl": [], "reverse_kl": [], "agreement": []}

    def add(self, own: torch.Tensor) -> None:
        """Add the next sample's logits [T - 1, V]."""
        at = 0
        while at < len(own):
            dense = next(self.dense)
            self._compare(dense, own[at : at + len(dense)])
            at += len(dense)

    def _compare(self, dense: torch.Tensor, own: torch.Tensor) -> None:
        p, q = dense.float().log_softmax(-1), own.float().log_softmax(-1)
        self._found["kl"].append(_kl(p, q))
        if self.reverse:
            self._found["reverse_kl"].append(_kl(q, p))
        self._found["agreement"].append(p.argmax(-1) == q.argmax(-1))

    def summary(self) -> dict[str, float]:
        """Figures of all rows, also of those that other processes compared. ``kl`` and
        ``reverse_kl`` are means over the tokens; ``kl_99`` and ``reverse_kl_99`` are the smallest
        values that 99% of the tokens do not exceed; ``agreement`` is the share of tokens with the
        same most likely token.
        """
        found: dict[str, float] = {}
        for name, own in self._found.items():
            if pieces := ranks.joined(own):
                values = torch.cat(pieces).double().cpu()
                found[name] = float(values.mean())
                if name != "agreement":
                    found[f"{name}_{PERCENT}"] = float(
                        values.kthvalue(-(-PERCENT * len(values) // 100)).values
                    )
        return found


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) [t] of log-probabilities [t, V]. Values that rounding makes negative become 0.
    Tokens that have probability 0 in both models contribute nothing.
    """
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).nansum(-1).clamp(min=0)
