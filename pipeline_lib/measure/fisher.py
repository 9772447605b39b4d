"""Trace of the Fisher information per logical matrix by ordinary backward passes, block by block, and
second moments of output gradients.

Symbols: p_θ is the model's distribution of the next token, y labels drawn from it at every
predicted position, ℓ = −Σ_t log p_θ(y_t). x [T, C] are the inputs of a linear layer and g =
∂ℓ/∂(outputs) [T, R], so ∂ℓ/∂W = gᵀx. If the model fits the text, the Fisher information is the
Hessian of the mean cross-entropy (its Gauss-Newton part; the other part has mean zero).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from pipeline_lib.core import ranks
from pipeline_lib.core.artifacts import block_file, read_tensors, write_tensors
from pipeline_lib.core.random import generator
from pipeline_lib.measure.backward import Logits, Subject, walk
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.conversion import place
from pipeline_lib.models.products import Parameters, Product, Watched
from pipeline_lib.models.stream import HEAD_TOKENS
from pipeline_lib.stats.lanes import LANES, fold_for, own_lanes
from pipeline_lib.stats.moments import add_square, mirror_

BATCH_ROWS = (4, 2, 1)  # rows of a lane's probes per call: a single short row leaves a processor partly idle
BATCH_TOKENS = 2048  # limit for calls with more than one row: the graph of a call fills the memory


class OutputMoments:
    """E[g gᵀ], shape [R, R], of every included matrix, or its diagonal [R], as a mean over predicted
    tokens. There is one file per block, and one block in memory.

    Probe p belongs to lane p mod 4, and each process has some lanes. Until all probes are done,
    there is a file per block and lane, so that a lane's sum continues where it ended. The number of
    probes per pass does not change a bit of the sums over given gradients.
    """

    def __init__(self, directory: Path, full: bool) -> None:
        """``directory`` must belong to this process alone."""
        self.directory = directory
        self.full = full
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._labels: dict[int, set[str]] = {}  # the labels of each block's sums

    def open(self, index: int, lane: int) -> None:
        """Open a block and a lane: load their sums, if there are any."""
        path = self._file(index, lane)
        self._sums, facts = read_tensors(path) if path.exists() else ({}, {"tokens": 0})
        self._tokens = facts["tokens"]

    def add(self, matrix: Matrix, gradients: torch.Tensor) -> None:
        """Add output gradients g [B, T, R] of a matrix of the open block, sample by sample. The sums
        stay on their device.
        """
        outputs = gradients.shape[-1]
        sums = self._sums.get(matrix.label)
        if sums is None:
            sums = torch.zeros((outputs,) * (2 if self.full else 1), device=gradients.device)
        self._sums[matrix.label] = sums = sums.to(gradients.device)
        for g in gradients.float():
            if not self.full:
                sums.add_(g.square().sum(0))
                continue
            add_square(sums, g, g)

    def close(self, index: int, lane: int, tokens: int) -> None:
        """Store the sums of the open block and lane, which grew by ``tokens`` predicted tokens."""
        self._labels.setdefault(index, set()).update(self._sums)
        write_tensors(self._file(index, lane), self._sums, {"tokens": self._tokens + tokens})
        self._sums = {}

    def finish(self, depth: int) -> None:
        """Turn the lanes' sums into each block's mean, and store it in one file. The first process
        writes it.
        """
        for index in range(depth):
            files = [file for lane in own_lanes() if (file := self._file(index, lane)).exists()]
            tokens = sum(ranks.joined([read_tensors(file)[1]["tokens"] for file in files]))
            labels = sorted(set(ranks.joined(sorted(self._labels.get(index, ())))))
            sums = fold_for({label: [0] for label in labels}, (read_tensors(file)[0] for file in files))
            if ranks.first():
                means = {label: mean.div_(tokens) for label, mean in sums.items()}
                if self.full:
                    means = {label: mirror_(mean) for label, mean in means.items()}
                write_tensors(block_file(self.directory, index), means, {"full": self.full, "tokens": tokens})
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
    """Record the products with these parameters (or experts of them) and their results, whenever
    the block runs in this context.
    """
    noted: dict[tuple[str, int | None], tuple[Product, torch.Tensor]] = {}
    wanted, named = {(parameter, expert) for parameter, expert, _ in places}, dict(block.named_parameters())

    def after(product: Product, result: torch.Tensor) -> None:
        if (part := (product.part.parameter, product.part.expert)) in wanted:
            noted[part] = product, result

    with Watched(Parameters({parameter: named[parameter] for parameter, _ in wanted}), lambda _: None, after):
        yield noted


def batches(probes: Iterable[int], together: int) -> list[list[int]]:
    """Probes that pass through the blocks together: a limited number of consecutive probes of one
    lane.

    The batches depend only on the probes' numbers. So any multiple of ``together`` · 4 probes,
    counted from probe 0, consists of the same batches, in one pass or in several.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for probe in sorted(probes):
        found.setdefault((probe % LANES, probe // LANES // together), []).append(probe)
    return [found[place] for place in sorted(found)]


def at_once(rows_per_probe: int, length: int) -> int:
    """Number of probes that pass through the blocks together, for samples of ``length`` tokens."""
    rows = next(rows for rows in BATCH_ROWS if rows * length <= BATCH_TOKENS or rows == 1)
    return max(1, rows // rows_per_probe)


class _Gradient:
    """The gradients of a group of probes, reduced to ‖∂ℓ/∂W‖² per token and weight as soon as a
    block's are known.
    """

    def __init__(
        self,
        subject: Subject,
        params: SensitivityParams,
        probes: Sequence[int],
        moments: OutputMoments | None,
    ) -> None:
        self.subject, self.params, self.moments = subject, params, moments
        # An expert receives tokens from all rows of a batch, so its tokens cannot be assigned to
        # probes.
        routed = any(
            site.pool is not None
            for layout in subject.model.checkpoint.architecture.layouts
            for site in layout.sites
        )
        self.probes = [
            together
            for together in batches(
                probes, 1 if routed else at_once(params.rows_per_probe, subject.rows.shape[1])
            )
            if together[0] % LANES in own_lanes()
        ]
        self.batches = [
            torch.cat([subject.batch(probe, params.rows_per_probe) for probe in own]) for own in self.probes
        ]
        self.predicted = params.rows_per_probe * (subject.rows.shape[1] - 1)  # predicted tokens per probe
        # per batch: (block, squares [matrices, probes])
        self.squares: list[list[tuple[int, torch.Tensor]]] = [[] for _ in self.probes]

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    @torch.no_grad()
    def up(self, block: nn.Module, index: int, number: int, state: torch.Tensor) -> torch.Tensor:
        output = self.subject.model.call(block, index, state)
        self.subject.model.check_finite(index, output)
        return output

    def turn(self, logits: Logits, number: int, state: torch.Tensor) -> torch.Tensor:
        """∂ℓ/∂x for labels drawn from the model, a few tokens at a time, so that only their logits
        are in memory.
        """
        rows = []
        for probe, own in zip(self.probes[number], state.split(self.params.rows_per_probe), strict=True):
            random = generator(self.params.seed, f"labels:{probe}")
            for row in own.split(1):
                pieces = [self._at_loss(logits, piece, random) for piece in row[:, :-1].split(HEAD_TOKENS, 1)]
                # the last token predicts nothing
                rows.append(torch.cat([*pieces, torch.zeros_like(row[:, -1:])], 1))
        return torch.cat(rows)

    @staticmethod
    def _at_loss(logits: Logits, hidden: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """∂ℓ/∂x [1, n, D] of n tokens. The gradient of the logits is p − y, where p are the
        probabilities and y is the one-hot label.
        """
        x = hidden.detach().requires_grad_(True)
        scores = logits(x)
        difference = scores.detach().softmax(-1)
        labels = drawn(difference[0], random)
        difference[0].scatter_add_(1, labels, difference.new_full(labels.shape, -1.0))
        return torch.autograd.grad(scores, x, difference)[0]

    def down(
        self, block: nn.Module, index: int, number: int, state: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        lane = self.probes[number][0] % LANES
        of_lane = [place for place, own in enumerate(self.probes) if own[0] % LANES == lane]
        if self.moments is not None and number == of_lane[0]:
            self.moments.open(index, lane)
        x = state.detach().requires_grad_(True)
        matrices = self.subject.matrices[index]
        model = self.subject.model
        pieces, layout = model.checkpoint.block_pieces(index), model.checkpoint.architecture.layouts[index]
        places = {name: place(matrix, pieces) for name, matrix in matrices.items()}
        with _recorded(block, places.values()) as noted:
            output = model.call(block, index, x)
        # some products only choose tokens, and have no gradient
        results = {id(result): result for _, result in noted.values() if result.requires_grad}
        below, *gradients = torch.autograd.grad(output, [x, *results.values()], gradient)
        of_result = dict(zip(results, gradients, strict=True))
        outputs = {
            part: product.outputs_in(of_result[id(result)])
            for part, (product, result) in noted.items()
            if id(result) in of_result
        }
        squares = []
        for name, matrix in matrices.items():
            parameter, expert, rows = places[name]
            # An expert without tokens has no gradient.
            inner, g = x.new_zeros(0, 1), x.new_zeros(0, model.checkpoint.matrix_shape(index, matrix)[0])
            if (part := (parameter, expert)) in outputs:
                inner, g = noted[part][0].inputs.detach(), outputs[part]
                g = g if rows is None else g[..., rows.start : rows.stop : rows.step]
            # Some models fold rows and tokens into one axis before their linears; an expert's
            # tokens come from all rows.
            batch = len(x) if layout.site(matrix.site).pool is None else 1
            inner, g = inner.reshape(batch, -1, inner.shape[-1]), g.reshape(batch, -1, g.shape[-1])
            # Row by row: cross terms between rows have mean zero and would only add noise.
            each = torch.stack([_square(g[row], inner[row]) for row in range(batch)])
            squares.append(each.double().view(len(self.probes[number]), -1).sum(1))
            if self.moments is not None:
                self.moments.add(matrix, g)
        if squares:
            # stays on the device: reading the numbers waits for it
            self.squares[number].append((index, torch.stack(squares)))
        if self.moments is not None and number == of_lane[-1]:
            self.moments.close(
                index, lane, self.predicted * sum(len(self.probes[place]) for place in of_lane)
            )
        return below

    def samples(self) -> dict[int, dict[str, float]]:
        """For each probe of this process, the reduced squares by logical matrix."""
        found: dict[int, dict[str, float]] = {probe: {} for together in self.probes for probe in together}
        checkpoint = self.subject.model.checkpoint
        for together, blocks in zip(self.probes, self.squares, strict=True):
            for index, squares in blocks:
                for (name, matrix), values in zip(
                    self.subject.matrices[index].items(), squares.tolist(), strict=True
                ):
                    weights = math.prod(checkpoint.matrix_shape(index, matrix))
                    for probe, value in zip(together, values, strict=True):
                        found[probe][name] = value / (self.predicted * weights)
        return found


def drawn(probabilities: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A label [n, 1] for each row of probabilities [n, V]: where the cumulative probability passes a
    uniform random number.

    One number per label is drawn on the CPU. ``torch.multinomial`` draws V of them, which took
    longer than the head's products.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(sums), 1, generator=random, dtype=torch.float64).to(sums.device)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_(max=sums.shape[-1] - 1)


def _square(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """‖gᵀx‖² of g [T, R] and x [T, C]. For a wide matrix it is computed from products [T, T], since
    tr(gᵀx xᵀg) = tr(g gᵀ x xᵀ).
    """
    tokens, wide = len(g), g.shape[1] * x.shape[1] / (g.shape[1] + x.shape[1])
    return torch.sum((g @ g.T) * (x @ x.T)) if tokens < wide else (g.T @ x).square().sum()


def samples(
    subject: Subject, params: SensitivityParams, probes: Sequence[int], moments: OutputMoments | None = None
) -> list[dict[str, float]]:
    """For each probe, ‖∂ℓ/∂W‖² / (tokens · n) per logical matrix: an unbiased sample of its mean
    Fisher diagonal on the probe's samples.

    It is unbiased because labels drawn from the model have scores ∂log p/∂W of mean zero: only the
    squares of single tokens remain in the mean of the sum's square. True labels (the "empirical
    Fisher") do not have this property, nor does the gradient of the mean loss. ``moments`` collects
    the output gradients of the same pass.
    """
    gradient = _Gradient(subject, params, probes, moments)
    walk(subject.model, gradient.batches, gradient)
    found = {probe: one for part in ranks.gathered(gradient.samples()) for probe, one in part.items()}
    return [found[probe] for probe in probes]
