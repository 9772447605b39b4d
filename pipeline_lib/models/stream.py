"""Run a model block by block. The peak memory is one or two blocks plus the activations, independent
of depth.

Shape letters: ``B`` samples in a batch, ``T`` tokens per sample, ``D`` channels of the residual
stream, ``V`` tokens of the vocabulary.
"""

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.products import Products, rounded, rounding
from pipeline_lib.core.threads import PARTS, side_by_side, small
from pipeline_lib.models.architecture import Site
from pipeline_lib.models.checkpoint import Checkpoint, skeleton
from pipeline_lib.models.conversion import Piece, assembled, disassembled
from pipeline_lib.models.places import Batches, Storage
from pipeline_lib.models.products import Parameters, Product, Watched

HEAD_TOKENS = 256  # tokens with logits in memory at a time: enough for a product to run at full speed
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional (after the hidden states) and named


class _Recorder(nn.Module):
    """A stand-in for a block. It passes its inputs and arguments to ``note``, and returns the hidden
    states that ``note`` returns, in the format of the block's output.
    """

    def __init__(
        self, note: Callable[[torch.Tensor, Arguments], torch.Tensor], block: nn.Module, returns: int
    ) -> None:
        super().__init__()
        self.note, self.returns = note, returns
        self._block = [block]  # in a list, so that it is not a submodule

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.note(hidden, (args, kwargs))
        return (given, *[None] * (self.returns - 1)) if self.returns else given

    def __getattr__(self, name: str) -> Any:
        """An attribute of the block: some models read the kind of their blocks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)


class Stream:
    """Hidden states [B, T, D] of all batches before some block, in order. Each block overwrites them.
    ``storage`` determines where they are stored.
    """

    def __init__(
        self,
        batches: int,
        device: torch.device,
        storage: Storage,
        name: str = "",
        sizes: Sequence[int] | None = None,
    ) -> None:
        """``sizes``: see ``Batches``."""
        self.device, self.storage = device, storage
        self.hidden = Batches(batches, device, storage, name, sizes)

    def copy(self, name: str = "") -> "Stream":
        """A second stream with the same hidden states."""
        other = Stream(len(self.hidden), self.device, self.storage, name, self.hidden.sizes())
        for number in self.hidden.own:
            other.hidden[number] = self.hidden[number]
        return other


class BlockModel:
    """A checkpoint with only the requested parts in memory: embeddings, single blocks, or the head.

    ``products`` is the precision of float32 products on a GPU while blocks run. It also applies to the
    statistics collected meanwhile. ``storage`` is the default for streams (None: on the device).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        products: Products = "float32",
        storage: Storage | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.products = products
        self.storage = storage or Storage()
        self.whole = skeleton(checkpoint.config, dtype, checkpoint.remote_code).eval().requires_grad_(False)
        self.base: nn.Module = self.whole.base_model
        self.templates = list(self.base.get_submodule(checkpoint.architecture.blocks))
        # per block: whether threads pass batches through it side by side
        self.small = [
            small(device, sum(map(torch.Tensor.numel, each.parameters()))) for each in self.templates
        ]
        self._own = threading.local()
        self.length = 0  # tokens in a row, on which the arguments below depend
        self._arguments: dict[int, list[Arguments]] = {}  # rows in a batch -> the arguments of each block
        self._made_of: dict[int, dict[str, tuple[Piece, ...]]] = {}  # block -> pieces of its parameters

    def embed(
        self,
        rows: torch.Tensor,
        batch_rows: int | list[int],
        name: str = "",
        storage: Storage | None = None,
        own: Collection[int] | None = None,
    ) -> Stream:
        """The stream before the first block, for samples [N, T]. Each block's other arguments are
        recorded.

        Batches have ``batch_rows`` samples, or the sizes in the list. Only batches whose numbers are
        in ``own`` are embedded; None: all.
        """
        if rows.shape[1] != self.length:
            self.length, self._arguments = rows.shape[1], {}
        with self._outside_blocks(head=False):
            if 1 not in self._arguments:
                self._note(rows[:1])
            batches = rows.split(batch_rows)
            sizes = [len(batch) for batch in batches]
            stream = Stream(len(batches), self.device, storage or self.storage, name, sizes)
            for number, batch in enumerate(batches):
                if own is None or number in own:
                    stream.hidden[number] = self._note(batch)
            return stream

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """While open, a function from hidden states [B, T, D] after the last block to logits [B, T, V],
        differentiable in the hidden states.

        transformers' own code computes the logits, including last norm, projection and scaling.
        ``embed`` must be called first.
        """

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            with self._standing_in(lambda _hidden, _arguments: hidden):
                any_tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
                return self.whole(input_ids=any_tokens, use_cache=False).logits

        with self._outside_blocks(head=True):
            yield logits

    @contextmanager
    def _outside_blocks(self, head: bool) -> Iterator[None]:
        """While open, keep the parameters outside the blocks in memory: the embeddings, the last norm
        and, if ``head``, the head.
        """
        base = "" if self.base is self.whole else f"{self.whole.base_model_prefix}."
        blocks, unread = f"{base}{self.checkpoint.architecture.blocks}.", self.checkpoint.unread
        pieces = {
            full: own for full, own in self.checkpoint.pieces.items() if full.startswith("" if head else base)
        }
        pieces = {
            full: own
            for full, own in pieces.items()
            if not full.startswith(blocks) and own[0].stored not in unread
        }
        names = sorted({piece.stored for own in pieces.values() for piece in own})
        tensors = {name: self._computing(tensor) for name, tensor in self.checkpoint.read(names)}
        whole = {full: assembled(own, tensors) for full, own in pieces.items()}
        del tensors
        try:
            self.whole.load_state_dict(whole, strict=False, assign=True)
            self._buffers_to_device()
            yield
        finally:
            self.whole.load_state_dict(
                {full: tensor.to("meta") for full, tensor in whole.items()}, strict=False, assign=True
            )

    def _computing(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; in the computing dtype, unless it contains integers."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    @contextmanager
    def _standing_in(self, note: Callable[[torch.Tensor, Arguments], torch.Tensor]) -> Iterator[None]:
        """While open, replace the blocks by recorders."""
        path, _, last = self.checkpoint.architecture.blocks.rpartition(".")
        holder = self.base.get_submodule(path)
        returns = self.checkpoint.architecture.returns
        setattr(holder, last, nn.ModuleList(_Recorder(note, block, returns) for block in self.templates))
        try:
            yield
        finally:
            setattr(holder, last, nn.ModuleList(self.templates))

    @torch.no_grad()
    def _note(self, batch: torch.Tensor) -> torch.Tensor:
        """The hidden states [B, T, D] before the first block for samples [B, T]. Every block's arguments
        are recorded.
        """
        inputs: list[torch.Tensor] = []
        noted: list[Arguments] = []

        def note(hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
            inputs.append(hidden)
            noted.append(arguments)
            return hidden

        with self._standing_in(note):
            self.base(input_ids=batch.to(self.device), use_cache=False)
        self._arguments[len(batch)] = noted
        return inputs[0].detach()

    def _buffers_to_device(self) -> None:
        for module in self.base.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def block(self, index: int, tensors: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """A block in the computing dtype, with the checkpoint's tensors or with ``tensors`` (as in the
        files; names relative to the block).
        """
        tensors = self.checkpoint.block(index) if tensors is None else tensors
        block = copy.deepcopy(self.templates[index])
        given = {name: self._computing(tensor) for name, tensor in tensors.items()}
        block.load_state_dict(
            {name: assembled(own, given) for name, own in self._pieces(index).items()}, assign=True
        )
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        block.eval()
        return block.requires_grad_(False)

    def stored(self, block: nn.Module, index: int) -> dict[str, torch.Tensor]:
        """A block's tensors in the form of the files, in the computing dtype."""
        return disassembled(self._pieces(index), dict(block.named_parameters()))

    def _pieces(self, index: int) -> dict[str, tuple[Piece, ...]]:
        if index not in self._made_of:
            self._made_of[index] = self.checkpoint.block_pieces(index)
        return self._made_of[index]

    def arguments(self, index: int, rows: int) -> Arguments:
        """The arguments of block ``index`` besides the hidden states, for a batch of ``rows`` samples.
        They depend on positions, not on tokens.
        """
        if rows not in self._arguments:
            larger = self._arguments[min(size for size in self._arguments if size > rows)]
            self._arguments[rows] = _narrow(larger, self._arguments[1], rows)
        return self._arguments[rows][index]

    def call(
        self,
        block: nn.Module,
        index: int,
        hidden: torch.Tensor,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The output [B, T, D] of a block for hidden states [B, T, D]. ``tensors`` replace the block's
        own; the output is differentiable in them.
        """
        args, kwargs = self.arguments(index, len(hidden))
        if tensors is None:
            with self._products(index):
                out = block(hidden, *args, **kwargs)
        else:
            own, given = (
                dict(block.named_parameters()),
                {name: self._computing(tensor) for name, tensor in tensors.items()},
            )
            moved = {
                name: assembled(pieces, given, own.get(name))
                for name, pieces in self._pieces(index).items()
                if any(piece.stored in given for piece in pieces)
            }
            with self._products(index):
                out = functional_call(self.own_copy(block), moved, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple | list) else out

    @contextmanager
    def _products(self, index: int) -> Iterator[None]:
        """While open, products use the same library and rounding in every pass through this block. A
        small block uses the library of ``side_by_side``.
        """
        with rounded(self.device, self.products), rounding(False) if self.small[index] else nullcontext():
            yield

    def own_copy(self, block: nn.Module) -> nn.Module:
        """The block, or in other threads than the main one a copy that shares its tensors. Threads need
        their own modules, because hooks and ``functional_call`` change a module while it runs.
        """
        if threading.current_thread() is threading.main_thread():
            return block
        copies: dict[nn.Module, nn.Module] = self._own.__dict__.setdefault("copies", {})
        if block not in copies:
            copies[block] = copy.deepcopy(
                block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
            )
        return copies[block]

    def advance(
        self, block: nn.Module, index: int, stream: Stream, numbers: Iterable[int] | None = None
    ) -> None:
        """Pass the stream through a block: all batches, or those with these numbers.

        Raises:
            SparselineError: the block's output contains NaN or infinity. It is raised after all
                batches have passed.
        """
        self.check_finite(index, self.passed(block, index, stream, numbers))

    def passed(
        self, block: nn.Module, index: int, stream: Stream, numbers: Iterable[int] | None = None
    ) -> torch.Tensor:
        """Like ``advance``, but without ``check_finite``.

        Returns:
            The smallest and the largest output of each batch, on the device. Both are NaN if the
            output contains NaN.
        """

        @torch.no_grad()
        def through(part: Iterable[int]) -> list[torch.Tensor]:
            own = self.own_copy(block)
            bounds: list[torch.Tensor] = []
            for number in part:
                stream.hidden[number] = out = self.call(own, index, stream.hidden[number])
                bounds += out.aminmax()
            return bounds

        if numbers is not None:
            bounds = through(numbers)
        else:
            own = stream.hidden.own
            cuts = [len(own) * part // PARTS for part in range(PARTS + 1)]
            parts = [own[first:last] for first, last in pairwise(cuts)]
            with side_by_side(self.small[index]) as each:
                bounds = [bound for part in each(through, parts) for bound in part]
        return torch.stack(bounds) if bounds else torch.zeros(0, device=self.device)

    def check_finite(self, index: int, hidden: torch.Tensor) -> None:
        """Refuse NaN and infinity in a block's output, or in its bounds.

        Raises:
            SparselineError: ``hidden`` contains NaN or infinity.
        """
        if not torch.isfinite(hidden).all():
            name = f"{self.checkpoint.architecture.blocks}.{index}"
            raise SparselineError(
                f"Activations after {name} contain NaN or infinity; check the model, or compute in float32."
            )


def _narrow(value: Any, single: Any, rows: int) -> Any:
    """``value``, the arguments recorded for a larger batch, narrowed to ``rows`` samples. ``single`` are
    the arguments for one sample. Dimensions in which the two differ are those of the samples.

    The sizes of ``value`` alone do not identify these dimensions: B can equal T, and ALiBi has the
    shape [B · heads, 1, T].
    """
    if isinstance(value, torch.Tensor):
        for axis, (size, one) in enumerate(zip(value.shape, single.shape, strict=True)):
            value = value if size == one else value.narrow(axis, 0, rows * one)
    elif isinstance(value, dict):
        return {name: _narrow(part, single[name], rows) for name, part in value.items()}
    elif isinstance(value, tuple | list):
        return type(value)(_narrow(part, one, rows) for part, one in zip(value, single, strict=True))
    return value


Take = Callable[
    [Site, torch.Tensor, torch.Tensor | None], None
]  # the site; X [..., d], or [n, d] for an expert's tokens; the router weights [n] of the expert's outputs


@contextmanager
def tapped(block: nn.Module, sites: Iterable[Site], take: Take) -> Iterator[None]:
    """While open, call ``take`` with the inputs X of each site whenever the block runs. For an expert's
    site, X contains only the tokens that are routed to this expert.
    """
    wanted = {(site.parameter, site.expert): site for site in sites}
    named = dict(block.named_parameters())
    routed: dict[str, Routes] = {}

    def see(product: Product) -> None:
        site = wanted.get((product.part.parameter, product.part.expert))
        if site is None:
            return
        x, weights = product.inputs, None
        if site.pool is not None:
            x = x.reshape(-1, x.shape[-1])
            routes = routed.get(site.parameter.rpartition(".")[0])
            weights = None if routes is None else routes.weights(site.expert or 0, len(x))
            if weights is None:  # every expert gets every token; those routed elsewhere are zeros
                x = x[x.ne(0).any(1)]
        take(site, x, weights)

    handles = []
    for path in {site.parameter.rpartition(".")[0] for site in wanted.values() if site.expert is not None}:

        def note(_module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            # hidden states, numbers of the chosen experts, their weights
            if len(args) == 3 and all(isinstance(arg, torch.Tensor) for arg in args):
                routed[path] = Routes(args[1], args[2])

        handles.append(block.get_submodule(path).register_forward_pre_hook(note))
    try:
        with Watched(Parameters({name: named[name] for name, _ in wanted}), see):
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Routes:
    """A router's choice of experts for each token, and the weights of these. Both are [tokens, chosen],
    as transformers passes them to its experts.
    """

    chosen: torch.Tensor
    weight: torch.Tensor

    def weights(self, expert: int, count: int) -> torch.Tensor | None:
        """The router weights of an expert's tokens, in the order of transformers' loop over experts; None
        if their number is not ``count``.
        """
        if self.chosen.shape != self.weight.shape:
            return None
        found = self.weight.T[expert == self.chosen.T]
        return found if len(found) == count else None
