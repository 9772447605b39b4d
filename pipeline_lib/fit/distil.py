"""Train a pruned model as a whole towards the dense model's next-token distribution. Zeros stay
zero, and quantised weights stay on their grids.

The loss of a token is KL(p‖q): p is the dense model's distribution, q the pruned one's (knowledge
distillation, 1503.02531, at temperature 1). The dense model runs once, block by block; only its
hidden states before the last norm are kept. The trained parameters of the pruned model are in
memory in float32, with Adam's states. A step passes forward and then backward through the blocks,
like ``measure/backward.py``. Each block takes its Adam step as soon as its gradient is complete, so
only one block's gradients are in memory. The last blocks keep their graphs from the forward to the
backward pass, as many as the limits on hidden states allow. The others compute theirs again
(gradient checkpointing, 1604.06174). The first step computes all of them again, and counts their
bytes.

Shape letters: ``B`` samples in a batch, ``T`` tokens per sample, ``D`` channels of the residual
stream, ``V`` tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.adam import adam

from pipeline_lib.core import ranks
from pipeline_lib.core.products import mixed
from pipeline_lib.core.random import generator
from pipeline_lib.core.threads import Map, side_by_side, small
from pipeline_lib.fit.fit import Pairs, added, minibatches
from pipeline_lib.fit.scales import Scales
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.fit.zeros import Zeros
from pipeline_lib.models.architecture import Layout, Matrix
from pipeline_lib.models.places import Storage, allowed_storage
from pipeline_lib.models.stream import HEAD_TOKENS, BlockModel, Stream
from pipeline_lib.solve.grid import Grid
from pipeline_lib.stats.lanes import LANES, deal, share, total

EPSILON = 1e-12  # Adam's ε: gradients of a mean over tokens are small
# hidden states [B, T, D] after the last block -> logits [B, T, V]
Logits = Callable[[torch.Tensor], torch.Tensor]
Tensors = Mapping[str, torch.Tensor]  # tensors of one block, by name


class Trained:
    """One block during training. Parameters that are not trained stay as stored.

    Quantised weights stay on their grids: the grids' scales are trained instead, and the integers
    stay. A scale is trained by the logarithm of a factor, so that it stays positive.
    """

    def __init__(
        self,
        tensors: Tensors,
        masks: Tensors,
        layout: Layout,
        params: DistilParams,
        grids: Mapping[Matrix, Grid] | None = None,
    ) -> None:
        """
        Args:
            tensors: every parameter, on the device.
            masks: of the pruned parameters (bool, True = kept); weights of others do not move.
            grids: of the quantised matrices.
        """
        self.grids = grids or {}
        self.scales = Scales(tensors, self.grids if "weights" in params.parts else {})
        self.started = self.scales.free()
        named = {
            "weights": set(masks) - {matrix.parameter for matrix in self.grids},
            "biases": {m.bias for m in layout.matrices if m.bias is not None and m.parameter in masks},
            "norms": {
                name for name, tensor in tensors.items() if tensor.ndim == 1 and name.endswith("weight")
            },
        }
        moving = sorted(set().union(*(named[part] for part in params.parts)))
        self.params = params
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.leaves = {name: tensors[name].to(torch.float32, copy=True).requires_grad_() for name in moving}
        self.rest = {name: tensor for name, tensor in tensors.items() if name not in self.leaves}
        self.zeros = Zeros({name: mask for name, mask in masks.items() if name in self.leaves})
        self.zeros.hold(self.leaves)
        self.units = self._units(layout.offsets) | dict.fromkeys(self.started, 1.0)
        self.leaves |= {name: torch.zeros_like(one).requires_grad_() for name, one in self.started.items()}
        kind: torch.dtype = getattr(torch, params.state_dtype)
        self.averages = {
            name: [torch.zeros_like(leaf, dtype=kind, requires_grad=False) for _ in range(2)]
            for name, leaf in self.leaves.items()
        }

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the block's computation."""
        return self.scales.joined(self._moved)

    @property
    def _moved(self) -> dict[str, torch.Tensor]:
        """All parameters, and the scales of quantised ones."""
        return {
            **self.rest,
            **self.leaves,
            **{name: one * self.leaves[name].exp() for name, one in self.started.items()},
        }

    @torch.no_grad()
    def _units(self, offsets: Mapping[str, float]) -> dict[str, float]:
        """Root mean square of each leaf's kept entries, offsets included: the unit of its learning
        rate. A leaf of zeros does not move.
        """
        means = []
        for name, leaf in self.leaves.items():
            kept = self.zeros[name].count_nonzero() if name in self.zeros else leaf.new_tensor(leaf.numel())
            means.append((leaf + offsets.get(name, 0.0)).square().sum() / kept.clamp_min(1))
        return dict(zip(self.leaves, torch.stack(means).sqrt().tolist() if means else [], strict=True))

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None], rate: float, done: int) -> None:
        """Take one Adam step after ``done`` others. The gradients are those of the leaves, in
        order, and are overwritten.
        """
        for (name, leaf), gradient in zip(self.leaves.items(), gradients, strict=True):
            if gradient is None or not self.units[name]:
                continue
            gradient = gradient.contiguous()  # the fused kernel does not heed strides
            self.zeros.hold({name: gradient})
            # for float32, the same tensor
            first, second = (average.float() for average in self.averages[name])
            count = torch.full((), float(done), device=leaf.device)
            adam(
                [leaf],
                [gradient],
                [first],
                [second],
                [],
                [count],
                fused=True,
                amsgrad=False,
                beta1=self.params.beta1,
                beta2=self.params.beta2,
                lr=rate * self.units[name],
                weight_decay=0.0,
                eps=EPSILON,
                maximize=False,
            )
            for kept, average in zip(self.averages[name], (first, second), strict=True):
                if kept is not average:
                    kept.copy_(average)
            self.zeros.hold({name: leaf})

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """All tensors in the checkpoint's dtypes. The grids receive the scales, rounded to these
        dtypes.
        """
        found = self.scales.settle(self._moved)
        return {name: tensor.detach().to(self.dtypes[name]) for name, tensor in found.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """The block's state for a resumed run."""
        found = {f"{name}:leaf": leaf.detach() for name, leaf in self.leaves.items()}
        return found | {
            f"{name}:average{place}": one
            for name, both in self.averages.items()
            for place, one in enumerate(both)
        }

    @torch.no_grad()
    def restore(self, state: Tensors) -> None:
        """Continue from ``state``. The units stay those of the original block."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state[f"{name}:leaf"])
            for place, average in enumerate(self.averages[name]):
                average.copy_(state[f"{name}:average{place}"])


@dataclass(frozen=True)
class TrainingData:
    """Training data: hidden states before the first block as inputs, and the dense model's after
    the last block as targets.
    """

    model: BlockModel
    fitting: Pairs
    held_out: Pairs  # for the gate; empty: the gate uses the fitting rows
    storage: Storage | None
    length: int  # tokens of a row

    @property
    def gate(self) -> Pairs:
        return self.held_out if len(self.held_out) else self.fitting

    def steps(self, params: DistilParams) -> int:
        return params.epochs * -(-len(self.fitting) // _batch_rows(self.fitting, params))


def training_data(
    model: BlockModel,
    rows: Mapping[str, torch.Tensor],
    params: DistilParams,
    storage: Storage | None,
    watched: Callable[[range], Iterable[int]] = iter,
) -> TrainingData:
    """Run the dense model, one block in memory at a time: the training split in ``compute_dtype``, the
    held-out split in the model's own.

    Args:
        rows: ``fit`` and ``held_out`` samples [N, T].
        storage: where hidden states are kept: those of all samples twice, and of the held-out split
            once more.

    Raises:
        SparselineError: NaN or infinity after a block.
    """
    fit = deal(len(rows["fit"]), params.batch_rows)
    held_out = deal(len(rows["held_out"]), params.batch_rows, len(fit.sizes))
    every, own = torch.cat([rows["fit"], rows["held_out"]]), fit.own + held_out.own
    before = model.embed(every, fit.sizes + held_out.sizes, "before", storage, own)
    after = before.copy("after")
    cut = len(fit.sizes)
    for index in watched(range(model.checkpoint.architecture.depth)):
        block = model.block(index)
        with mixed(model.device, params.compute_dtype):
            model.advance(block, index, after, fit.own)
        model.advance(block, index, after, held_out.own)
    seen, judging = (
        Pairs(before.hidden[part], after.hidden[part]) for part in (slice(cut), slice(cut, None))
    )
    return TrainingData(model, seen, judging, storage, every.shape[1])


def storage_of(model: BlockModel, rows: Mapping[str, torch.Tensor], directory: Path | None = None) -> Storage:
    """The storage that the settings allow for the hidden states of these rows (``training_data``)."""
    fitting, held_out = (share(rows[name].numel()) for name in ("fit", "held_out"))
    wanted = stream_bytes(fitting, held_out, model.checkpoint.architecture.width, model.dtype.itemsize)
    return allowed_storage(model.device, directory, wanted)


def stream_bytes(fitting: int, held_out: int, width: int, itemsize: int) -> int:
    """Bytes of all hidden states, for these numbers of training and held-out tokens."""
    return (2 * (fitting + held_out) + (held_out or fitting)) * width * itemsize


def train(
    data: TrainingData, blocks: Sequence[Trained], params: DistilParams, done: int = 0
) -> Generator[float, None, None]:
    """Train the blocks in place; yields each step's mean KL in nats per token, which is not finite if
    training diverges.

    Args:
        done: number of steps that the blocks already had.
    """
    fitting, steps = data.fitting, data.steps(params)
    weights = sum(leaf.numel() for block in blocks for leaf in block.leaves.values())
    number = 0
    with data.model.head() as logits, side_by_side(small(data.model.device, weights)) as each_lane:
        room = (data.storage or data.model.storage).room()
        passes = _Passes(data.model, blocks, params, logits, each_lane, room)
        for epoch in range(1, params.epochs + 1):
            random = {lane: generator(params.seed, f"distil:{epoch}:{lane}") for lane in range(LANES)}
            for lanes in minibatches(len(fitting), _batch_rows(fitting, params), random):
                if number >= done:
                    rate = params.rate * rate_share(number, steps, params.warmup)
                    own = [fitting.rows(numbers) for numbers in lanes if fitting.has(numbers[0])]
                    yield passes.step(own, sum(map(len, lanes)) * data.length, rate, number)
                number += 1


def rate_share(done: int, steps: int, warmup: float) -> float:
    """The share of the learning rate after ``done`` of ``steps``: a linear rise over the share
    ``warmup``, then a cosine towards 0.
    """
    rising = round(warmup * steps)
    if done < rising:
        return (done + 1) / (rising + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (done - rising) / (steps - rising))


def held_out_divergence(data: TrainingData, tensors: Callable[[int], Tensors]) -> float:
    """Mean KL in nats per token on the held-out split; NaN or infinite if the model's outputs are.

    Args:
        tensors: a block's number -> its parameters.
    """
    model, rows = data.model, data.gate
    walk = Stream(len(rows.inputs), model.device, data.storage or model.storage, "judged")
    for number in rows.own:
        walk.hidden[number] = rows.inputs[number]
    for index in range(model.checkpoint.architecture.depth):
        model.passed(model.block(index, tensors(index)), index, walk)
    sums: list[torch.Tensor] = []
    with model.head() as logits:
        for number in rows.own:
            found, _ = _divergence(logits, walk.hidden[number], rows.targets[number], None)
            sums += found
    return float(total(sums)) / (len(rows) * data.length)


@dataclass(frozen=True)
class _Passes:
    """Forward and backward passes of one step. Here, a lane is a batch of the step's samples."""

    model: BlockModel
    blocks: Sequence[Trained]
    params: DistilParams
    logits: Logits
    each_lane: Map[Any, Any]
    room: float  # bytes for graphs
    sizes: dict[int, int] = field(default_factory=dict)  # block -> bytes of its graph, from the first step on

    @property
    def first(self) -> int:
        """The first of the blocks that keep their graphs: from the last block down, as many as fit."""
        left, first = self.room, len(self.blocks)
        while first and (size := self.sizes.get(first - 1)) is not None and size <= left:
            left, first = left - size, first - 1
        return first

    def step(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], tokens: int, rate: float, done: int
    ) -> float:
        """Take one optimiser step on the inputs and targets [B, T, D] of each lane of this process,
        and return the mean KL before it. ``tokens`` counts those of all processes.
        """
        states: list[list[Any]] = []
        hidden, first = [one for one, _ in pairs], self.first
        for index in range(len(self.blocks)):
            states.append(self._up(index, hidden, index >= first))
            hidden = [out.detach() for _, out in states[-1]]
            if index < first:
                states[-1] = [(x, None) for x, _ in states[-1]]
        sums: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        with mixed(self.model.device, self.params.compute_dtype):
            for x, (_, target) in zip(hidden, pairs, strict=True):
                found, gradient = _divergence(self.logits, x, target, 1 / tokens)
                sums += found
                gradients.append(gradient)
        del hidden
        mean = math.fsum(torch.stack(ranks.joined(sums)).tolist()) / tokens
        if math.isfinite(mean):
            for index in reversed(range(len(self.blocks))):
                own = self._down(index, states.pop(), gradients)
                self.blocks[index].step(own, rate, done)
        return mean

    def _call(self, index: int, x: torch.Tensor) -> torch.Tensor:
        with mixed(self.model.device, self.params.compute_dtype):  # the autocast state is per thread
            return self.model.call(self.model.templates[index], index, x, self.blocks[index].tensors)

    def _up(
        self, index: int, inputs: Sequence[torch.Tensor], kept: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and outputs of a block; if ``kept``, with the graph between them."""

        def lane(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.set_grad_enabled(kept):
                x = hidden.detach().requires_grad_(kept)
                return x, self._call(index, x)

        with mixed(
            self.model.device, self.params.compute_dtype
        ):  # around all lanes, so that weights are rounded once
            return list(self.each_lane(lane, inputs))

    def _down(
        self, index: int, states: Sequence[tuple[torch.Tensor, Any]], gradients: list[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The gradients of a block's leaves, summed over the lanes in order. The gradients at its
        outputs are replaced by those at its inputs.
        """
        leaves = list(self.blocks[index].leaves.values())
        sizes: list[int] = []  # bytes of each lane's graph

        def lane(given: tuple[tuple[torch.Tensor, Any], torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
            (x, out), gradient = given
            with torch.enable_grad():
                if out is None:
                    x = x.detach().requires_grad_()
                    with nullcontext() if index in self.sizes else _counted([x, *leaves], sizes):
                        out = self._call(index, x)
                return torch.autograd.grad(out, [x, *leaves], gradient.to(out.dtype), allow_unused=True)

        def lanes() -> Iterator[list[torch.Tensor | None]]:
            pairs = list(zip(states, gradients, strict=True))
            for number, (below, *own) in enumerate(self.each_lane(lane, pairs)):
                gradients[number] = below
                yield own
                del below, own

        with mixed(self.model.device, self.params.compute_dtype):
            found = added(lanes())
        self.sizes.setdefault(index, sum(sizes))
        return found


@contextmanager
def _counted(apart: Sequence[torch.Tensor], sizes: list[int]) -> Iterator[None]:
    """Append to ``sizes`` the bytes that autograd saves in this context for a backward pass. What is
    in memory anyway (``apart``) does not count.
    """
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is saved as it is would refer to itself

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield
    for tensor in apart:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    sizes.append(sum(saved.values()))


def _divergence(
    logits: Logits, hidden: torch.Tensor, target: torch.Tensor, scale: float | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """KL(p‖q), summed over the tokens of each row, and ``scale`` times its gradient with respect to
    the hidden states [B, T, D].

    A few tokens are processed at a time, so that only their logits are in memory. The gradient with
    respect to the logits is q − p.

    Args:
        target: the dense model's hidden states [B, T, D], from which the same head computes p.
        scale: None: no gradient is computed, and an empty tensor takes its place.
    """
    sums, rows = [], []
    for row, wanted in zip(hidden.split(1), target.split(1), strict=True):
        losses, pieces = [], []
        for piece, goal in zip(row.split(HEAD_TOKENS, 1), wanted.split(HEAD_TOKENS, 1), strict=True):
            with torch.set_grad_enabled(scale is not None):
                x = piece.detach().requires_grad_(scale is not None)
                scores = logits(x)
            with torch.no_grad():
                log_p, log_q = (one.float().log_softmax(-1) for one in (logits(goal), scores.detach()))
                p = log_p.exp()
                losses.append(log_p.sub_(log_q).mul_(p).sum(-1, dtype=torch.float64).sum())
                if scale is not None:
                    pieces.append(
                        torch.autograd.grad(scores, x, log_q.exp_().sub_(p).mul_(scale).to(scores.dtype))[0]
                    )
            del scores, log_p, log_q, p  # free before the next tokens
        sums.append(torch.stack(losses).sum())
        rows += [torch.cat(pieces, 1)] if pieces else []
    return sums, torch.cat(rows) if rows else hidden.new_zeros(0)


def _batch_rows(rows: Pairs, params: DistilParams) -> int:
    return min(params.batch_rows, LANES * rows.widest)  # a pass has no more rows of a lane than elsewhere
