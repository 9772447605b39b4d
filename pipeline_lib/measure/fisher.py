"""Trace of the Fisher information per logical matrix by ordinary backward passes, block by block, and output gradients' second moments.

Symbols: p_θ the model's distribution of the next token, y labels drawn from it at every predicted position, ℓ = −Σ_t log p_θ(y_t);
x [T, C] inputs and g = ∂ℓ/∂(outputs) [T, R] of a linear, so that ∂ℓ/∂W = gᵀx. Where the model fits the text, the Fisher
information is the Hessian of the mean cross-entropy (its Gauss-Newton part, the other part having mean zero).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline_lib.core.artifacts import block_file, read_tensors, write_tensors
from pipeline_lib.core.random import generator
from pipeline_lib.measure.backward import Logits, Subject, walk
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.conversion import place
from pipeline_lib.models.products import Parameters, Product, Watched
from pipeline_lib.stats.lanes import LANES, Sums, fold


class OutputMoments:
    """E[g gᵀ] [R, R] of every included matrix, or its diagonal [R], mean over predicted tokens: one file per block, one block in memory.

    Probe p belongs to lane p mod 4. Until all probes are in, there is a file for each block and lane, since a lane's sum goes on where it
    was left: how many probes share a pass changes no bit.
    """

    def __init__(self, directory: Path, full: bool) -> None:
        self.directory = directory
        self.full = full
        self._sums: dict[str, torch.Tensor] = {}

    def open(self, index: int, lane: int) -> None:
        """From here on gradients are those of a block and a lane."""
        path = self._file(index, lane)
        self._sums = read_tensors(path)[0] if path.exists() else {}

    def add(self, matrix: Matrix, gradients: torch.Tensor) -> None:
        """Take output gradients g [B, T, R] of a matrix of the block at hand, row by row."""
        size = (gradients.shape[-1],) * (2 if self.full else 1)
        sums = self._sums.pop(matrix.label, torch.zeros(size)).to(gradients.device, copy=True)
        for g in gradients.float():
            if self.full:
                sums.addmm_(g.T, g)
            else:
                sums.add_(g.square().sum(0))
        self._sums[matrix.label] = sums

    def close(self, index: int, lane: int, tokens: int) -> None:
        """Done with the block and the lane for now: sums over so many more predicted tokens."""
        path = self._file(index, lane)
        before = read_tensors(path)[1]["tokens"] if path.exists() else 0
        write_tensors(path, {label: sums.cpu() for label, sums in self._sums.items()}, {"tokens": before + tokens})
        self._sums = {}

    def finish(self, depth: int) -> None:
        """All probes are in: the lanes' sums become each block's mean, in its one file."""
        for index in range(depth):
            files = [file for lane in range(LANES) if (file := self._file(index, lane)).exists()]
            tokens = sum(read_tensors(file)[1]["tokens"] for file in files)
            sums = fold(Sums(read_tensors(file)[0]) for file in files)
            write_tensors(
                block_file(self.directory, index), {k: v.div_(tokens) for k, v in sums.items()}, {"full": self.full, "tokens": tokens}
            )
            for file in files:
                file.unlink()

    def _file(self, index: int, lane: int) -> Path:
        return self.directory / f"sums-{index:03d}-{lane}.safetensors"


def moment_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of full float32 moments of matrices [R, C]."""
    return sum(4 * rows * rows for rows, _ in shapes)


@contextmanager
def _recorded(
    block: nn.Module, places: Iterable[tuple[str, int | None, range | None]]
) -> Iterator[Mapping[tuple[str, int | None], tuple[Product, torch.Tensor]]]:
    """While open, products with these parameters, or experts of them, and what they give are noted whenever the block runs."""
    noted: dict[tuple[str, int | None], tuple[Product, torch.Tensor]] = {}
    wanted, named = {(parameter, expert) for parameter, expert, _ in places}, dict(block.named_parameters())

    def after(product: Product, result: torch.Tensor) -> None:
        if (part := (product.part.parameter, product.part.expert)) in wanted:
            noted[part] = product, result

    with Watched(Parameters({parameter: named[parameter] for parameter, _ in wanted}), lambda _: None, after):
        yield noted


class _Gradient:
    """The gradients of a group of probes, reduced to ‖∂ℓ/∂W‖² per token and weight as soon as a block's are known."""

    def __init__(self, subject: Subject, params: SensitivityParams, probes: Sequence[int], moments: OutputMoments | None) -> None:
        self.subject, self.params, self.probes, self.moments = subject, params, probes, moments
        self.batches = [subject.batch(probe, params.rows_per_probe) for probe in probes]
        self.predicted = self.batches[0][:, 1:].numel()
        self.samples: list[dict[str, float]] = [{} for _ in probes]

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    @torch.no_grad()
    def up(self, block: nn.Module, index: int, number: int, state: torch.Tensor) -> torch.Tensor:
        output = self.subject.model.call(block, index, state)
        self.subject.model.check_finite(index, output)
        return output

    def turn(self, logits: Logits, number: int, state: torch.Tensor) -> torch.Tensor:
        """∂ℓ/∂x for labels that the model draws itself, row by row, so that the logits of one row are in memory."""
        random = generator(self.params.seed, f"labels:{self.probes[number]}")
        rows = []
        for row in state.split(1):
            x = row.detach().requires_grad_(True)
            scores = logits(x)[0, :-1]
            labels = torch.multinomial(scores.detach().softmax(-1).cpu(), 1, generator=random)[:, 0].to(x.device)
            rows += torch.autograd.grad(cross_entropy(scores, labels, reduction="sum"), x)
        return torch.cat(rows)

    def down(self, block: nn.Module, index: int, number: int, state: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        lane = self.probes[number] % LANES
        own = [place for place, probe in enumerate(self.probes) if probe % LANES == lane]
        if self.moments is not None and number == own[0]:
            self.moments.open(index, lane)
        x = state.detach().requires_grad_(True)
        matrices = self.subject.matrices[index]
        model = self.subject.model
        pieces, layout = model.checkpoint.block_pieces(index), model.checkpoint.architecture.layouts[index]
        places = {name: place(matrix, pieces) for name, matrix in matrices.items()}
        with _recorded(block, places.values()) as noted:
            output = model.call(block, index, x)
        results = {id(result): result for _, result in noted.values() if result.requires_grad}  # some choose tokens without a gradient
        below, *gradients = torch.autograd.grad(output, [x, *results.values()], gradient)
        of_result = dict(zip(results, gradients, strict=True))
        outputs = {part: product.outputs_in(of_result[id(result)]) for part, (product, result) in noted.items() if id(result) in of_result}
        for name, matrix in matrices.items():
            parameter, expert, rows = places[name]
            # Of an expert without tokens there is none.
            inner, g = x.new_zeros(0, 1), x.new_zeros(0, model.checkpoint.matrix_shape(index, matrix)[0])
            if (part := (parameter, expert)) in outputs:
                inner, g = noted[part][0].inputs.detach(), outputs[part]
                g = g if rows is None else g[..., rows.start : rows.stop : rows.step]
            # Some models fold rows and tokens into one axis before their linears; an expert's tokens come from all rows.
            batch = len(x) if layout.site(matrix.site).pool is None else 1
            inner, g = inner.reshape(batch, -1, inner.shape[-1]), g.reshape(batch, -1, g.shape[-1])
            # Row by row: between rows the cross terms have mean zero, and leaving them out leaves their noise out.
            squares = sum(_square(g[row], inner[row]) for row in range(batch))
            self.samples[number][name] = squares / (self.predicted * math.prod(model.checkpoint.matrix_shape(index, matrix)))
            if self.moments is not None:
                self.moments.add(matrix, g)
        if self.moments is not None and number == own[-1]:
            self.moments.close(index, lane, self.predicted * len(own))
        return below


def _square(g: torch.Tensor, x: torch.Tensor) -> float:
    """‖gᵀx‖² of g [T, R] and x [T, C]; of a wide matrix by way of [T, T], since tr(gᵀx xᵀg) = tr(g gᵀ x xᵀ)."""
    tokens, wide = len(g), g.shape[1] * x.shape[1] / (g.shape[1] + x.shape[1])
    return float(torch.sum((g @ g.T) * (x @ x.T)) if tokens < wide else (g.T @ x).square().sum())


def samples(
    subject: Subject, params: SensitivityParams, probes: Sequence[int], moments: OutputMoments | None = None
) -> list[dict[str, float]]:
    """For each probe, ‖∂ℓ/∂W‖² / (tokens · n) per logical matrix: an unbiased sample of its mean Fisher diagonal on the probe's rows.

    Unbiased because labels drawn from the model have scores ∂log p/∂W of mean zero: of the sum's square, only the tokens' own
    squares remain in the mean. True labels (the "empirical Fisher") do not have that, nor does the gradient of the mean loss.
    ``moments`` takes the output gradients of the same pass.
    """
    dealt = sorted(probes, key=lambda probe: (probe % LANES, probe))  # lane by lane
    gradient = _Gradient(subject, params, dealt, moments)
    walk(subject.model, gradient.batches, gradient)
    found = dict(zip(dealt, gradient.samples, strict=True))
    return [found[probe] for probe in probes]
