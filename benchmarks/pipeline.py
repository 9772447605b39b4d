"""Benchmarks of the pipeline on the embedded model, cell by cell and resumable: ``python -m benchmarks.pipeline seeds|recipes``.

Each cell runs `dvc repro` in a clone of HEAD below ``--work`` with other parameters; the clones share one DVC cache, so that nothing upstream is
computed twice. Finished cells are in ``benchmarks/results/<name>.json`` and are skipped.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from benchmarks.records import commit, recorded
from pipeline_lib.core.artifacts import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def recipe(score: str, allocation: dict[str, Any], reconstruction: dict[str, Any], induced: bool = False) -> dict[str, Any]:
    """A candidate for a preset: one variant; ``{name}`` in its artifacts is the variant's own."""
    return {
        "factors": "induce/{name}/transform.safetensors" if induced else "prepare/identity.safetensors",
        "sensitivity": "curves/{name}.json" if allocation["method"] == "predicted" else "sensitivity/sensitivity.json",
        "selection": {"score": score, "group": "block"},
        "allocation": allocation,
        "reconstruction": reconstruction,
    }


UNIFORM = {"method": "uniform"}
RANKED = {"method": "weight", "alpha": 0.15}
PREDICTED = {"method": "predicted", "alpha": 0.2}
SWEEP = {"steps": ["obs"]}
CHANNEL = {"steps": ["obs", "channel"]}
CLOSED = {"steps": ["obs", "lsq"], "lsq": {"mask_iterations": 300}}
FITTED = {
    "steps": ["obs", "lsq", "block"],
    "collect": "site",
    "towards_dense": 0.5,
    "lsq": {"mask_iterations": 300},
    "block": {"rate": 0.01, "bias_rate": 0.002, "refresh_epochs": 2},
}
RECIPES = {
    "obs": recipe("obs", UNIFORM, SWEEP),
    "obs-induced": recipe("obs", UNIFORM, SWEEP, induced=True),
    "obs-channel-induced": recipe("obs", UNIFORM, CHANNEL, induced=True),
    "obs-ranked": recipe("obs", RANKED, SWEEP),
    "isc-ranked": recipe("isc", RANKED, SWEEP),
    "obs-predicted": recipe("obs", PREDICTED, SWEEP),
    "isc-predicted-channel-induced": recipe("isc", PREDICTED, CHANNEL, induced=True),
    "closed": recipe("obs", UNIFORM, CLOSED),
    "closed-ranked": recipe("obs", RANKED, CLOSED),  # fast
    "closed-predicted": recipe("obs", PREDICTED, CLOSED),
    "closed-ranked-induced": recipe("obs", RANKED, CLOSED, induced=True),
    "fitted": recipe("obs", UNIFORM, FITTED),
    "fitted-ranked": recipe("obs", RANKED, FITTED),
    "fitted-predicted": recipe("obs", PREDICTED, FITTED),  # best
    "fitted-predicted-isc": recipe("isc", PREDICTED, FITTED),
    "fitted-predicted-induced": recipe("obs", PREDICTED, FITTED, induced=True),
}


def run(project: Path, *command: str) -> None:
    subprocess.run(command, cwd=project, check=True)


def reproduce(work: Path, cell: str, change: Any) -> Path:
    """A clone of HEAD with `change(params)` applied, reproduced."""
    project = work / cell
    if not project.exists():
        work.mkdir(parents=True, exist_ok=True)
        run(work, "git", "clone", "--quiet", str(ROOT), cell)
    run(project, "dvc", "cache", "dir", "--local", str(work / "cache"))
    yaml = YAML()
    values = yaml.load((project / "params.yaml").read_text(encoding="utf-8"))
    change(values)
    with (project / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(values, file)
    run(project, "dvc", "repro", "--quiet")
    return project


def records(project: Path, cell: dict[str, Any], head: str) -> list[dict[str, Any]]:
    """One flat record per variant and text."""
    summary = json.loads((project / "report" / "summary.json").read_text(encoding="utf-8"))
    dense = summary["dense"]["perplexity"]
    return [
        {**cell, "method": name, "text": text, "ppl": ppl, "dense": dense[text], "commit": head}
        for name, row in summary.items()
        for text, ppl in row["perplexity"].items()
    ]


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(["seeds", "recipes"]))
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/sparseline-bench"), show_default=True)
@click.option("--sparsity", default=0.5, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Calibration seeds 0, 1, …")
def main(name: str, work: Path, sparsity: float, seeds: int) -> None:
    head = commit()
    path = RESULTS / f"{name}.json"
    results = recorded(path)
    for seed in range(seeds):
        cell = {"sparsity": sparsity, "seed": seed}
        if any(all(record[key] == value for key, value in cell.items()) for record in results):
            continue

        def change(values: Any, seed: int = seed) -> None:
            values["texts"]["calibration"]["seed"] = seed
            values["prune"]["selection"]["sparsity"] = sparsity
            if name == "recipes":
                values["induced"] = {key: {} for key, value in RECIPES.items() if value["factors"].startswith("induce")}
                values["curved"] = {key: {} for key, value in RECIPES.items() if value["sensitivity"].startswith("curves")}
                own = {key: {k: value[k].format(name=key) for k in ("factors", "sensitivity")} for key, value in RECIPES.items()}
                values["variants"] = {key: value | own[key] for key, value in RECIPES.items()}
                values["choose"]["candidates"] = []
                values["report"]["baseline"] = "obs"
                values["tasks"]["presets"], values["exported"] = [], {}

        project = reproduce(work, f"{head}-{name}-{sparsity}-{seed}", change)
        results += records(project, cell, head)
        write_json(path, results)
    for text in ("validation", "test") if name == "seeds" else ("validation",):
        click.echo(f"\n{text}")
        for method in dict.fromkeys(record["method"] for record in results):
            row = [r["ppl"] for r in results if r["method"] == method and r["text"] == text and r["sparsity"] == sparsity]
            click.echo(f"  {method:<26}" + "".join(f"{ppl:>9.3f}" for ppl in row))


if __name__ == "__main__":
    main()
