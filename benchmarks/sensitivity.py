"""The two estimators of sensitivity on the testbeds, against each other in one run: ``python -m benchmarks.sensitivity``.

Each estimator, at 1 and 4 calibration rows a probe, runs in a fork of its own, on one thread; so does, for comparison, the
Hessian-vector product of the whole model at once. Seconds and the kernel's high-water mark of memory (reset at the start) are the
fork's; rankings, their agreement and where the adaptive rule would have stopped come from its samples.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.records import commit
from benchmarks.testbed import NAMES, Testbed
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.measure import fisher, hutchinson
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.estimate import Estimate, Samples, estimates, kendall, relative_error, split_half
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.whole import load_model

RESULTS = Path(__file__).parent / "results" / "sensitivity.json"
PROBES = (8, 16, 32, 64)
ROWS = (1, 4)
WHOLE_PROBES = 4  # of the whole model at once: enough for its cost
ESTIMATORS: dict[str, Callable[..., Samples]] = {"fisher": fisher.samples, "hutchinson": hutchinson.samples}


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes by which memory rose at its peak."""

    wall_s: float
    cpu_s: float
    peak_bytes: int

    def per_probe(self, probes: int) -> dict[str, float]:
        return {
            "wall_s_per_probe": round(self.wall_s / probes, 3),
            "cpu_s_per_probe": round(self.cpu_s / probes, 3),
            "peak_bytes": self.peak_bytes,
        }


def mark(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    """Result and cost of a piece of work, in a fork of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_measure, (work, *arguments))


def _measure(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM back to the present size
    before, wall, cpu = mark("VmRSS"), time.monotonic(), time.process_time()
    result = work(*arguments)
    return result, Cost(time.monotonic() - wall, time.process_time() - cpu, mark("VmHWM") - before)


def settings(rows_per_probe: int) -> SensitivityParams:
    shipped = params.load(SensitivityParams, "sensitivity")
    return shipped.model_copy(update={"probes": max(PROBES), "rows_per_probe": rows_per_probe})


def streamed(name: str, rows: torch.Tensor, estimator: str, rows_per_probe: int) -> Samples:
    """All samples, pass by pass as the stage takes them."""
    bed, chosen = Testbed(name), settings(rows_per_probe)
    entry = bed.checkpoint.architecture
    matrices = {index: {entry.matrix_name(index, m): m for m in entry.matrices} for index in range(entry.depth)}
    subject = Subject(bed.stream(), rows, matrices)
    passes = torch.arange(chosen.probes).split(chosen.probes_per_pass)
    return [sample for probes in passes for sample in ESTIMATORS[estimator](subject, chosen, probes.tolist())]


def at_once(name: str, rows: torch.Tensor, rows_per_probe: int) -> None:
    """Hessian-vector products of the whole model, gradients of all matrices in memory."""
    bed = Testbed(name)
    model = load_model(bed.root / name, "float32", torch.device("cpu"))
    entry = bed.checkpoint.architecture
    tensors = [
        model.base_model.get_parameter(f"{entry.blocks}.{index}.{path}").requires_grad_(True)
        for index in range(entry.depth)
        for path in sorted({matrix.parameter for matrix in entry.matrices})
    ]
    for ids in rows.split(rows_per_probe)[:WHOLE_PROBES]:
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, tensors, create_graph=True)
            torch.autograd.grad(gradients, tensors, [torch.ones_like(tensor) for tensor in tensors])


def record(name: str, estimator: str, rows_per_probe: int, samples: Samples, cost: Cost) -> dict[str, Any]:
    """What one run says: agreement and error as probes grow, and where the adaptive rule would have stopped."""
    chosen = settings(rows_per_probe)
    *_, stopped = estimates(lambda probes: [samples[p] for p in probes], chosen.probes, chosen.probes_per_pass, chosen.agreement)
    summary = Estimate(samples, 0.0, False).summary()
    return {
        "testbed": name,
        "estimator": estimator,
        "rows_per_probe": rows_per_probe,
        "halves": {str(count): round(split_half(samples[:count]), 3) for count in PROBES},
        "relative_error": {str(n): round(relative_error(Estimate(samples[:n], 0.0, False).summary()), 3) for n in PROBES},
        "negative": sum(one["trace"] < 0 for one in summary.values()),
        **cost.per_probe(len(samples)),
        "stopped_at": len(stopped.samples),
        "reached": stopped.reached,
        "cpu_s_to_stop": round(cost.cpu_s * len(stopped.samples) / len(samples), 1),
    }


def places(name: str, samples: Samples) -> dict[str, Any]:
    """Kinds by the median over blocks, blocks by the mean over matrices, both from the most sensitive to the least, with their sizes."""
    entry = Testbed(name).checkpoint.architecture
    found = Estimate(samples, 0.0, False).summary()
    kinds = {m.kind: [found[entry.matrix_name(i, m)]["sensitivity"] for i in range(entry.depth)] for m in entry.matrices}
    blocks = {i: [found[entry.matrix_name(i, m)]["sensitivity"] for m in entry.matrices] for i in range(entry.depth)}
    middle = {kind: statistics.median(values) for kind, values in kinds.items()}
    mean = {str(index): statistics.mean(values) for index, values in blocks.items()}
    order = sorted(found, key=lambda one: -found[one]["sensitivity"])
    return {
        "kinds": [[kind, float(f"{middle[kind]:.3g}")] for kind in sorted(middle, key=lambda kind: -middle[kind])],
        "blocks": [[block, float(f"{mean[block]:.3g}")] for block in sorted(mean, key=lambda block: -mean[block])],
        "most": order[:5],
        "least": order[-5:],
    }


def rankings(name: str, taken: dict[tuple[str, int], Samples]) -> dict[str, Any]:
    """Fisher's ranking against Hutchinson's best one (most rows), with as many rows and with few; and what both find most sensitive."""

    def means(samples: Samples) -> list[float]:
        return [one["trace"] for one in Estimate(samples, 0.0, False).summary().values()]

    best = means(taken["hutchinson", ROWS[-1]])
    tau = {f"{count} x {rows}": round(kendall(means(taken["fisher", rows][:count]), best), 3) for rows in ROWS for count in PROBES}
    ratio = statistics.median(f / h for f, h in zip(means(taken["fisher", ROWS[-1]]), best, strict=True) if h > 0)
    found = {estimator: places(name, taken[estimator, ROWS[-1]]) for estimator in ESTIMATORS}
    hutchinson_is = f"{PROBES[-1]} x {ROWS[-1]}"
    return {"testbed": name, "hutchinson": hutchinson_is, "tau": tau, "fisher_over_hutchinson": round(ratio, 3), "places": found}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The runs as Markdown, as in docs/results.md."""
    heads = [
        "testbed",
        "estimator",
        "rows a probe",
        *(f"τ, {n} probes" for n in PROBES),
        "error, 64 probes",
        "CPU s a probe",
        "peak MB",
        "stops at",
    ]
    lines = [heads, ["---"] * len(heads)]
    for run in results["runs"]:
        halves = [f"{run['halves'][str(n)]:.2f}" for n in PROBES]
        error, stop = f"{run['relative_error'][str(PROBES[-1])]:.1%}", f"{run['stopped_at']}" if run["reached"] else "never"
        own = [run["testbed"], run["estimator"], run["rows_per_probe"], *halves, error]
        lines.append([*map(str, own), f"{run['cpu_s_per_probe']:.2f}", f"{run['peak_bytes'] / 1e6:.0f}", stop])
    for run in results["whole"]:
        own = [run["testbed"], "whole model", run["rows_per_probe"], *[""] * (len(PROBES) + 1)]
        lines.append([*map(str, own), f"{run['cpu_s_per_probe']:.2f}", f"{run['peak_bytes'] / 1e6:.0f}", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command(help=__doc__)
def main() -> None:
    torch.set_num_threads(1)  # a fork does not survive its parent's threads
    results: dict[str, list[dict[str, Any]]] = {"runs": [], "whole": [], "rankings": []}
    for name in NAMES:
        rows = torch.cat(list(Testbed(name).calibration(0).values()))
        Testbed(name).whole(rows[:1, :2])  # what is loaded late is loaded now, in no fork's account
        taken: dict[tuple[str, int], Samples] = {}
        for rows_per_probe in ROWS:
            for estimator in ESTIMATORS:
                samples, cost = measured(streamed, name, rows, estimator, rows_per_probe)
                results["runs"].append(record(name, estimator, rows_per_probe, samples, cost) | {"commit": commit()})
                click.echo(results["runs"][-1])
                taken[estimator, rows_per_probe] = samples
            _, cost = measured(at_once, name, rows, rows_per_probe)
            whole = {"testbed": name, "rows_per_probe": rows_per_probe, **cost.per_probe(WHOLE_PROBES)}
            results["whole"].append(whole | {"commit": commit()})
            click.echo(results["whole"][-1])
        results["rankings"].append(rankings(name, taken) | {"commit": commit()})
        click.echo(results["rankings"][-1])
    write_json(RESULTS, results)
    click.echo(table(results))


if __name__ == "__main__":
    main()
