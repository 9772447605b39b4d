"""The harness of the real testbed, on a tiny model with texts of made-up words. Oracles: the
protocol's numbers, and the library's own functions.
"""

import dataclasses
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from project import ROOT, text
from tiny import load_full, make_model

from benchmarks import calibration_text, harness, real, sources
from benchmarks.harness import Record
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.models.checkpoint import open_checkpoint

FIELDS = [
    "table",
    "model",
    "method",
    "pattern",
    "seed",
    "text",
    "ppl",
    "dense",
    "tasks",
    "wall_s",
    "cpu_s",
    "peak_bytes",
    "device",
    "commit",
]
SCORES = {
    "real_copa": {"acc": [1.0, 0.0, 1.0, 1.0]},
    "real_sciq": {"acc": [0.0, 1.0, 0.0, 0.0], "acc_norm": [1.0, 1.0, 0.0, 1.0]},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The testbed's folder; the record is in ``record``, and work is done in this process."""
    make_model(tmp_path / "model", "llama", max_position_embeddings=1024, dtype=real.torch.bfloat16)
    words = functools.partial(text, words=12_000)
    names = (
        "real/texts/wikitext2.test",
        "real/texts/wikitext2.train-part",
        "texts/mix.test",
        "texts/mix.valid",
        "texts/mix.calib",
    )
    for seed, name in enumerate(names):
        said = f"<|doc|>\n{words(seed)}" if "mix" in name else words(seed)
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said, encoding="utf-8")
    pages = [json.dumps({"text": text(seed, words=420)}) for seed in range(10, 210)]
    (tmp_path / "real/texts/c4.calib.jsonl").write_text("\n".join(pages), encoding="utf-8")
    monkeypatch.setattr(real, "MODEL", tmp_path / "model")
    monkeypatch.setattr(real, "TESTBED", tmp_path)
    monkeypatch.setattr(real, "DATA", tmp_path / "real")
    monkeypatch.setattr(real, "STUDY", dataclasses.replace(real.STUDY, home=tmp_path / "record"))
    monkeypatch.setattr(real, "alone", lambda work, *given: work(*given))
    real.real.cache_clear()
    real._documents.cache_clear()
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.fixture
def ran(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[Record]]]:
    """``run`` with arguments: what it prints, and the record. Tasks are answered by heart."""

    class Told:
        scores = SCORES

    monkeypatch.setattr(real, "run_tasks", lambda *_: Told)

    def run(*arguments: str, code: int = 0) -> tuple[str, list[Record]]:
        done = CliRunner().invoke(real.main, ["run", *arguments], catch_exceptions=False)
        assert done.exit_code == code, f"{done.output} {done.exception!r}"
        return done.output, real.STUDY.recorded()

    return run


def test_every_cell_can_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipes are of the shipped params.yaml; no name stands for two."""
    monkeypatch.chdir(ROOT)
    cells = list(real.cells())
    assert len({one.name for one in cells}) == len(cells) == len(real.STUDY.every)
    for one in cells:
        for arm in one.arms:
            one.recipe(arm)
    main = [one.key for one in cells if one.key["table"] == "main"]
    assert {(key["method"], key["pattern"]) for key in main if key["method"] != "dense"} == {
        (method, pattern)
        for method in real.MAIN
        if method != "dense"
        for pattern in ("50%", "60%", "70%", "2:4")
    }
    assert {key["table"] for key in (one.key for one in cells)} == set(real.TABLES)
    assert all(
        one.rows == 128 and one.source == "c4.calib" for one in cells if one.key["table"] != "ablation"
    )


@pytest.mark.usefixtures("here")
def test_rows_are_those_of_the_protocol() -> None:
    """Pages that choose are none that calibrate; a quarter of the rows judges. Oracle: sizes, and
    the pages themselves.
    """
    bed = real.Real()
    rows = bed.calibration("c4.calib", 128, 0)
    assert rows["fit"].shape == (96, 512) and rows["held_out"].shape == (32, 512)
    assert not {*real._documents("c4.calib")} & {*real._documents("c4.valid")}
    assert [
        len(real._documents(name)) for name in ("c4.calib", "c4.valid", "wikitext2.test", "mix.test")
    ] == [100, 100, 1, 1]
    assert {
        **dict.fromkeys(("wikitext2.test", "mix.test"), (32, 1024)),
        **dict.fromkeys(("c4.valid", "mix.valid"), (32, 512)),
    } == {**real.REPORTED, **real.CHOSEN}


def test_cells_are_recorded_one_by_one_and_not_computed_twice(
    ran: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the fields that readers rely on; transformers' own model for the perplexity."""
    _, first = ran("--only", "method=dense")
    assert [record["text"] for record in first] == ["wikitext2.test", "mix.test"]
    for record in first:
        assert sorted(record) == sorted(FIELDS)
        assert (
            record["ppl"]
            == record["dense"]
            == perplexity(load_full(here / "model"), real.Real(1024).rows(record["text"], 32), 8)
        )
        assert record["tasks"]["mean"] == 0.75
        assert record["tasks"]["each"]["real_sciq"] == {"metric": "acc_norm", "value": 0.75, "items": "1101"}
    kept = ran("--only", "table=main", "--only", "pattern=50%", "--only", "method=magnitude")[1]
    assert kept[:2] == first and [record["method"] for record in kept[2:]] == ["magnitude"] * 2
    monkeypatch.setattr(real, "made", None)  # nothing is computed any more
    assert ran("--only", "method=dense")[1] == kept


def test_a_distilled_model_starts_from_what_was_kept(
    ran: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cost is that of both. Oracle: the record of the base; nothing is pruned a second time."""
    few = {name: dataclasses.replace(how, training=8 * (how.training > 0)) for name, how in real.MAIN.items()}
    monkeypatch.setitem(real.METHODS, "main", few)
    cell = ("--only", "table=main", "--only", "pattern=50%", "--only", "seed=0")
    base = ran(*cell, "--only", "method=sparsegpt")[1]
    (kept,) = (path.parent for path in here.glob("record/cells/real/*/cost.json"))
    assert len(list(kept.glob("*.safetensors"))) == open_checkpoint(here / "model").architecture.depth
    monkeypatch.setattr(real, "prune", None)
    found = [
        record
        for record in ran(*cell, "--only", "method=sparsegpt+distil")[1]
        if record["method"] == "sparsegpt+distil"
    ]
    assert (
        found[0]["training"]["kept"]
        and found[0]["training"]["held_out_after"] < found[0]["training"]["held_out_before"]
    )
    assert found[0]["wall_s"] > base[0]["wall_s"]
    assert found[0]["ppl"] != base[0]["ppl"]


def test_levers_prune_the_first_blocks_alone(
    ran: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They meet the budget there, and measure once what their allocations share. Oracle: the dense
    blocks, and the cells one by one.
    """
    names = ["fast, first 10 blocks", "fast, first 10 blocks, dense stream"]
    few = {name: dataclasses.replace(real.ABLATION[name], depth=1) for name in names}
    monkeypatch.setitem(real.METHODS, "ablation", real.ABLATION | few)
    found, times = {}, []
    perplexity, measured = real.Real.perplexity, real.Lab.measured

    def noted(bed: real.Real, blocks: real.Tensors, name: str, *_: Any) -> float:
        value = perplexity(bed, blocks, name)
        if blocks:
            found[value] = blocks
        return value

    monkeypatch.setattr(real.Real, "perplexity", noted)
    monkeypatch.setattr(real.Lab, "measured", lambda lab, how: times.append(how) or measured(lab, how))
    records = [record for name in names for record in ran("--only", f"method={name}")[1][-2:]]
    assert len(times) == 1
    for blocks in found.values():
        assert list(blocks) == [0]
        weights = [tensor for name, tensor in blocks[0].items() if tensor.ndim == 2]
        zeros = sum(int((tensor == 0).sum()) for tensor in weights)
        assert zeros / sum(map(torch.Tensor.numel, weights)) == pytest.approx(0.5, abs=1e-3)
    assert [record["text"] for record in records] == [*real.CHOSEN] * 2
    assert [record["ppl"] for record in records] == list(found) and len(found) == 4
    assert all(record["ppl"] != record["dense"] for record in records)


def test_an_evaluation_that_fails_does_not_cost_the_pruning(
    ran: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: later runs, which cannot prune. Perplexities and tasks may come one after the other. The
    blocks are removed when the record has both.
    """
    cell = ("--only", "table=main", "--only", "pattern=50%", "--only", "seed=0", "--only", "method=fast")

    def refused(*_: Any) -> Any:
        raise RuntimeError("out of time")

    with monkeypatch.context() as broken:
        broken.setattr(real, "tasks", refused)
        assert ran(*cell, code=1)[1] == []
    assert list(here.glob("record/cells/real/*/cost.json"))
    monkeypatch.setattr(real, "prune", None)
    with monkeypatch.context() as hurried:
        hurried.setattr(real, "LATER", True)
        assert [record["tasks"] for record in ran(*cell)[1]] == [None] * 2
    assert [record["tasks"]["mean"] for record in ran(*cell)[1]] == [0.75] * 2
    assert not list(here.glob("record/cells/real/*/cost.json"))


def test_records_are_committed_cell_by_cell(
    ran: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, too, which git does not know yet. Oracle: git's log, and what git has of the
    record. What else has changed is not committed.
    """
    monkeypatch.setattr(harness, "ROOT", here)

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=here, check=True, capture_output=True, text=True)
        return done.stdout

    git("init", "--quiet")
    for name in ("user.name", "user.email"):
        git("config", name, "someone")
    cell = ("--only", "table=main", "--only", "pattern=50%", "--commit", "--only")
    ran(*cell, "method=dense")
    ran(*cell, "method=magnitude")
    said = "Benchmark real: main,SmolLM2-135M-Instruct"
    assert git("log", "--format=%s").splitlines() == [f"{said},magnitude,50%,0", f"{said},dense,50%,0"]
    assert git("ls-files").splitlines() == ["record/real.json"]
    assert json.loads(git("show", "HEAD:record/real.json")) == real.STUDY.recorded()


def test_what_fails_does_not_keep_the_others(
    ran: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        real.compressed.__globals__["Path"],
        "exists",
        lambda path: "rivals" not in str(path) and path.is_file(),
    )
    output, records = ran(
        "--only", "table=main", "--only", "pattern=2:4", "--only", "method=llm-compressor wanda", code=1
    )
    assert "run `make rivals-environment`" in output and "1 cells failed" in output
    assert records == []
    del here


def test_an_unknown_cell_is_refused(ran: Callable[..., Any]) -> None:
    assert "there is no cell 'method=slow'" in ran("--only", "method=slow", code=1)[0]
    assert "there is no cell 'main,x'" in ran("--cell", "main,x", code=1)[0]


def test_differences_are_paired() -> None:
    """Oracle: by hand: the second task differs in one item of four, so the mean of two by an
    eighth; its variance is 1/4 over 4 items, of two means.
    """
    each = {
        name: {"metric": "acc", "value": 0.5, "items": items}
        for name, items in (("a", "0101"), ("b", "1101"))
    }
    other = {"a": each["a"], "b": {**each["b"], "items": "1100"}}
    assert (
        real._apart({"mean": 0.625, "each": each}, {"mean": 0.5, "each": other})
        == f"+12.50 ± {100 * (0.25 / 4) ** 0.5 / 2:.2f}"
    )


# What calibration text is worth

OWN = {"prompt_tokens": 16, "new_tokens": 240, "batch_rows": 256}


@pytest.fixture
def studied(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[Record]]]:
    """As ``ran``, of the study of calibration texts; the model's own documents are shorter."""
    told = type("Told", (), {"scores": SCORES})
    monkeypatch.setattr(real, "run_tasks", lambda *_: told)
    monkeypatch.setattr(real, "OWN", real.OWN | OWN)
    monkeypatch.setattr(calibration_text, "alone", lambda work, *given: work(*given))
    study = dataclasses.replace(calibration_text.STUDY, home=here / "record")
    monkeypatch.setattr(calibration_text, "STUDY", study)

    def run(*arguments: str) -> tuple[str, list[Record]]:
        done = CliRunner().invoke(calibration_text.main, [*arguments], catch_exceptions=False)
        assert done.exit_code == 0, f"{done.output} {done.exception!r}"
        return done.output, calibration_text.STUDY.recorded()

    return run


def test_a_cell_of_the_study_is_what_it_says(
    studied: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells, one after the other, and then none. Oracle: transformers' two models, whole, and
    the definitions of perplexity, KL and agreement.
    """
    blocks = {}
    monkeypatch.setattr(
        calibration_text, "loaded", lambda folder: blocks.setdefault("pruned", real.loaded(folder))
    )
    output, first = studied("run", "--only", "source=C4", "--only", "method=sparsegpt")
    assert "not run yet: none,dense; WikiText-2,sparsegpt" in output
    fields = ["source", "method", "text", "ppl", "kl", "agreement", "tasks", "commit"]
    assert [sorted(record) for record in first] == [sorted(fields)] * 3
    assert {(one["source"], one["method"]) for one in first} == {("C4", "sparsegpt")}
    assert [one["text"] for one in first] == list(calibration_text.TEXTS)
    assert [one["tasks"]["mean"] for one in first] == [0.75] * 3
    dense, pruned = load_full(here / "model"), load_full(here / "model")
    real.put(pruned, real.real(), blocks["pruned"])
    share = [float((one == 0).float().mean()) for one in blocks["pruned"][0].values() if one.ndim == 2]
    assert share == pytest.approx([0.5] * len(share), abs=0.01)
    for record in first:
        rows = real.real().evaluated(record["text"])
        p, q = (model(input_ids=rows).logits[:, :-1].log_softmax(-1) for model in (dense, pruned))
        loss = -q.gather(-1, rows[:, 1:, None]).mean()
        assert record["ppl"] == pytest.approx(float(loss.exp()), rel=1e-4)
        assert record["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        assert record["agreement"] == pytest.approx(
            float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=1e-3
        )
    second = studied("run", "--only", "method=dense")[1]
    assert second[3:] == first and [one["kl"] for one in second[:3]] == pytest.approx([0] * 3, abs=1e-6)
    assert [one["agreement"] for one in second[:3]] == pytest.approx([1] * 3, abs=1e-3)
    monkeypatch.setattr(real, "prune", None)
    output, again = studied("run", "--only", "source=C4", "--only", "method=sparsegpt")
    assert again == second and "| sparsegpt, C4 |" in output and "75.00 ± " in output


@pytest.mark.usefixtures("studied")
def test_calibration_texts_are_four(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own documents begin as pages of C4 do, are written once, and are not the pages.
    Oracle: the pages' tokens.
    """
    cells = {(one.key["source"], one.key["method"]): one for one in calibration_text.STUDY.every.values()}
    assert len(cells) == 9 and all(one.rows == 128 for one in cells.values())
    bed = real.Real()
    rows = {
        source: real.lab(cells[source, "fast"]).rows
        for source in ("C4", "WikiText-2", "generated", "random tokens")
    }
    assert {(len(one["fit"]), len(one["held_out"]), one["fit"].shape[1]) for one in rows.values()} == {
        (96, 32, 512)
    }
    (kept,) = here.glob("record/cells/generated-*.json")
    documents = json.loads(kept.read_text(encoding="utf-8"))
    pages = [bed.tokenizer(page)["input_ids"] for page in real._documents("c4.calib")]
    assert [one[:16] for one in documents] == [
        pages[number % len(pages)][:16] for number in range(len(documents))
    ]
    assert not any(tuple(one) in {tuple(page[: len(one)]) for page in pages} for one in documents)
    assert sum(map(len, documents)) >= 128 * 512 > sum(map(len, documents[:-1]))
    monkeypatch.setattr(real, "Author", None)  # nothing is written any more
    again = real.lab(cells["generated", "sparsegpt"]).rows
    assert all(torch.equal(again[part], rows["generated"][part]) for part in again)


# Where pruned models lose


def test_where_a_model_loses(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of the dense model and of SparseGPT. Oracles: transformers' hidden states, and models
    put together by hand.
    """
    monkeypatch.setattr(sources, "STUDY", dataclasses.replace(sources.STUDY, home=here / "record"))
    found: dict[str, Any] = {}
    made = sources.made

    def noted(asked: harness.Cell, folder: Path) -> Any:
        return found.setdefault(asked.key["method"], made(asked, folder))

    monkeypatch.setattr(sources, "made", noted)
    for method in ("dense", "sparsegpt"):
        done = CliRunner().invoke(sources.main, ["run", "--only", f"method={method}"], catch_exceptions=False)
    assert done.exit_code == 0 and "all pruned: sparsegpt" in done.output
    records = {one["method"]: one for one in sources.STUDY.recorded()}
    rows, blocks = real.real().evaluated(sources.TEXT)[: sources.ROWS], found["sparsegpt"][0]
    dense, pruned = load_full(here / "model"), load_full(here / "model")
    real.put(pruned, real.real(), blocks)
    before, wanted, *_ = dense(rows, output_hidden_states=True).hidden_states
    error = (pruned(rows, output_hidden_states=True).hidden_states[1] - wanted).square().sum(-1)
    size = wanted.square().sum(-1)
    entry = records["sparsegpt"]["blocks"][0]
    assert entry["first"] == pytest.approx(float(error[:, 0].sum() / size[:, 0].sum()), rel=1e-3)
    assert entry["others"] == pytest.approx(float(error[:, 1:].sum() / size[:, 1:].sum()), rel=1e-3)
    assert records["sparsegpt"]["ppl"] == pytest.approx(perplexity(pruned, rows, 8), rel=1e-5)
    real.put(pruned, real.real(), {1: blocks[1]})
    assert entry["restored"] == pytest.approx(perplexity(pruned, rows, 8), rel=1e-5)
    assert records["sparsegpt"]["dense"] == pytest.approx(perplexity(dense, rows, 8), rel=1e-5)
    squares = dense.model.layers[0].input_layernorm(before).double().square()
    site = next(iter(records["dense"]["blocks"][0].values()))
    diagonal = squares.mean((0, 1))
    assert site["share"] == pytest.approx(float(squares[:, 0].sum() / squares.sum()), rel=1e-4)
    assert site["spread"] == pytest.approx(float(diagonal.mean() / diagonal.median()), rel=1e-4)
