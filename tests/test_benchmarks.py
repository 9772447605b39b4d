"""The harness of the benchmarks, with a fake study of six cells that counts what it computes; the
committed records against the studies; and the benchmarks of speed, with small shapes.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import block, floor, gpu, latency, papers, planned, processes
from benchmarks.alone import alone
from benchmarks.harness import Cell, Record, Study
from benchmarks.studies import STUDIES, main
from pipeline_lib.core.params import load, section
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.recipe.variants import read_all
from pipeline_lib.texts.texts import TextParams

ROOT = Path(__file__).parent.parent
Make = Callable[..., Study]


def cell(testbed: str, method: str, seed: int) -> Cell:
    return Cell({"testbed": testbed, "method": method, "seed": seed}, {})


def perplexity(given: Cell) -> float:
    """`new` closes half of the gap between `base` and the dense model's 10 (in logarithms),
    whatever the seed.
    """
    base = {"a": 40.0, "b": 90.0}[given.key["testbed"]] * (1 + given.key["seed"] / 10)
    return base if given.key["method"] == "base" else (base * 10) ** 0.5


@pytest.fixture
def computed() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, computed: list[str]) -> Make:
    def study(stop_after: int | None = None) -> Study:
        def measure(given: Cell) -> list[Record]:
            if stop_after is not None and len(computed) == stop_after:
                raise KeyboardInterrupt
            computed.append(given.name)
            return [
                {**given.key, "text": text, "ppl": perplexity(given), "dense": 10.0}
                for text in ("test", "wikitext2")
            ]

        def cells() -> list[Cell]:
            return [
                cell("b", "new", 0),
                *(cell("a", method, seed) for seed in (0, 1) for method in ("base", "new")),
                cell("b", "base", 0),
            ]

        return Study(
            "fake",
            cells,
            measure,
            base=lambda record: {"method": "base"},
            files=lambda given: [],
            home=tmp_path,
        )

    return study


def test_a_stopped_run_goes_on_where_it_was(make: Make, computed: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop_after=2).run()
    records = make().run()
    assert computed == ["b,new,0", "a,base,0", "a,new,0", "a,base,1", "a,new,1", "b,base,0"]  # none twice
    assert [(r["testbed"], r["seed"], r["text"]) for r in records[:3]] == [
        ("b", 0, "test"),
        ("b", 0, "wikitext2"),
        ("a", 0, "test"),
    ]
    assert all(len(r["commit"]) >= 7 for r in records)
    assert make().recorded() == records


def test_only_and_missing_choose_cells(make: Make, computed: list[str]) -> None:
    make().run({"testbed": "a", "seed": "1"})
    assert computed == ["a,base,1", "a,new,1"]
    for path in make().home.glob("cells/fake/*"):
        path.unlink()
    make().run(missing=True)  # the record has them, though their files are gone
    assert sorted(computed) == sorted(make().every)


def test_a_cell_that_is_named_is_computed_anew(make: Make, computed: list[str]) -> None:
    before = make().run()
    computed.clear()
    assert make().renew("a,new,1") == before
    assert computed == ["a,new,1"]
    # an older file would be gathered in the place of a newer record
    assert not make().file(make().every["a,new,1"]).exists()


@pytest.mark.parametrize("change", [{"rows": 4}, {"training": 4}, {"source": "other"}])
def test_a_cell_on_other_text_has_another_file(make: Make, change: dict[str, Any]) -> None:
    study = make()
    cell = study.every["a,new,1"]
    assert study.file(replace(cell, **change)) != study.file(cell) == study.file(replace(cell))


def test_gathering_keeps_what_no_file_has(make: Make, computed: list[str]) -> None:
    """Oracle: the record before; a clone has it, but no cell files."""
    before = make().run()
    for path in make().home.glob("cells/fake/*"):
        path.unlink()
    make().run({"testbed": "b", "method": "base"})
    assert make().recorded() == before
    assert computed[6:] == ["b,base,0"]


def test_verify_computes_the_named_cell_alone(make: Make, computed: list[str]) -> None:
    make().run()
    computed.clear()
    make().verify(["a,new,1"])
    assert computed == ["a,new,1"]
    make().verify([], count=2, seed=0)
    assert len(set(computed[1:])) == 2


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.009, True), (0.991, True), (1.011, False), (float("nan"), False)]
)
def test_verify_refuses_a_wrong_record(make: Make, factor: float, passes: bool) -> None:
    """Within 1% is rounding; one text that is wrong is enough."""
    study = make()
    records = study.run()
    wrong = next(
        r
        for r in records
        if (r["testbed"], r["method"], r["seed"], r["text"]) == ("a", "new", 1, "wikitext2")
    )
    wrong["ppl"] *= factor
    study.record.write_text(json.dumps(records), encoding="utf-8")
    study.verify(["a,new,0"])
    if passes:
        study.verify(["a,new,1"])
    else:
        with pytest.raises(click.ClickException, match="1 records differ by more than 1%"):
            study.verify(["a,new,1"])


def test_verify_names_what_a_cell_is_called(make: Make) -> None:
    make().run({"testbed": "a"})
    for unknown in ("a,newer,0", "b,base,0"):  # no cell; not recorded
        with pytest.raises(click.ClickException, match="a name is testbed,method,seed, for example a,base,0"):
            make().verify([unknown])


def test_the_table_pairs_seeds(make: Make) -> None:
    """Oracle: by hand: √(40·44) = 41.95 for the base, √(20·20.976) = 20.48 for the new one, half of
    the gap in every seed.
    """
    study = make()
    lines = study.table(study.run(), "test").splitlines()
    assert lines[0] == "| test | a | b | mean closed |"
    assert "| base | 41.95 ± 2.05 | 90.00 |  |" in lines
    assert "| new | 20.48 ± 0.49 (50.0%) | 30.00 (50.0%) | 50.0% |" in lines


@pytest.mark.parametrize("name", STUDIES)
def test_committed_records_are_of_cells_that_can_be_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its study's fields and a commit; a study's recipes can be parsed from the shipped
    params.yaml.
    """
    monkeypatch.chdir(ROOT)
    study = STUDIES[name]
    records = study.recorded()
    assert records
    for r in records:
        assert {"commit", "text", *study.values} <= r.keys()
    keys = {tuple(r[part] for part in next(iter(study.every.values())).key) for r in records}
    known = [one for one in study.every.values() if tuple(one.key.values()) in keys]
    assert len(known) > 20
    for one in {json.dumps([one.variant, one.arms], sort_keys=True): one for one in known}.values():
        for arm in one.arms:
            one.recipe(arm)


@pytest.mark.parametrize(
    ("only", "told"),
    [
        (
            "method=wanda",
            "sparsity has no field 'method'; fields: testbed, pattern, sparsity, allocation, score, seed.",
        ),
        ("testbed", "sparsity has no such cell; its first is llama,unstructured,0.5,uniform,obs,0."),
        ("seed=7", "sparsity has no such cell; its first is llama,unstructured,0.5,uniform,obs,0."),
    ],
)
def test_the_command_refuses_cells_that_there_are_not(
    only: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(main, ["run", "sparsity", "--only", only])
    assert done.exit_code == 1
    assert told in done.output


def test_work_alone_is_told_stopped_or_failed() -> None:
    """Oracles: what ``dict`` and ``int`` do; a sleep that would take a minute; an exit without a word."""
    assert alone(dict, [("wall_s", 1)]) == {"wall_s": 1}
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        alone(int, "x")
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"stopped after 0\.2 s"):
        alone(time.sleep, 60, limit=0.2)
    assert time.monotonic() - started < 30
    with pytest.raises(RuntimeError, match="ended from outside"):
        alone(os._exit, 1)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_sweep_is_told_in_one_line(pattern: str) -> None:
    command = [sys.executable, "-m", "benchmarks.sweep", "96", "256", "--pattern", pattern]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert list(found) == ["rows", "columns", "sweep_s", "products_s", "ratio"]
    assert (found["rows"], found["columns"]) == (96, 256)
    assert found["ratio"] == pytest.approx(found["sweep_s"] / max(found["products_s"], 1e-9))


SHAPE = block.Shape(64, 160, 4, 2, vocabulary=128)
# q, k, v, o, gate, up, down: outputs, inputs
MATRICES = ((64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160))


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_floor_does_what_sparsegpt_cannot_do_without(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: FLOPs by hand. In every block all products but the last for all eight rows, then all of
    them, in the last block for a batch of two; X Xᵀ per site; R·C²/2 multiply-adds per matrix.
    """

    def added(_sum: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
        return 2 * a.numel() * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})

    def counted(work: Callable[[], None], device: torch.device) -> Record:
        with counter:
            work()
        return {}

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(floor, "cost", counted)
    block.save(replace(SHAPE, blocks=blocks), tmp_path)
    found = block.floor(block.Files(tmp_path, 8, 32))
    weights, last, tokens = sum(r * c for r, c in MATRICES), 64 * 160, 8 * 32
    first, again = blocks * (weights - last), (blocks - 1) * weights
    forward = 2 * tokens * (first + again) + 2 * 2 * 32 * weights
    gram = blocks * 2 * tokens * (3 * 64**2 + 160**2)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.addmm_] == gram
    assert counts[torch.ops.aten.mm] == forward + blocks * sum(r * c * c for r, c in MATRICES)
    assert found["parts"].keys() == {"forward", "gram", "factor", "products"}


def test_a_block_has_its_row_beside_those_of_other_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(block, "SHAPES", {"tiny": SHAPE})
    monkeypatch.setattr(block, "PYTHON", "/nowhere/python")
    device = torch.device("cpu")
    other = dict(zip(block.KEY, ("tiny", "sparsegpt", 8192, "GPU"), strict=True)) | {
        "wall_s": 1.0,
        "commit": "0000000",
    }
    (tmp_path / "block.json").write_text(json.dumps([other]), encoding="utf-8")
    rows = block.study(["tiny, fast, 64"], device, tmp_path)
    rows.renew("tiny,fast,64,cpu")
    kept, new = block.study([], device, tmp_path).recorded()
    assert kept == other
    assert [new[part] for part in block.KEY] == ["tiny", "fast", 64, "cpu"]
    assert {"commit", "cpu_s", "peak_bytes", "floor_parts"} <= new.keys()
    assert new["wall_s"] > 0 and new["floor_s"] > 0
    assert new["rival_s"] is None and new["peak_gpu_bytes"] is None
    assert "| tiny, fast, 64 | cpu | " in block.table([new])


@pytest.mark.parametrize(
    "name", ["llama-7b", "llama-7b,wanda,8192", "llama-8b,fast,8192", "llama-7b,fast,0", "llama-7b,fast,8k"]
)
def test_a_block_that_there_is_not_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(block.main, [name])
    assert done.exit_code == 1
    assert "a name is shape,method,tokens, for example llama-7b,sparsegpt,8192." in done.output


def test_the_table_of_a_device_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in small: each has its seconds, or the reason why not; none is run twice; one that
    takes too long is told, and the rest stays.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(block, "PYTHON", "/nowhere/python")
    record = tmp_path / "gpu.json"

    def run(*more: str) -> tuple[list[Record], str]:
        done = CliRunner().invoke(
            gpu.main, ["--small", "--record", str(record), *more], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return json.loads(record.read_text(encoding="utf-8")), done.output

    first, told = run("prune wanda", "2:4 block")
    assert [r["row"] for r in first] == ["prune wanda", "2:4 block"]
    every, told = run()
    assert "prune wanda,random,cpu:" not in told  # it was there
    assert {
        "prune best",
        "calibrate",
        "scale",
        "sensitivity",
        "block floor, 256 tokens",
        "block best, 256 tokens",
    } <= {r["row"] for r in every}
    skipped = {r["row"]: r["note"] for r in every if r["wall_s"] is None}
    assert skipped.keys() == {"llm-compressor sparsegpt", "2:4 matrices", "2:4 block"}
    assert all(note.startswith("skipped: ") for note in skipped.values())
    assert all(
        r["wall_s"] >= 0 and r["note"] is None and r["peak_bytes"] >= 0
        for r in every
        if r["row"] not in skipped
    )
    assert {(r["model"], r["device"]) for r in every} == {("random", "cpu")}
    assert all(r["commit"] for r in every)
    late, told = run("prune best", "--limit", "0.01")
    assert "prune best: stopped after 0.01 s" in told
    assert [r for r in late if r["row"] != "prune best"] == [r for r in every if r["row"] != "prune best"]
    assert [(r["wall_s"], r["note"]) for r in late if r["row"] == "prune best"] == [
        (None, "stopped after 0.01 s")
    ]
    _, told = run("prune best", "--total", "1")
    assert "1 rows are left, from 'prune best' on" in told


def test_the_search_is_of_the_product_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's own call, ``_cslt_sparse_mm(packed, x.T, transpose_result=True)``, in which x
    has a multiple of eight rows.
    """
    asked: list[Any] = []

    def search(packed: torch.Tensor, x: torch.Tensor, transpose_result: bool) -> int:
        asked.append((packed.shape, x.shape, transpose_result))
        return 7

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search, raising=False)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight, alg_id: alg_id)
    weight = torch.zeros(32, 64)
    assert latency.semi_structured(weight, 1, searched=True) == 7
    assert latency.semi_structured(weight, 2048, searched=False) == 0
    assert asked == [((32, 64), (64, 8), True)]


# A plan of a model that is not here


def test_a_plan_needs_a_header_and_no_weights(tmp_path: Path) -> None:
    """The files have the size of a model, and next to nothing on disk. More GPUs hold no more each and take
    less time; what a GPU cannot hold is marked. Oracle: the parameters, counted by hand.
    """
    shape = block.Shape(512, 1024, 8, 4, blocks=3, vocabulary=8192)
    planned.save(shape, tmp_path / "model")
    files = list((tmp_path / "model").glob("*.safetensors"))
    each = 2 * 512 * 512 + 2 * 256 * 512 + 3 * 1024 * 512 + 2 * 512
    parameters = 3 * each + 2 * 8192 * 512 + 512
    assert 0 <= sum(path.stat().st_size for path in files) - 2 * parameters < 10_000
    assert sum(512 * path.stat().st_blocks for path in files) < 100_000
    found = list(planned.plans(shape))
    assert [one.base.processes for one in found] == [1, 4, 8]
    assert {one.base.checkpoint.parameters for one in found} == {parameters}
    for one, four, eight in zip(*(one.steps for one in found), strict=True):
        assert one[0].stage == four[0].stage == eight[0].stage
        assert one[0].gpu_bytes >= four[0].gpu_bytes >= eight[0].gpu_bytes
        assert one[0].flops >= four[0].flops >= eight[0].flops
    text = planned.table(found)
    assert {"calibrate", "prune fast", "evaluate"} <= set(
        re.findall(r"^\| (\w+(?: \w+)?) \|", text, re.MULTILINE)
    )
    assert "**" not in text


# Several processes


def test_what_processes_bring_is_recorded_row_by_row(tmp_path: Path) -> None:
    """A benchmark that needs 12 s, or 6 s with two processes. It stops after four rows, and the
    next run continues.
    """
    ran: list[tuple[str, int, int]] = []

    class Fake(processes.Place):
        def __init__(self, path: Path, count: int) -> None:
            self.directory = path

        def measured(self, stage: str, count: int, threads: int) -> tuple[float, dict[str, str]]:
            if len(ran) == 4:
                raise KeyboardInterrupt
            ran.append((stage, count, threads))
            return 12 / count, {"bytes": f"of {threads} threads"}

    file = tmp_path / "processes.json"
    with pytest.raises(KeyboardInterrupt):
        processes.update(file, (), Fake)
    done, ran[:] = list(ran), []
    with pytest.raises(KeyboardInterrupt):
        processes.update(file, (), Fake)
    every = [(stage, *one) for stage in processes.STAGES for one in processes.counts()]
    assert done + ran == every[:8]
    records = json.loads(file.read_text(encoding="utf-8"))
    assert {r["speedup"] for r in records if r["processes"] == 2} == {2.0}
    assert {r["speedup"] for r in records if r["processes"] == 1} == {1.0}
    assert "| best | 1 | 1 | cpu | 12.0 | 1.00 |" in processes.table(records)


def test_other_bytes_end_the_benchmark(tmp_path: Path) -> None:
    class Fake(processes.Place):
        def __init__(self, path: Path, count: int) -> None:
            self.directory = path

        def measured(self, stage: str, count: int, threads: int) -> tuple[float, dict[str, str]]:
            return 1.0, {"bytes": f"of {count} processes"}

    with pytest.raises(click.ClickException, match="calibrate: 2 processes wrote other bytes than one"):
        processes.update(tmp_path / "processes.json", (), Fake)


@pytest.mark.parametrize(
    ("arguments", "trial"),
    [(["embedded", "--trial"], True), (["facebook/opt-125m", "--revision", "0" * 40], False)],
)
def test_the_papers_tables_are_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], trial: bool
) -> None:
    """Oracle: the stages' own reading of params.yaml, and figures written by hand. The same command
    goes on; another model is refused.
    """
    monkeypatch.chdir(tmp_path)
    run = []
    monkeypatch.setattr(papers.project, "run", lambda directory: run.append(directory) or 0)
    preset = "embedded" if trial else "induction"

    def settled(directory: Path) -> None:
        place = Workspace(directory)
        for name in ("dense", *papers.first(), *papers.second()):
            place.save(place.evaluation(name), {"perplexity": {"wikitext2": 12.5, "c4": 20.25}})
            told = {
                "one": {"metrics": {"acc": {"value": 0.5}}},
                "two": {"metrics": {"acc_norm": {"value": 0.25}}},
            }
            place.save(place.tasks(name), {preset: told, "sensitivity": told})

    monkeypatch.setattr(papers.project, "settle", settled)
    for _ in range(2):
        done = CliRunner().invoke(papers.main, [*arguments, "--out", "project"], catch_exceptions=False)
        assert done.exit_code == 0
    other = ["owner/other", "--revision", "1" * 40, "--out", "project"]
    refused = CliRunner().invoke(papers.main, other, catch_exceptions=False)
    assert refused.exit_code == 2 and "params.yaml already exists with other contents" in refused.output
    assert run == [Path("project")] * 2
    assert "| dense | 12.50 | 20.25 | 37.50 |" in done.output
    assert done.output.count("| sparsegpt-50 |") == 2
    monkeypatch.chdir("project")
    found = read_all()
    assert sorted(found) == sorted({**papers.first(), **papers.second()})
    assert found["magnitude-induced-2of4"].recipe.induce and not found["magnitude-2of4"].recipe.induce
    assert found["mixed-isc-80"].recipe.allocation.method == "weight"
    for name in section("texts"):
        text = load(TextParams, f"texts.{name}")
        assert (text.kind, text.length) == (("stdlib", 256) if trial else ("hub", 2048))
