"""Fine-tuning that keeps zeros: a callback for transformers' Trainer, and a merge of adapters through
the masks.

Masks are the zeros of a model, of a checkpoint or of a bitmask directory. docs/fine-tuning.md shows
how to use them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import load, manifest
from pipeline_lib.fit.zeros import Zeros
from pipeline_lib.models.checkpoint import open_checkpoint, read_config, skeleton
from pipeline_lib.models.conversion import Pieces, assembled, pieces_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WRAPPER, WRAPPED = "base_model.model.", ".base_layer"  # in peft's names of the model's own parameters


def zeros_of(path: Path) -> Zeros:
    """The zeros of a pruned model, by transformers' names of its parameters. Besides a byte per
    weight, one tensor is in memory.

    Args:
        path: an ordinary checkpoint, or a bitmask directory.

    Raises:
        SparselineError: it is neither.
    """
    if (path / manifest.MANIFEST).exists():
        masks = {name: tensor != 0 for name, tensor in load.tensors(path)}
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        pieces: Pieces = pieces_of(skeleton(read_config(path), torch.float32), shapes)
    else:
        checkpoint = open_checkpoint(path)
        masks = {name: tensor != 0 for name, tensor in checkpoint.read(list(checkpoint.files))}
        pieces = checkpoint.pieces
    return Zeros.of(
        {
            full: assembled(own, masks)
            for full, own in pieces.items()
            if all(piece.stored in masks for piece in own)
        }
    )


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's own parameters by transformers' names, also if peft's adapters wrap it."""
    return {
        name.removeprefix(WRAPPER).replace(WRAPPED, ""): tensor for name, tensor in model.named_parameters()
    }


def fitted(zeros: Zeros | None, model: torch.nn.Module) -> Zeros:
    """Zeros on a model's devices.

    Args:
        zeros: the zeros to keep; None: the model's own.

    Raises:
        SparselineError: there are none, or they do not match the model's parameters.
    """
    own = parameters(model)
    zeros = Zeros.of(own) if zeros is None else zeros
    if not list(zeros):
        raise SparselineError(
            "The model has no zeros to keep; give a pruned one, or the zeros of its checkpoint (zeros_of)."
        )
    for name in zeros:
        if name not in own or own[name].shape != zeros[name].shape:
            found = "no such parameter" if name not in own else f"{list(own[name].shape)} in its place"
            raise SparselineError(
                f"The zeros are of {name} {list(zeros[name].shape)}, and the model has {found}; give those of"
                " this model, unsharded."
            )
    return Zeros({name: zeros[name].to(own[name].device) for name in zeros})


class KeepZeros(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Keeps pruned weights at zero while a Trainer trains the others: ``Trainer(...,
    callbacks=[KeepZeros()])``.
    """

    def __init__(self, zeros: Zeros | None = None) -> None:
        """
        Args:
            zeros: the zeros to keep; None: those that the model has when training begins.
        """
        self._zeros = zeros

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """
        Raises:
            SparselineError: as ``fitted``.
        """
        self._zeros = fitted(self._zeros, given["model"])
        self._zeros.hold(parameters(given["model"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Set the gradients of pruned weights to zero, so that they do not enter the optimiser's
        moments.
        """
        gradients = {
            name: one.grad for name, one in parameters(given["model"]).items() if one.grad is not None
        }
        self._held.hold(gradients)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Set pruned weights to zero before another step, an evaluation or a checkpoint reads them."""
        self._held.hold(parameters(given["model"]))

    @property
    def _held(self) -> Zeros:
        assert self._zeros is not None  # training has begun
        return self._zeros


def merge(model: "PeftModel", zeros: Zeros | None = None) -> "PreTrainedModel":
    """The model with its adapters merged into the kept weights; pruned ones stay zero.

    Args:
        zeros: the zeros to keep; None: those of the model below its adapters.

    Raises:
        SparselineError: as ``fitted``.
    """
    zeros = fitted(zeros, model)
    merged: PreTrainedModel = model.merge_and_unload()
    zeros.hold(parameters(merged))
    return merged
