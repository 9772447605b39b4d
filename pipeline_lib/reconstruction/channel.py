"""Channel compensation: per-channel in/out factors and bias corrections fitted to the dense block's output, then folded.

Source: 2602.21652, Eqs. 6–8, in the role that acts on a fixed mask (docs/method.md): Ŵ = diag(r)(W⊙M)diag(a), b̂ = b + β, so
that the sparse block, fed by the pruned stream, gives what the dense block gives for the dense stream.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from pipeline_lib.induction.spectral import Norm, SpectralParams, regulariser
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.params import Params
from pipeline_lib.runtime import generator

Run = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]  # hidden states, the block's tensors -> output


class ChannelParams(Params):
    """Section ``prune.reconstruction.channel``."""

    epochs: int = Field(ge=1)
    parts: list[Literal["factors", "biases", "norms"]] = Field(min_length=1)
    rate: float = Field(gt=0)
    bias_rate: float = Field(gt=0)
    batch_rows: int = Field(ge=1)
    patience: int = Field(ge=1)
    limit: float = Field(gt=0)
    compute_dtype: Literal["float32", "bfloat16"]
    spectral: SpectralParams
    seed: int


@dataclass(frozen=True)
class Stage:
    """Rows before and wanted after a block: pruned stream [B, T, D] and dense targets [B, T, D], batch by batch."""

    inputs: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]


class _Factors:
    """log a, log r per matrix, β per bias, log factors of the norms' weights; all zero is the identity."""

    def __init__(self, matrices: Sequence[Matrix], tensors: Mapping[str, torch.Tensor], parts: Sequence[str]) -> None:
        self.matrices = matrices
        views = [matrix.view(tensors[matrix.parameter]) for matrix in matrices]
        device = views[0].device
        self.rows = [torch.zeros(view.shape[0], device=device, requires_grad=True) for view in views]
        self.columns = [torch.zeros(view.shape[1], device=device, requires_grad=True) for view in views]
        biases = {m.bias for m in matrices if m.bias is not None} if "biases" in parts else set()
        norms = {n for n, t in tensors.items() if t.ndim == 1 and n.endswith("weight")} if "norms" in parts else set()
        self.biases = {name: torch.zeros_like(tensors[name], requires_grad=True) for name in sorted(biases)}
        self.norms = {name: torch.zeros_like(tensors[name], requires_grad=True) for name in sorted(norms)}
        self.log_factors = [*(self.rows + self.columns if "factors" in parts else ()), *self.norms.values()]

    def groups(self, params: ChannelParams) -> list[dict[str, Any]]:
        """What Adam moves: log factors at one rate, biases (which have the outputs' scale) at another."""
        groups = [{"params": self.log_factors, "lr": params.rate}, {"params": list(self.biases.values()), "lr": params.bias_rate}]
        return [group for group in groups if group["params"]]

    def apply(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's tensors with factors and corrections folded in; differentiable."""
        changed: dict[str, torch.Tensor] = {}
        for matrix, rows, columns in zip(self.matrices, self.rows, self.columns, strict=True):
            whole = changed.get(matrix.parameter, tensors[matrix.parameter])
            scaled = matrix.view(whole) * (rows[:, None] + columns).exp()
            if matrix.rows is None and matrix.expert is None:
                changed[matrix.parameter] = scaled.T if matrix.transposed else scaled
            else:
                whole = whole.clone()
                matrix.view(whole).copy_(scaled)
                changed[matrix.parameter] = whole
        changed |= {bias: tensors[bias] + correction for bias, correction in self.biases.items()}
        changed |= {norm: tensors[norm] * log_factor.exp() for norm, log_factor in self.norms.items()}
        return {**tensors, **changed}


def block_error(run: Run, tensors: Mapping[str, torch.Tensor], rows: Stage) -> float:
    """E‖Y_dense − Y_sparse‖² / E‖Y_dense − E Y_dense‖² over the given rows."""
    wrong = scale = 0.0
    tokens = sum(target.shape[0] * target.shape[1] for target in rows.targets)
    mean = torch.stack([target.float().sum((0, 1)) for target in rows.targets]).sum(0) / tokens
    with torch.no_grad():
        for hidden, target in zip(rows.inputs, rows.targets, strict=True):
            wrong += float((run(hidden, tensors) - target).float().square().sum())
            scale += float((target - mean).float().square().sum())
    return wrong / max(scale, 1e-30)


def fit(
    run: Run,
    tensors: Mapping[str, torch.Tensor],
    matrices: Sequence[Matrix],
    fitting: Stage,
    held_out: Stage,
    params: ChannelParams,
    where: str,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Fit the factors of one sparse block and fold them; the unfitted block is a candidate and wins ties on the held-out rows.

    Gradients are taken in ``compute_dtype`` (mixed precision), the factors and everything that judges them in float32.

    Args:
        run: the block's output [B, T, D] for hidden states and the block's tensors.
        tensors: the sparse block's parameters in float32.
        matrices: the pruned ones, which get factors.

    Returns:
        The block's tensors, zeros where they were, and errors before/after on the held-out rows and the first fitting batch, with the epochs kept.
    """

    gate = held_out if held_out.inputs else fitting
    seen = Stage(fitting.inputs[:1], fitting.targets[:1])  # what the curve needs; the gate's rows decide
    facts = {"fit_before": block_error(run, tensors, seen), "held_out_before": block_error(run, tensors, gate)}
    best, best_error, best_epoch, unimproved = dict(tensors), facts["held_out_before"], 0, 0
    factors = _Factors(matrices, tensors, params.parts)
    groups = factors.groups(params)
    if not groups:  # nothing to move, such as biases in a block without any
        return dict(tensors), facts | {"fit_after": facts["fit_before"], "held_out_after": best_error, "epochs": 0}
    optimiser = torch.optim.Adam(groups)
    penalised = matrices if params.spectral.weight else ()
    norms = [Norm(matrix.view(tensors[matrix.parameter]), params.spectral) for matrix in penalised]
    variance = sum(float(target.float().var()) for target in fitting.targets) / len(fitting.targets)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: 0.55 + 0.45 * math.cos(math.pi * done / params.epochs))
    for epoch in range(1, params.epochs + 1):
        for hidden, target in _minibatches(fitting, params, f"{where}:{epoch}"):
            values = factors.apply(tensors)
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=params.compute_dtype == "bfloat16"):
                out = run(hidden, values)
            loss = (out.float() - target).square().mean() / variance
            if norms:
                current = [matrix.view(values[matrix.parameter]) for matrix in matrices]
                loss = loss + params.spectral.weight * regulariser(norms, current, params.spectral)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for leaf in factors.log_factors:
                    leaf.clamp_(-params.limit, params.limit)
        schedule.step()
        with torch.no_grad():
            candidate = factors.apply(tensors)
        error = block_error(run, candidate, gate)
        if error < best_error:
            best, best_error, best_epoch, unimproved = candidate, error, epoch, 0
        else:
            unimproved += 1
        if unimproved >= params.patience:
            break
    facts |= {"fit_after": block_error(run, best, seen), "held_out_after": best_error, "epochs": best_epoch}
    return {name: tensor.detach() for name, tensor in best.items()}, facts


def _minibatches(rows: Stage, params: ChannelParams, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ``batch_rows`` rows in an order keyed by seed, block and epoch; each is drawn from within one stored batch."""
    random = generator(params.seed, name)
    for number in torch.randperm(len(rows.inputs), generator=random).tolist():
        hidden, target = rows.inputs[number], rows.targets[number]
        for pick in torch.randperm(len(hidden), generator=random).split(params.batch_rows):
            yield hidden[pick], target[pick]
