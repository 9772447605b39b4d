"""The harness of the benchmarks, with a fake study of six cells that counts what it computes; and the committed records against the studies."""

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.harness import Cell, Record, Study
from benchmarks.studies import STUDIES, main

ROOT = Path(__file__).parent.parent
Make = Callable[..., Study]


def cell(testbed: str, method: str, seed: int) -> Cell:
    return Cell({"testbed": testbed, "method": method, "seed": seed}, {})


def perplexity(given: Cell) -> float:
    """`new` closes half of the gap between `base` and the dense model's 10 (in logarithms), whatever the seed."""
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
            return [{**given.key, "text": text, "ppl": perplexity(given), "dense": 10.0} for text in ("test", "wikitext2")]

        def cells() -> list[Cell]:
            return [cell("b", "new", 0), *(cell("a", method, seed) for seed in (0, 1) for method in ("base", "new")), cell("b", "base", 0)]

        return Study("fake", cells, measure, base=lambda record: {"method": "base"}, files=lambda given: [], home=tmp_path)

    return study


def test_a_stopped_run_goes_on_where_it_was(make: Make, computed: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop_after=2).run()
    records = make().run()
    assert computed == ["b,new,0", "a,base,0", "a,new,0", "a,base,1", "a,new,1", "b,base,0"]  # none twice
    assert [(r["testbed"], r["seed"], r["text"]) for r in records[:3]] == [("b", 0, "test"), ("b", 0, "wikitext2"), ("a", 0, "test")]
    assert all(len(r["commit"]) >= 7 for r in records)
    assert make().recorded() == records


def test_only_and_missing_choose_cells(make: Make, computed: list[str]) -> None:
    make().run({"testbed": "a", "seed": "1"})
    assert computed == ["a,base,1", "a,new,1"]
    for path in make().home.glob("cells/fake/*"):
        path.unlink()
    make().run(missing=True)  # the record has them, though their files are gone
    assert sorted(computed) == sorted(make().every)


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


@pytest.mark.parametrize(("factor", "passes"), [(1.009, True), (0.991, True), (1.011, False), (float("nan"), False)])
def test_verify_refuses_a_wrong_record(make: Make, factor: float, passes: bool) -> None:
    """Within 1% is rounding; one text that is wrong is enough."""
    study = make()
    records = study.run()
    wrong = next(r for r in records if (r["testbed"], r["method"], r["seed"], r["text"]) == ("a", "new", 1, "wikitext2"))
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
    """Oracle: by hand: √(40·44) = 41.95 for the base, √(20·20.976) = 20.48 for the new one, half of the gap in every seed."""
    study = make()
    lines = study.table(study.run(), "test").splitlines()
    assert lines[0] == "| test | a | b | mean closed |"
    assert "| base | 41.95 ± 2.05 | 90.00 |  |" in lines
    assert "| new | 20.48 ± 0.49 (50.0%) | 30.00 (50.0%) | 50.0% |" in lines


@pytest.mark.parametrize("name", STUDIES)
def test_committed_records_are_of_cells_that_can_be_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its study's fields and a commit; a study's recipes can be parsed from the shipped params.yaml."""
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
        ("method=wanda", "sparsity has no field 'method'; fields: testbed, pattern, sparsity, allocation, score, seed."),
        ("testbed", "sparsity has no such cell; its first is llama,unstructured,0.5,uniform,obs,0."),
        ("seed=7", "sparsity has no such cell; its first is llama,unstructured,0.5,uniform,obs,0."),
    ],
)
def test_the_command_refuses_cells_that_there_are_not(only: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(main, ["run", "sparsity", "--only", only])
    assert done.exit_code == 1
    assert told in done.output
