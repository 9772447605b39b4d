"""Fast Hessian update against recomputation, end to end: ``python -m benchmarks.refresh``.

One epoch of induction (Wanda, per row, 50%) of one random transformer block at LLaMA-7B shapes, the masks refreshed at every step:
metric -> masks -> loss and gradient -> Adam -> projection. The arms differ only in where diag(E[X' X'ᵀ]) comes from:

    refresh    d² ∘ diag(G) from the cached statistics (2602.21652, Eqs. 9–11)
    recompute  the current factors folded into the block and every calibration token passed through it; the pass ends at the inputs of
               the last matrix, whose product nothing needs, and collects nothing but the diagonals

A step of induction sees all calibration tokens at once (through G), so that every step costs the same and the ratio depends neither on how
many there are, nor on the number of blocks. It grows with the tokens, which only the recomputation pays for: quote it with their number.
Both arms take the loss by `probes` sign vectors, since the exact one costs as much as a forward pass over about C tokens.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.records import commit
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.fit.spectral import Norm, penalty
from pipeline_lib.induce.induce import InduceParams, _Block, _Layer
from pipeline_lib.induce.scale import normalise
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.families import architecture
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import tapped
from pipeline_lib.stats.moments import Accumulator, SiteStatistics

RESULTS = Path(__file__).parent / "results" / "refresh.json"
PAPER = {"tokens": 128 * 2048, "refresh_s": 15.27, "recompute_s": 345.91, "ratio": 22.65}
Tensors = dict[str, torch.Tensor]


class Clock:
    """Wall seconds by part of a step; what runs inside another part counts for itself only."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = time.perf_counter()

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds[self.open[-1] if self.open else "other"] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._lap()
        self.open.append(name)
        yield
        self._lap()
        self.open.pop()


class Layer(_Layer):
    """The product's layer with a clock on its parts."""

    def __init__(self, matrix: Matrix, weight: torch.Tensor, statistics: SiteStatistics, settings: SelectionParams, clock: Clock) -> None:
        super().__init__(matrix, weight, statistics, wanda(statistics.second_moment), settings)
        self.clock = clock

    def scores(self, part: slice, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        with self.clock.part("metric"):
            return super().scores(part, rows, columns)

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.clock.part("selection"):
            return super().choose(scores)


def wanda(second_moment: torch.Tensor) -> Curvature:
    """All that Wanda reads."""
    return Curvature(second_moment, second_moment, 1 / second_moment)


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class _Enough(Exception):
    """The last site's inputs are in."""


class Bench:
    """The block, its calibration tokens (hidden states [B, T, D] per batch), and the statistics that both arms start from."""

    def __init__(self, config: LlamaConfig, hidden: list[torch.Tensor], probes: int) -> None:
        self.model, self.hidden, self.probes, self.clock = LlamaModel(config).eval().requires_grad_(False), hidden, probes, Clock()
        self.module, self.table = self.model.layers[0], architecture(config)
        self.tensors = dict(self.module.state_dict())
        self.tokens = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
        self.settings = params.load(InduceParams, "induce")
        chosen = {"score": "wanda", "group": "row", "sparsity": 0.5, "pattern": "unstructured"}
        selection = SelectionParams.model_validate(params.merge(params.section("prune.selection"), chosen))
        collected = {site.name: Accumulator(self.tokens, 4096, gram=True) for site in self.table.sites}
        self.run(self.tensors, lambda site, x: collected[site].add(x))
        self.cached = {name: collected.pop(name).finish() for name in list(collected)}
        views = [(m, m.view(self.tensors[m.parameter])) for m in self.table.matrices]
        self.layers = [Layer(m, weight, self.cached[m.site], selection, self.clock) for m, weight in views]
        self.block = _Block(self.table, [*self.layers])

    @torch.no_grad()
    def run(self, tensors: Tensors, take: Callable[[str, torch.Tensor], None]) -> None:
        """All tokens through the block with the given tensors, up to the last site; ``take(site, X)`` as in ``tapped``."""
        self.module.load_state_dict(tensors, assign=True)

        def stop(site: str, x: torch.Tensor) -> None:
            take(site, x)
            if site == self.table.sites[-1].name:
                raise _Enough

        with tapped(self.module, {site.name: site.module for site in self.table.sites}, stop):
            for batch in self.hidden:
                try:
                    self.model(inputs_embeds=batch, use_cache=False)
                except _Enough:
                    continue

    @torch.no_grad()
    def recomputed(self, theta: Tensors) -> dict[str, Curvature]:
        """diag(E[X' X'ᵀ]) of the folded block, over d², since the layers' scores multiply by d² (in either arm)."""
        squares: Tensors = {}

        def take(site: str, x: torch.Tensor) -> None:
            squares[site] = squares.get(site, torch.zeros(())) + torch.linalg.vector_norm(x, dim=0).double().square()

        factors = {name: log.exp() for name, log in theta.items()}
        self.run(fold(self.tensors, self.table, factors), take)
        scales = {name: site_factor(self.table, name, factors) for name in squares}
        moments = {name: (total / self.tokens).float() for name, total in squares.items()}
        return {name: wanda(moments[name] if d is None else moments[name] / d.square()) for name, d in scales.items()}

    def loss(self, theta: Tensors, log_u: Tensors, norms: list[Norm], random: torch.Generator) -> torch.Tensor:
        """Mean layer error + λ R_p (Eqs. 6–8), as in ``induce_block``."""
        spectral = self.settings.spectral
        errors = self.block.removed(theta, log_u, self.settings.temperature, self.probes, random)
        scales = [self.block.scales(number, theta) for number in range(len(self.layers))]
        ratios = [norm.rescaled(layer.weight, *pair) for norm, layer, pair in zip(norms, self.layers, scales, strict=True)]
        return torch.stack(errors).mean() + spectral.weight * penalty(ratios, spectral)

    def epoch(self, steps: int, recompute: bool) -> tuple[float, dict[str, float], Tensors, Tensors]:
        """Seconds from the cached statistics to the end of the last step, whole and by part; log factors at the last masks and log u."""
        random = torch.Generator().manual_seed(1)
        theta = {c.name: normalise(0.5 * torch.randn(c.size, generator=random), self.settings.limit) for c in self.table.couplings}
        log_u = {site.name: torch.zeros(len(site.index)) for site in self.table.sites}
        norms = [Norm(layer.weight, self.settings.spectral) for layer in self.layers]
        for layer in self.layers:
            layer.curvature = wanda(self.cached[layer.matrix.site].second_moment)
        free = [tensor.requires_grad_(True) for tensor in (*theta.values(), *log_u.values())]
        optimiser = torch.optim.Adam(free, lr=self.settings.rate)
        at: tuple[Tensors, Tensors] = ({}, {})
        clock = self.clock
        clock.restart()
        started = time.perf_counter()
        for _ in range(steps):
            at = _copied(theta), _copied(log_u)
            if recompute:
                with clock.part("forward"):
                    found = self.recomputed(at[0])
                for layer in self.layers:
                    layer.curvature = found[layer.matrix.site]
            with clock.part("loss and gradient"):
                loss = self.loss(theta, log_u, norms, random)
                optimiser.zero_grad()
                loss.backward()
            with clock.part("optimiser"), torch.no_grad():
                optimiser.step()
                for tensor in free:
                    tensor.copy_(normalise(tensor, self.settings.limit))
        seconds = time.perf_counter() - started
        return seconds, {name: round(part, 3) for name, part in clock.seconds.items()}, *at

    @torch.no_grad()
    def differing(self, theta: Tensors, log_u: Tensors) -> float:
        """Share of mask entries, by the product's own scores and selection, that differ from the current metric's with the cached one's."""
        differ = total = 0
        for number, layer in enumerate(self.layers):
            scales, u = self.block.scales(number, theta), log_u[layer.matrix.site]
            mask = layer.mask(layer.log_scores(scales, u))
            layer.curvature = wanda(self.cached[layer.matrix.site].second_moment)
            differ += int((mask != layer.mask(layer.log_scores(scales, u))).sum())
            total += mask.numel()
        return differ / total


@click.command(help=__doc__)
@click.option("--width", default=4096, show_default=True)
@click.option("--inner", default=11008, show_default=True)
@click.option("--heads", default=32, show_default=True)
@click.option("--tokens", default=65536, show_default=True, help="Calibration tokens; the paper has 262,144.")
@click.option("--row-length", default=2048, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Induction steps of the epoch, in both arms.")
@click.option("--probes", default=128, show_default=True, help="Sign vectors that estimate the loss; 0: exact.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(width: int, inner: int, heads: int, tokens: int, row_length: int, steps: int, probes: int, out: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32, max_position_embeddings=row_length)
    spread = torch.randn(width).exp()  # channels of very different size, as in trained models
    bench = Bench(config, [torch.randn(1, row_length, width) * spread for _ in range(tokens // row_length)], probes)
    bench.epoch(1, recompute=False)  # first touch of memory and threads
    refresh_s, refresh_parts, refresh_theta, _ = bench.epoch(steps, recompute=False)
    recompute_s, recompute_parts, theta, log_u = bench.epoch(steps, recompute=True)
    differing = bench.differing(theta, log_u)
    assert differing < 1e-3, f"{differing:.2%} of the mask differ between the refreshed and the recomputed metric"
    record: dict[str, Any] = {"width": width, "inner": inner, "heads": heads, "blocks": 1, "row_length": row_length}
    record |= {"tokens": bench.tokens, "steps": steps, "probes": probes, "threads": torch.get_num_threads()}
    record |= {"refresh_s": round(refresh_s, 3), "recompute_s": round(recompute_s, 3), "ratio": round(recompute_s / refresh_s, 2)}
    record |= {"refresh_parts": refresh_parts, "recompute_parts": recompute_parts, "masks_differing": differing}
    record |= {"factors_apart": max(float((theta[name] - refresh_theta[name]).abs().max()) for name in theta)}
    record |= {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2), "paper": PAPER, "commit": commit()}
    write_json(out, record)
    click.echo(f"{bench.tokens} tokens (paper: {PAPER['tokens']}), {steps} steps, {probes} probes, {torch.get_num_threads()} threads")
    click.echo(f"{'seconds':<20}{'refresh':>10}{'recompute':>11}")
    for part in ("forward", "metric", "selection", "loss and gradient", "optimiser", "other"):
        click.echo(f"{part:<20}{refresh_parts.get(part, 0.0):>10.3f}{recompute_parts.get(part, 0.0):>11.3f}")
    click.echo(f"{'whole':<20}{refresh_s:>10.3f}{recompute_s:>11.3f}   ratio {recompute_s / refresh_s:.2f}")
    click.echo(f"{differing:.2e} of the mask differ; log factors at most {record['factors_apart']:.1e} apart; peak {record['peak_gb']} GB")


if __name__ == "__main__":
    main()
