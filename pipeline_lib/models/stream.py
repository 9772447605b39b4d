"""Run a model block by block: the peak memory is one or two blocks plus the activations, whatever the depth.

Shape letters: ``B`` rows in a batch, ``T`` tokens in a row, ``D`` channels of the residual stream.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pipeline_lib.errors import SparselineError
from pipeline_lib.models.checkpoint import Checkpoint, skeleton


class _Recorder(nn.Module):
    """Stands where a block stood: notes the arguments it is called with and passes the hidden states through."""

    def __init__(self, note: Callable[[torch.Tensor, dict[str, Any]], None]) -> None:
        super().__init__()
        self.note = note

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise RuntimeError("blocks are expected to take keyword arguments only, after the hidden states")
        self.note(hidden, kwargs)
        return hidden


@dataclass
class Stream:
    """Hidden states [B, T, D] of every batch before some block, in order; overwritten as the blocks are passed."""

    hidden: list[torch.Tensor]


class BlockModel:
    """A checkpoint of which only the embeddings, and the blocks asked for, are in memory."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.base: nn.Module = skeleton(checkpoint.config, dtype).base_model.eval().requires_grad_(False)
        self.templates = list(self.base.get_submodule(checkpoint.architecture.blocks))
        self._length = 0  # tokens in a row, which the arguments below depend on
        self._arguments: dict[int, list[dict[str, Any]]] = {}  # rows in a batch -> per block, its keyword arguments

    def embed(self, rows: torch.Tensor, batch_rows: int) -> Stream:
        """The stream before the first block, for token rows [N, T]; notes each block's other arguments on the way."""
        prefix = self.checkpoint.prefix
        own = {name for name, _ in self.base.named_parameters() if not name.startswith(f"{self.checkpoint.architecture.blocks}.")}
        names = [prefix + name for name in sorted(own) if prefix + name in self.checkpoint.files]
        state = {name.removeprefix(prefix): tensor.to(self.device, self.dtype) for name, tensor in self.checkpoint.read(names)}
        path, _, last = self.checkpoint.architecture.blocks.rpartition(".")
        holder = self.base.get_submodule(path)
        hidden: list[torch.Tensor] = []
        if rows.shape[1] != self._length:
            self._length, self._arguments = rows.shape[1], {}
        try:
            self.base.load_state_dict(state, strict=False, assign=True)
            self._buffers_to_device()
            for batch in rows.split(batch_rows):
                arguments: list[dict[str, Any]] = []
                inputs: list[torch.Tensor] = []

                def note(states: torch.Tensor, kwargs: dict[str, Any], arguments: Any = arguments, inputs: Any = inputs) -> None:
                    inputs.append(states)
                    arguments.append({**kwargs, "use_cache": False, "past_key_values": None})

                setattr(holder, last, nn.ModuleList(_Recorder(note) for _ in self.templates))
                with torch.no_grad():
                    self.base(input_ids=batch.to(self.device), use_cache=False)
                hidden.append(inputs[0].detach())
                self._arguments[len(batch)] = arguments
        finally:
            setattr(holder, last, nn.ModuleList(self.templates))
            self.base.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, strict=False, assign=True)
        return Stream(hidden)

    def _buffers_to_device(self) -> None:
        for module in self.base.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def block(self, index: int, tensors: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """A block with weights in the computing dtype: the checkpoint's, or the given ones (names relative to the block)."""
        tensors = self.checkpoint.block(index) if tensors is None else tensors
        block = copy.deepcopy(self.templates[index])
        wanted = block.state_dict().keys()  # older conversions store buffers too (rotary_emb.inv_freq)
        state = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items() if name in wanted}
        block.load_state_dict(state, assign=True)
        block.eval()
        return block.requires_grad_(False)

    def arguments(self, index: int, rows: int) -> dict[str, Any]:
        """The keyword arguments that block ``index`` gets for a batch of so many rows (they depend on positions, not on tokens)."""
        if rows not in self._arguments:
            larger = min(size for size in self._arguments if size > rows)
            self._arguments[rows] = [_narrow(arguments, larger, rows) for arguments in self._arguments[larger]]
        return self._arguments[rows][index]

    def call(self, block: nn.Module, index: int, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Output [B, T, D] of a block for hidden states [B, T, D]; differentiably with ``tensors`` in the place of its own."""
        arguments = self.arguments(index, len(hidden))
        if tensors is None:
            out = block(hidden, **arguments)
        else:
            out = functional_call(block, {name: tensor.to(self.dtype) for name, tensor in tensors.items()}, (hidden,), arguments)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, stream: Stream) -> None:
        """Pass the whole stream through a block.

        Raises:
            SparselineError: the block's output holds NaN or infinity.
        """
        for number, hidden in enumerate(stream.hidden):
            stream.hidden[number] = self.call(block, index, hidden)
            if not torch.isfinite(stream.hidden[number]).all():
                name = f"{self.checkpoint.architecture.blocks}.{index}"
                raise SparselineError(f"Activations after {name} hold NaN or infinity; check the model, or compute in float32.")


def _narrow(value: Any, size: int, rows: int) -> Any:
    """``value`` with every tensor that has a batch dimension of ``size`` cut to its first ``rows``."""
    if isinstance(value, torch.Tensor):
        return value[:rows] if value.ndim and value.shape[0] == size else value
    if isinstance(value, dict):
        return {name: _narrow(part, size, rows) for name, part in value.items()}
    return tuple(_narrow(part, size, rows) for part in value) if isinstance(value, tuple) else value


@contextmanager
def tapped(block: nn.Module, modules: Mapping[str, str], take: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While open, ``take(site, X)`` gets the inputs X [tokens, d] of each site's module whenever the block runs."""
    handles = []
    for site, path in modules.items():

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], site: str = site) -> None:
            take(site, inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles.append(block.get_submodule(path).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
