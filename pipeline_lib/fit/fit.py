"""Train the remaining weights of a pruned block so that its output on the pruned model's activations
matches the dense model's.

Trained parts: the kept weights, biases, the norms' weights, and per-channel input and output
factors that are folded afterwards, Ŵ = diag(r)(W⊙M)diag(a) (2602.21652, Eqs. 6–8, for a fixed mask:
docs/method.md). Zeros stay zero.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch

from pipeline_lib.core import ranks
from pipeline_lib.core.products import mixed
from pipeline_lib.core.random import generator
from pipeline_lib.core.threads import Map, side_by_side, small
from pipeline_lib.fit.settings import FinetuneParams, FitParams
from pipeline_lib.fit.spectral import Norm, regulariser
from pipeline_lib.models.architecture import Matrix, laid
from pipeline_lib.models.places import Batches
from pipeline_lib.stats.lanes import LANES, fold_for, parts, total

# hidden states, the block's tensors -> output
Run = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
Masks = dict[Matrix, torch.Tensor]  # [R, C] bool, True = kept
# the block's tensors, zeros filled in -> masks with as many kept
Remask = Callable[[Mapping[str, torch.Tensor]], Masks]


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets of a block: pruned activations [B, T, D] and dense outputs [B, T, D], batch
    by batch.
    """

    inputs: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]

    @cached_property
    def borders(self) -> list[int]:
        """The number of each batch's first sample, and the number of all samples at the end."""
        sizes = (
            self.inputs.sizes()
            if isinstance(self.inputs, Batches)
            else [len(hidden) for hidden in self.inputs]
        )
        return list(accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self.borders[-1]

    @property
    def own(self) -> Sequence[int]:
        """The numbers of the batches that this process has."""
        return self.inputs.own if isinstance(self.inputs, Batches) else range(len(self.inputs))

    def has(self, row: int) -> bool:
        """Whether this process has a row."""
        return bisect_right(self.borders, row) - 1 in self.own

    @property
    def widest(self) -> int:
        """Samples of the largest batch."""
        return max(stop - start for start, stop in pairwise(self.borders))

    @cached_property
    def spread(self) -> float:
        """Total variance of the targets, the unit of errors."""
        return spread(self.targets)

    def rows(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples of these numbers: inputs and targets, [n, T, D] each."""
        places = [bisect_right(self.borders, number) - 1 for number in numbers]
        found = [
            torch.cat(
                [
                    _row(batches, place, number - self.borders[place])
                    for place, number in zip(places, numbers, strict=True)
                ]
            )
            for batches in (self.inputs, self.targets)
        ]
        return found[0], found[1]


def _row(batches: Sequence[torch.Tensor], place: int, number: int) -> torch.Tensor:
    """One row [1, T, D] of a batch; other rows are not read from storage."""
    return batches.row(place, number) if isinstance(batches, Batches) else batches[place][number : number + 1]


@dataclass(frozen=True)
class Fitted:
    """A block after its fit."""

    tensors: dict[str, torch.Tensor]  # the block's parameters; zeros stay where they were
    masks: Masks | None  # the masks chosen anew; None: unchanged
    # errors before and after, on held-out rows and on the first fitting batch; number of epochs kept
    facts: dict[str, float]


@dataclass(frozen=True)
class Sparse:
    """A sparse block, or a window of blocks, before its fit."""

    run: Run
    # float32; ``fit`` removes the matrices that it trains, so that memory holds them only once
    tensors: dict[str, torch.Tensor]
    masks: Masks  # of the pruned matrices, which get factors; a kept weight moves even if it is zero
    where: str  # its name; with the seed, it determines the order of rows
    # chooses new masks in the first ``refresh_epochs`` epochs, in which pruned weights are trained
    # too, behind their masks
    remask: Remask | None = None
    dtype: torch.dtype | None = None  # the dtype to which ``run`` converts its tensors, if it differs
    # offsets of the norms' weights that act as offset + w (``Architecture.offsets``)
    offsets: Mapping[str, float] | None = None


class _StraightThrough(torch.autograd.Function):
    """W⊙M whose gradient also reaches the pruned weights."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return outputs[0], None


class _Free:
    """The trained parameters: kept weights; log a and log r per matrix; β per bias; log factors of
    the norms. Initially they change nothing.
    """

    def __init__(
        self,
        masks: Masks,
        tensors: Mapping[str, torch.Tensor],
        parts: Sequence[str],
        dtype: torch.dtype | None = None,
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        self.matrices = list(masks)
        self.dtype = dtype  # dtype of the masked weights in training passes; None: unchanged
        self.offsets = offsets or {}
        views = [matrix.view(tensors[matrix.parameter]) for matrix in masks]
        self.device = device = views[0].device
        self.rows = [torch.zeros(view.shape[0], device=device, requires_grad=True) for view in views]
        self.columns = [torch.zeros(view.shape[1], device=device, requires_grad=True) for view in views]
        biases = {m.bias for m in masks if m.bias is not None} if "biases" in parts else set()
        norms = (
            {n for n, t in tensors.items() if t.ndim == 1 and n.endswith("weight")}
            if "norms" in parts
            else set()
        )
        # the scales of quantised matrices are trained by log factors, too
        norms |= {n for n in tensors if n.endswith(".scale")} if "scales" in parts else set()
        self.biases = {name: torch.zeros_like(tensors[name], requires_grad=True) for name in sorted(biases)}
        self.norms = {name: torch.zeros_like(tensors[name], requires_grad=True) for name in sorted(norms)}
        self.factors = "factors" in parts
        self.weights = (
            [view.clone().contiguous().requires_grad_(True) for view in views] if "weights" in parts else []
        )
        self.kept = [mask.to(device) for mask in masks.values()] if "weights" in parts else []
        self.refreshing = False  # pruned weights are trained too, behind their masks

    @property
    def log_factors(self) -> list[torch.Tensor]:
        return [*(self.rows + self.columns if self.factors else ()), *self.norms.values()]

    def groups(self, params: FitParams) -> list[dict[str, Any]]:
        """Adam's parameter groups. Log factors and weights have one rate, the weights' in units of
        their matrix's scale. Biases, which have the outputs' scale, have another rate.
        """
        means = [
            weight.detach().square().sum() / kept.count_nonzero().clamp_min(1)
            for weight, kept in self._pairs()
        ]
        scales = torch.stack(means).sqrt().tolist() if means else []  # one transfer from the device
        groups = [
            {"params": [w], "lr": params.rate * scale}
            for w, scale in zip(self.weights, scales, strict=True)
            if scale
        ]
        groups += [
            {"params": self.log_factors, "lr": params.rate},
            {"params": list(self.biases.values()), "lr": params.bias_rate},
        ]
        return [group for group in groups if group["params"]]

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.weights, self.kept, strict=True)

    def refresh(self, tensors: Mapping[str, torch.Tensor], remask: Remask) -> None:
        """Choose new masks from the trained weights, pruned ones included."""
        with torch.no_grad():
            masks = remask(self._laid(tensors, [weight.detach() for weight in self.weights]))
        self.kept = [masks[matrix] for matrix in self.matrices]

    def masked(self) -> list[torch.Tensor]:
        """The weights, zero (of either sign) where pruned. A product is several times faster on the
        CPU than filling.
        """
        dtype = self.dtype if torch.is_grad_enabled() else None
        if self.refreshing:
            return [_StraightThrough.apply(weight, kept).to(dtype) for weight, kept in self._pairs()]  # type: ignore[no-untyped-call]
        return [(weight * kept).to(dtype) for weight, kept in self._pairs()]

    def _laid(
        self, tensors: Mapping[str, torch.Tensor], values: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The block's tensors with these logical matrices [R, C] in their places; differentiable."""
        return {**tensors, **laid(self.matrices, values, tensors)}

    def apply(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's tensors with all trained changes; differentiable."""
        values = self.masked() or [matrix.view(tensors[matrix.parameter]) for matrix in self.matrices]
        if self.factors:
            scales = [
                (rows[:, None] + columns).exp() for rows, columns in zip(self.rows, self.columns, strict=True)
            ]
            values = [value * scale for value, scale in zip(values, scales, strict=True)]
        changed = self._laid(tensors, values) if self.factors or self.weights else dict(tensors)
        changed |= {bias: tensors[bias] + correction for bias, correction in self.biases.items()}
        for norm, log_factor in self.norms.items():
            # A norm that is stored as offset + w: (offset + w)·e^θ − offset, which is w to the last
            # bit at θ = 0.
            changed[norm] = (
                tensors[norm] * log_factor.exp() + self.offsets.get(norm, 0.0) * log_factor.expm1()
            )
        return changed


def block_error(run: Run, tensors: Mapping[str, torch.Tensor], rows: Pairs) -> float:
    """E‖Y_dense − Y_sparse‖² / E‖Y_dense − E Y_dense‖² over the given samples."""
    return _wrong(run, tensors, rows) / rows.spread


def _wrong(
    run: Run, tensors: Mapping[str, torch.Tensor], rows: Pairs, each: Map[int, list[torch.Tensor]] = map
) -> float:
    """Σ‖Y_dense − Y_sparse‖²."""

    @torch.no_grad()  # in the thread that runs it
    def batch(number: int) -> list[torch.Tensor]:
        return squares(run(rows.inputs[number], tensors) - rows.targets[number])

    return float(total([one for found in each(batch, rows.own) for one in found]))


def spread(targets: Sequence[torch.Tensor]) -> float:
    """Σ‖Y − E Y‖² of batches [B, T, D]; E is over tokens."""
    own = Pairs(targets, targets).own
    sums = [row.sum(0, dtype=torch.float64) for number in own for row in targets[number].float()]
    tokens = sum(ranks.joined([targets[number].shape[0] * targets[number].shape[1] for number in own]))
    mean = (total(sums) / tokens).float()
    return max(float(total([one for number in own for one in squares(targets[number] - mean)])), 1e-30)


def squares(values: torch.Tensor) -> list[torch.Tensor]:
    """‖·‖² of each sample of a batch [B, T, D], in float64."""
    return [row.sum(dtype=torch.float64) for row in values.float().square()]


def fit(block: Sparse, fitting: Pairs, held_out: Pairs, params: FitParams) -> Fitted:
    """Train a sparse block (or window of blocks) and fold its factors. The block before the fit is a
    candidate, too, and wins ties on the held-out split.

    Gradients and the gate's forward passes are computed in ``compute_dtype`` (mixed precision); trained
    parameters are float32. With ``weights``, memory holds five copies of the block's matrices: the
    weights, Adam's two moments, the best so far, and the gradient (in the forward pass, the masked
    weights). Masks and a copy in ``compute_dtype`` come on top. Lanes that run in parallel each
    have a gradient and masked weights.

    Args:
        held_out: the samples that decide; without any, the training split decides.
    """
    tensors, masks, remask = block.tensors, block.masks, block.remask

    def run(hidden: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with mixed(hidden.device, params.compute_dtype):
            return block.run(hidden, values).float()

    matrices = list(masks)
    gate = held_out if held_out.inputs else fitting
    # enough for the reported error; the gate's rows decide
    seen = Pairs(fitting.inputs[:1], fitting.targets[:1])
    scale = gate.spread
    facts = {
        "fit_before": block_error(run, tensors, seen),
        "held_out_before": _wrong(run, tensors, gate) / scale,
    }
    best, best_masks, best_error, best_epoch, unimproved = dict(tensors), None, facts["held_out_before"], 0, 0
    free = _Free(masks, tensors, params.parts, block.dtype, block.offsets)
    groups = free.groups(params)
    if not groups:  # nothing to move, such as biases in a block without any
        return Fitted(
            best, None, facts | {"fit_after": facts["fit_before"], "held_out_after": best_error, "epochs": 0}
        )
    for matrix in matrices if free.weights else ():
        if matrix.whole:
            del tensors[matrix.parameter]
    optimiser = torch.optim.Adam(groups, eps=1e-12, fused=True)
    penalised = matrices if params.spectral.weight else ()
    norms = [Norm(matrix.view(best[matrix.parameter]), params.spectral) for matrix in penalised]
    each = fitting.spread / len(fitting)  # variance per row
    # a pass has no more rows of a lane than elsewhere
    batch_rows = min(params.batch_rows, LANES * fitting.widest)
    steps = params.epochs * -(-len(fitting) // batch_rows)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate_share(done, steps))
    refreshed = params.refresh_epochs if isinstance(params, FinetuneParams) and remask is not None else 0
    leaves = [leaf for group in groups for leaf in group["params"]]

    def gradients(lane: tuple[list[int], int]) -> tuple[torch.Tensor | None, ...]:
        """Contribution of a lane's rows to the leaves' gradients. The lane also gives the number of
        rows in this step.
        """
        numbers, count = lane
        hidden, target = fitting.rows(numbers)
        values = free.apply(tensors)
        out = run(hidden, values)
        loss = (out - target).square().sum() / (count * each)
        del values, out  # free what the graph does not need
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    weights = sum(map(torch.Tensor.numel, masks.values()))
    with side_by_side(small(free.device, weights)) as each_lane:
        for epoch in range(1, params.epochs + 1):
            free.refreshing = epoch <= refreshed
            random = {lane: generator(params.seed, f"{block.where}:{epoch}:{lane}") for lane in range(LANES)}
            for lanes in minibatches(len(fitting), batch_rows, random):
                count = sum(map(len, lanes))
                own = [(numbers, count) for numbers in lanes if fitting.has(numbers[0])]
                for leaf, gradient in zip(leaves, added(each_lane(gradients, own)), strict=True):
                    leaf.grad = gradient
                del gradient
                if norms:
                    values = free.apply(tensors)
                    current = [matrix.view(values[matrix.parameter]).float() for matrix in matrices]
                    (params.spectral.weight * regulariser(norms, current, params.spectral)).backward()
                    del values, current
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
                with torch.no_grad():
                    for leaf in free.log_factors:
                        leaf.clamp_(-params.limit, params.limit)
            if free.refreshing and remask is not None:
                free.refresh(tensors, remask)
            with torch.no_grad():
                candidate = free.apply(tensors)
            error = _wrong(run, candidate, gate, each_lane) / scale
            if error < best_error:
                best, best_error, best_epoch, unimproved = candidate, error, epoch, 0
                best_masks = dict(zip(matrices, free.kept, strict=True)) if refreshed else None
            elif not free.refreshing:
                unimproved += 1
            if unimproved >= params.patience:
                break
    facts |= {"fit_after": block_error(run, best, seen), "held_out_after": best_error, "epochs": best_epoch}
    # + 0.0 turns −0.0 into 0.0
    return Fitted({name: tensor.detach() + 0.0 for name, tensor in best.items()}, best_masks, facts)


class Gradients(list[torch.Tensor | None]):
    """Gradients of the leaves, added one by one."""

    def __iadd__(self, other: "Gradients") -> "Gradients":  # type: ignore[override,misc]
        for place, gradient in enumerate(other):
            mine = self[place]
            if gradient is not None:
                self[place] = gradient if mine is None else mine.add_(gradient)
        return self


def added(lanes: Iterable[Iterable[torch.Tensor | None]]) -> Gradients:
    """Sum of the gradients of all lanes, in order, those of other processes included."""
    return fold_for({"": ranks.everyone()}, ({"": Gradients(found)} for found in lanes))[""]


def rate_share(done: int, steps: int) -> float:
    """The share of the learning rate after ``done`` steps: along a cosine, 1 at the first step and a
    tenth at the last one.
    """
    return 0.55 + 0.45 * math.cos(math.pi * done / max(1, steps - 1))


def minibatches(
    rows: int, batch_rows: int, random: Mapping[int, torch.Generator]
) -> Iterator[list[list[int]]]:
    """For each step, the numbers of ``batch_rows`` samples: the lanes take turns, each in its own
    random order.
    """
    orders = []
    for lane, part in enumerate(parts(rows)):
        order = torch.randperm(part.stop - part.start, generator=random[lane]) + part.start
        orders.append([(lane, number) for number in order.tolist()])
    turns = [place for turn in zip_longest(*orders) for place in turn if place is not None]
    for start in range(0, rows, batch_rows):
        chosen = turns[start : start + batch_rows]
        yield [
            numbers for lane in range(LANES) if (numbers := [number for own, number in chosen if own == lane])
        ]
