"""Sensitivity of logical matrices: the trace of the cross-entropy Hessian by Hutchinson's estimator (2310.09499, Eqs. 5–6)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline_lib.models.architecture import Matrix
from pipeline_lib.params import Params
from pipeline_lib.runtime import generator


class SensitivityParams(Params):
    """Section ``sensitivity``."""

    probes: int = Field(ge=2)
    rows_per_probe: int = Field(ge=1)
    distribution: Literal["rademacher", "gaussian"]
    seed: int


def probe_vector(name: str, like: torch.Tensor, params: SensitivityParams, probe: int) -> torch.Tensor:
    """z of the parameter's shape with E[zzᵀ] = 1, keyed by seed, parameter and probe."""
    random = generator(params.seed, f"{name}:{probe}")
    if params.distribution == "gaussian":
        return torch.randn(like.shape, generator=random).to(like)
    return (torch.randint(0, 2, like.shape, generator=random).float() * 2 - 1).to(like)


def traces(
    loss: Callable[[int], torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    matrices: Mapping[str, tuple[str, Matrix]],
    params: SensitivityParams,
) -> Iterator[dict[str, float]]:
    """For each probe, zᵀHz / n per logical matrix: an unbiased sample of its mean Hessian diagonal Tr(H)/n.

    One Hessian-vector product serves all matrices: z is drawn for all at once, and the cross terms vanish in expectation.

    The graph of both backward passes is in memory at once, so it grows with depth, width and tokens of a probe; checkpointing does
    not help, since the second pass keeps what the first one recomputed.

    Args:
        loss: the mean cross-entropy [nats/token] on the probe's rows, differentiable twice in ``parameters``.
        parameters: every parameter that holds a logical matrix.
        matrices: logical name -> (parameter name, matrix).
    """
    names = sorted(parameters)
    tensors = [parameters[name] for name in names]
    for probe in range(params.probes):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no double backward on the CPU
            gradients = torch.autograd.grad(loss(probe), tensors, create_graph=True)
            z = [probe_vector(name, tensor, params, probe) for name, tensor in zip(names, tensors, strict=True)]
            products = torch.autograd.grad(gradients, tensors, grad_outputs=z)
        quadratic = {name: zi * hz for name, zi, hz in zip(names, z, products, strict=True)}
        yield {name: float(matrix.view(quadratic[parameter]).double().mean()) for name, (parameter, matrix) in matrices.items()}


def summarise(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean over probes and its standard error, per matrix; ``sensitivity`` is the mean, but not below its error."""
    summary = {}
    for name in samples[0]:
        values = torch.tensor([sample[name] for sample in samples], dtype=torch.float64)
        trace, stderr = float(values.mean()), float(values.std() / len(values) ** 0.5)
        summary[name] = {"trace": trace, "stderr": stderr, "sensitivity": max(trace, stderr)}
    return summary
