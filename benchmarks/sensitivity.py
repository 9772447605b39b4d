"""The two estimators of sensitivity on the testbeds, against each other in one run: ``python -m benchmarks.sensitivity``.

Each estimator, at 1 and 4 calibration rows a probe, runs in a fork of its own, on one thread; so does, for comparison, the Hessian-vector product of
the whole model at once. Wall seconds and the kernel's high-water mark of memory (reset at the start) are the fork's; rankings, their
agreement and what the adaptive rule would have stopped at come from its samples.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.records import commit
from benchmarks.testbed import NAMES, Testbed
from pipeline_lib import params
from pipeline_lib.artifacts import write_json
from pipeline_lib.models.whole import load_model
from pipeline_lib.sensitivity import fisher, hutchinson
from pipeline_lib.sensitivity.backward import Subject
from pipeline_lib.sensitivity.estimate import Estimate, Samples, estimates, kendall, relative_error, split_half
from pipeline_lib.sensitivity.settings import SensitivityParams

RESULTS = Path(__file__).parent / "results" / "sensitivity.json"
PROBES = (8, 16, 32, 64)
ROWS = (1, 4)
WHOLE_PROBES = 4  # of the whole model at once: enough for its cost
ESTIMATORS: dict[str, Callable[..., Samples]] = {"fisher": fisher.samples, "hutchinson": hutchinson.samples}


def mark(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, int]:
    """Result, wall seconds, and bytes by which memory rose at its peak, in a fork of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_measure, (work, *arguments))


def _measure(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, int]:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM back to the present size
    before, started = mark("VmRSS"), time.monotonic()
    result = work(*arguments)
    return result, time.monotonic() - started, mark("VmHWM") - before


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


def record(name: str, estimator: str, rows_per_probe: int, samples: Samples, wall: float, peak: int) -> dict[str, Any]:
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
        "wall_s_per_probe": round(wall / len(samples), 3),
        "peak_bytes": peak,
        "stopped_at": len(stopped.samples),
        "reached": stopped.reached,
        "wall_s_to_stop": round(wall * len(stopped.samples) / len(samples), 1),
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


@click.command(help=__doc__)
def main() -> None:
    torch.set_num_threads(1)  # a fork does not survive its parent's threads
    results: dict[str, list[dict[str, Any]]] = {"runs": [], "whole": [], "rankings": []}
    for name in NAMES:
        rows = torch.cat(list(Testbed(name).calibration(0).values()))
        Testbed(name).whole(rows[:1, :2])  # what is loaded late is loaded now, in no fork's account
        by_estimator: dict[str, Samples] = {}
        for rows_per_probe in ROWS:
            for estimator in ESTIMATORS:
                samples, wall, peak = measured(streamed, name, rows, estimator, rows_per_probe)
                results["runs"].append(record(name, estimator, rows_per_probe, samples, wall, peak) | {"commit": commit()})
                click.echo(results["runs"][-1])
                by_estimator[estimator] = samples  # of the most rows, in the end
            _, wall, peak = measured(at_once, name, rows, rows_per_probe)
            whole = {
                "testbed": name,
                "rows_per_probe": rows_per_probe,
                "wall_s_per_probe": round(wall / WHOLE_PROBES, 3),
                "peak_bytes": peak,
            }
            results["whole"].append(whole | {"commit": commit()})
            click.echo(results["whole"][-1])
        means = {key: Estimate(samples, 0.0, False).summary() for key, samples in by_estimator.items()}
        values = [[one["trace"] for one in means[key].values()] for key in ESTIMATORS]
        ranking = {"testbed": name, "rows_per_probe": ROWS[-1], "probes": PROBES[-1], "tau": round(kendall(*values), 3)}
        ratio = statistics.median(f / h for f, h in zip(*values, strict=True) if h > 0)
        ranking |= {"fisher_over_hutchinson": round(ratio, 3)}
        results["rankings"].append(ranking | {key: places(name, samples) for key, samples in by_estimator.items()} | {"commit": commit()})
        click.echo(results["rankings"][-1])
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
