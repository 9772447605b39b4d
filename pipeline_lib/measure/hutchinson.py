"""Trace of the cross-entropy Hessian per logical matrix by Hutchinson's estimator (2310.09499, Eqs.
5–6), block by block.

Symbols: z is the probe over all included parameters θ, L the mean cross-entropy [nats/token], x a
block's inputs [B, T, D], f a block. ẋ = dx/dt along θ + t z, and x̄ = ∂L/∂x; other dots and bars
accordingly. Hz is the tangent of θ̄.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from pipeline_lib.core import ranks
from pipeline_lib.core.random import generator
from pipeline_lib.measure.backward import Logits, Subject, walk
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.stats.lanes import LANES, own_lanes

Tensors = Sequence[torch.Tensor]
State = tuple[torch.Tensor, torch.Tensor]  # a value and its tangent, both [B, T, D]


def probe_vector(
    name: str, like: torch.Tensor, distribution: Literal["rademacher", "gaussian"], seed: int, probe: int
) -> torch.Tensor:
    """z of the parameter's shape with E[zzᵀ] = 1, keyed by seed, parameter and probe."""
    random = generator(seed, f"{name}:{probe}")
    if distribution == "gaussian":
        return torch.randn(like.shape, generator=random).to(like)
    return (torch.randint(0, 2, like.shape, generator=random, dtype=torch.int8) * 2 - 1).to(like)


def push_forward(function: Callable[..., torch.Tensor], inputs: Tensors, tangents: Tensors) -> State:
    """f(u) and its tangent J u̇. The tangent is the derivative of Jᵀ w with respect to w, because
    some blocks have parts without forward-mode derivatives.
    """
    u = [tensor.detach().requires_grad_(True) for tensor in inputs]
    output = function(*u)
    w = torch.zeros_like(output, requires_grad=True)
    gradients = torch.autograd.grad(output, u, w, create_graph=True)
    return output.detach(), torch.autograd.grad(gradients, w, tangents)[0]


def pull_back(
    function: Callable[..., torch.Tensor],
    inputs: Tensors,
    tangents: Tensors,
    gradient: torch.Tensor,
    gradient_tangent: torch.Tensor,
) -> tuple[Tensors, Tensors]:
    """One link of the chain rule for first and second derivatives of L: from a function's output to
    its inputs.

    With φ = ⟨ȳ, f(u)⟩: ū = ∇φ, and its tangent is ∇[⟨∇φ, u̇⟩ + ⟨ȳ̇, f⟩], one double backward pass.

    Args:
        inputs: u, and ``tangents`` u̇ of the same shapes.
        gradient: ȳ = ∂L/∂f, and ``gradient_tangent`` its tangent ȳ̇.

    Returns:
        ū, and the tangents of ū.
    """
    u = [tensor.detach().requires_grad_(True) for tensor in inputs]
    output = function(*u)
    gradients = torch.autograd.grad(output, u, gradient, create_graph=True)
    products = torch.autograd.grad((*gradients, output), u, (*tangents, gradient_tangent))
    return [tensor.detach() for tensor in gradients], products


class _Product:
    """The Hessian-vector products of a group of probes, reduced to zᵀHz / n per matrix as soon as a
    block's are known.
    """

    def __init__(self, subject: Subject, params: SensitivityParams, probes: Sequence[int]) -> None:
        self.subject, self.params, self.probes = subject, params, probes
        self.batches = [subject.batch(probe, params.rows_per_probe) for probe in probes]
        # on the device: reading the numbers waits for it
        self.means: list[dict[str, torch.Tensor]] = [{} for _ in probes]

    def enter(self, hidden: torch.Tensor) -> State:
        return hidden, torch.zeros_like(hidden)  # embeddings are not probed

    def directions(
        self, tensors: Mapping[str, torch.Tensor], index: int, number: int
    ) -> dict[str, torch.Tensor]:
        """The probe z for each of the block's tensors that holds an included matrix."""
        names = sorted({matrix.parameter for matrix in self.subject.matrices[index].values()})
        path = f"{self.subject.model.checkpoint.architecture.blocks}.{index}"
        distribution, seed = self.params.distribution, self.params.seed
        return {
            n: probe_vector(f"{path}.{n}", tensors[n], distribution, seed, self.probes[number]) for n in names
        }

    def moving(
        self, block: nn.Module, index: int, number: int, state: State
    ) -> tuple[Callable[..., torch.Tensor], Tensors, Tensors, dict[str, torch.Tensor]]:
        """The block as a function of its inputs and of the parameters that move. Then these
        arguments, their tangents, and z by name.
        """
        tensors = self.subject.model.stored(block, index)
        z = self.directions(tensors, index, number)

        def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            return self.subject.model.call(block, index, x, dict(zip(z, parameters, strict=True)))

        return function, [state[0], *(tensors[name] for name in z)], [state[1], *z.values()], z

    def up(self, block: nn.Module, index: int, number: int, state: State) -> State:
        """ẏ = (∂f/∂x) ẋ + (∂f/∂θ) z, with y in the same pass."""
        function, inputs, tangents, _ = self.moving(block, index, number, state)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no double backward on the CPU
            output, tangent = push_forward(function, inputs, tangents)
        self.subject.model.check_finite(index, output)
        return output, tangent

    def turn(self, logits: Logits, number: int, state: State) -> State:
        """x̄ and its tangent at the loss, row by row, so that only one row's logits are in memory."""
        batch = self.batches[number].to(state[0].device)
        predicted = batch[:, 1:].numel()
        one = torch.ones((), dtype=state[0].dtype, device=state[0].device)
        rows = []
        for x, tangent, tokens in zip(state[0].split(1), state[1].split(1), batch, strict=True):

            def loss(x: torch.Tensor, labels: torch.Tensor = tokens[1:]) -> torch.Tensor:
                return cross_entropy(logits(x)[0, :-1], labels, reduction="sum") / predicted

            rows.append(pull_back(loss, [x], [tangent], one, torch.zeros_like(one)))
        return torch.cat([gradient for (gradient,), _ in rows]), torch.cat(
            [product for _, (product,) in rows]
        )

    def down(self, block: nn.Module, index: int, number: int, state: State, gradient: State) -> State:
        function, inputs, tangents, z = self.moving(block, index, number, state)
        with sdpa_kernel(SDPBackend.MATH):
            gradients, products = pull_back(function, inputs, tangents, *gradient)
        quadratic = {name: z[name] * product for name, product in zip(z, products[1:], strict=True)}
        for name, matrix in self.subject.matrices[index].items():
            self.means[number][name] = matrix.view(quadratic[matrix.parameter]).double().mean()
        return gradients[0], products[0]

    def samples(self) -> list[dict[str, float]]:
        """Per probe, the reduced products by logical matrix."""
        return [
            dict(zip(means, torch.stack([*means.values()]).tolist(), strict=True)) if means else {}
            for means in self.means
        ]


def samples(subject: Subject, params: SensitivityParams, probes: Sequence[int]) -> list[dict[str, float]]:
    """For each probe, zᵀHz / n per logical matrix: an unbiased sample of its mean Hessian diagonal
    Tr(H)/n on the probe's samples.

    One Hessian-vector product serves all matrices: z is drawn for all at once, and the cross terms
    vanish in expectation.
    """
    mine = [probe for probe in probes if probe % LANES in own_lanes()]
    product = _Product(subject, params, mine)
    walk(subject.model, product.batches, product)
    pairs = ranks.joined(list(zip(mine, product.samples(), strict=True)))
    found = dict(pairs)
    return [found[probe] for probe in probes]
