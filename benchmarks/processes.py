"""Stages on two processes against one: ``python -m benchmarks.processes [STAGE …]``.

The model is a Llama of two blocks of width 1,024 with random weights. Calibration takes 64 rows of
512 tokens of Python's standard library (128 for ``calibrate``, where imports would otherwise be a
sixth of the time). The stages run as `dvc repro` runs them, from a process that has already
imported torch, and the seconds are those of their cost records. On a CPU, one process is compared
with two, with one thread each, and with one process of two threads. With
``SPARSELINE_DEVICE=cuda``, one process is compared with one per GPU. Allocations are uniform, so
that no other stage has to run before. Otherwise ``best`` is pruned as in params.yaml.

``speedup`` is relative to one process with one thread. All processes of one thread must write the
same bytes, or the benchmark ends. The rows that ``results/processes.json`` lacks are run; those of
named stages run again.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from ruamel.yaml import YAML

from benchmarks.block import Shape, save
from benchmarks.harness import EIGHT_EPOCHS, RESULTS, UNIFORM, Record, commit
from pipeline_lib.core import files, settings
from pipeline_lib.core.params import merge

ROOT = Path(__file__).parent.parent
SHAPE = Shape(1024, 2816, 16, 16, blocks=2, vocabulary=4096)  # room for the tokenizer
ROWS, LENGTH = {"calibrate": 128, "sparsegpt": 64, "best": 64}, 512
STAGES = {"calibrate": "calibrate", "sparsegpt": "prune sparsegpt", "best": "prune best"}
BEFORE = (
    "keys",
    "prepare",
    "text calibration",
    *(f"{stage} {name}" for name in ("sparsegpt", "best") for stage in ("allocate", "induce")),
)
KEY = ("stage", "processes", "threads", "device")


class Place:
    """A project in a directory: this checkout's code, the model, and the stages' inputs."""

    def __init__(self, directory: Path, shape: Shape, rows: tuple[int, int]) -> None:
        self.directory = directory
        for name in ("pipeline_lib", "stages", "env.lock.json", "data/stdlib.json"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).symlink_to(ROOT / name)
        save(shape, directory / "data" / "model")
        yaml = YAML(typ="safe")
        shipped: Any = yaml.load(ROOT / "params.yaml")
        count, length = rows
        changes: dict[str, Any] = {
            "model": {"path": "data/model"},
            "texts": {"calibration": {"rows": count, "length": length, "training": 0}},
        }
        values = merge(shipped, changes)
        variants = values["variants"]
        values["variants"] = {
            "sparsegpt": merge(variants["sparsegpt"], UNIFORM),
            "best": merge(merge(variants["best"], EIGHT_EPOCHS), UNIFORM),
            "papers": variants["papers"],  # it reads what calibrate collects
        }
        with (directory / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(values, file)
        for step in BEFORE:
            self.run(step, {})

    def run(self, step: str, own: Mapping[str, str]) -> None:
        """Run a stage, in processes of its own.

        Raises:
            click.ClickException: it failed.
        """
        name, *arguments = step.split()
        stage = [sys.executable, "-m", f"stages.{name}", *arguments]
        environ = os.environ | {"SPARSELINE_SCRATCH": str(self.directory / "scratch"), **own}
        command = [sys.executable, "-m", "stages.preload", *stage]
        done = subprocess.run(
            command, cwd=self.directory, env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise click.ClickException(f"{step} ended with {done.returncode}: {done.stdout}{done.stderr}")

    def measured(self, stage: str, processes: int, threads: int) -> tuple[float, dict[str, str]]:
        """Wall seconds of a stage, and the SHA-256 of each file that it wrote."""
        own = {"SPARSELINE_PROCESSES": str(processes), "SPARSELINE_THREADS": str(threads)}
        self.run(STAGES[stage], own)
        out = "calibrate" if stage == "calibrate" else f"prune/{stage}"
        made = {
            str(path.relative_to(self.directory)): files.sha256(path)
            for path in sorted((self.directory / "build" / out).rglob("*"))
            if path.is_file()
        }
        costs = self.directory / "build" / "costs" / f"{out.replace('/', '-')}.json"
        return float(json.loads(costs.read_text(encoding="utf-8"))["wall_s"]), made


def counts() -> list[tuple[int, int]]:
    """Numbers of processes, and of threads of each; the baseline comes first."""
    if settings.device_name() != "cpu":
        return [(1, 1), (torch.cuda.device_count(), 1)] if torch.cuda.device_count() > 1 else [(1, 1)]
    return [(1, 1), (2, 1), (1, 2)]


def rows(known: Sequence[Record], named: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Stages, and the numbers of processes and threads to run for each."""
    device = settings.device_name()
    have = {tuple(record[key] for key in KEY) for record in known if record["stage"] not in named}
    for stage in STAGES:
        missing = [one for one in counts() if (stage, *one, device) not in have]
        if missing and (stage in named or not named):
            yield stage, missing


def measure(
    place: Place, stage: str, which: Sequence[tuple[int, int]], known: Sequence[Record]
) -> Iterator[Record]:
    """Yield the records of a stage, each as soon as it is measured.

    Raises:
        click.ClickException: several processes wrote other bytes than one.
    """
    device, bytes_of_one = settings.device_name(), dict[str, str]()
    alone = [r["wall_s"] for r in known if [r[key] for key in KEY] == [stage, 1, 1, device]]
    for processes, threads in which:
        seconds, made = place.measured(stage, processes, threads)
        if (processes, threads) == (1, 1):
            alone, bytes_of_one = [seconds], made
        elif threads == 1 and bytes_of_one and made != bytes_of_one:
            raise click.ClickException(f"{stage}: {processes} processes wrote other bytes than one")
        found = {"stage": stage, "processes": processes, "threads": threads, "device": device}
        yield found | {"wall_s": seconds, "speedup": round(alone[0] / seconds, 2), "commit": commit()}


def table(records: Sequence[Record]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| stage | processes | threads of each | device | seconds | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        shown = [*(str(r[key]) for key in KEY), f"{r['wall_s']:.1f}", f"{r['speedup']:.2f}"]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def update(file: Path, named: Sequence[str], made: Callable[[Path, int], Place]) -> list[Record]:
    """Measure what the record lacks; each row is recorded as soon as it is measured."""
    records: list[Record] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for stage, which in rows(records, named):
            place = made(Path(folder) / stage, ROWS[stage])
            for record in measure(place, stage, which, records):
                records = [r for r in records if [r[key] for key in KEY] != [record[key] for key in KEY]]
                records = sorted([*records, record], key=lambda r: [*STAGES].index(r["stage"]))
                file.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                click.echo(f"{stage}, {record['processes']} × {record['threads']}: {record['wall_s']} s")
    return records


@click.command(help=__doc__)
@click.argument("stages", nargs=-1, type=click.Choice(list(STAGES)))
def main(stages: tuple[str, ...]) -> None:
    found = update(
        RESULTS / "processes.json", stages, lambda path, count: Place(path, SHAPE, (count, LENGTH))
    )
    click.echo(table(found))


if __name__ == "__main__":
    main()
