"""Gauge twins: the same function in scrambled coordinates, pruned by every base method (``python -m benchmarks.twins``).

Each testbed gets a twin into which random factors (log-normal, spread 1) are folded exactly. Wanda, and OBS undamped or damped relative to
diag(H), cannot tell the two apart where they compare within rows (across rows, as in SparseGPT's column blocks, output-channel factors
count); Magnitude can, and the distribution level has to bring it back.
"""

import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.induction import Bench, Recipe
from benchmarks.records import commit
from benchmarks.testbed import NAMES, Testbed, scrambled
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.prune.layerwise import PrunedBlock

RESULTS = Path(__file__).parent / "results" / "twins.json"
START_ONLY = {"induce": {"factors": False, "importance": False}}


def selection(**settings: Any) -> dict[str, Any]:
    return {"prune": {"selection": settings}}


METHODS = {
    "magnitude": ("magnitude", {}, False),
    "wanda": ("wanda", {}, False),
    "obs within rows, damping by diag(H)": ("sparsegpt", selection(group="row", damping_of="diagonal"), False),
    "obs within rows, hardly any damping": ("sparsegpt", selection(group="row", damping=1e-6), False),
    "obs within rows, damping by its mean": ("sparsegpt", selection(group="row"), False),
    "sparsegpt (column blocks, mean)": ("sparsegpt", {}, False),
    "magnitude, induced (start only)": ("magnitude", START_ONLY, True),
    "magnitude, induced": ("magnitude", {}, True),
}


def differing(a: dict[int, PrunedBlock], b: dict[int, PrunedBlock]) -> float:
    """Share of mask entries that differ."""
    pairs = [(a[index].masks[name], b[index].masks[name]) for index in a for name in a[index].masks]
    return sum(int((x != y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


@click.command(help=__doc__)
def main() -> None:
    results: list[dict[str, Any]] = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            benches = {"original": Bench(Testbed(name)), "twin": Bench(scrambled(Testbed(name), Path(folder), seed=0))}
            for bench in benches.values():
                bench.at(0)
            for pattern in ("60%", "2:4"):
                for method, (base, changes, induced) in METHODS.items():
                    found = {
                        key: bench.run(Recipe(base, pattern, induce=induced, changes=changes), ("test",)) for key, bench in benches.items()
                    }
                    record = {"testbed": name, "pattern": pattern, "method": method}
                    record |= {key: round(ppl["test"], 4) for key, (_, ppl) in found.items()}
                    record |= {f"dense_{key}": round(bench.dense["test"], 4) for key, bench in benches.items()}
                    record["masks_differ"] = round(differing(found["original"][0].blocks, found["twin"][0].blocks), 6)
                    results.append(record | {"commit": commit()})
                    click.echo(results[-1])
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
