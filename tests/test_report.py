"""The report from synthetic facts. Oracles: arithmetic by hand, the HTML parser, and the bytes of a
second run.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dvc_render.vega import VegaRenderer
from project import ROOT, change_artifact, read_params, recipe
from ruamel.yaml import YAML
from tiny import discovered, make_config

from pipeline_lib.core.artifacts import write_json
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import sha256
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.settings import VerdictParams
from pipeline_lib.models.architecture import Architecture
from pipeline_lib.models.written import to_json
from pipeline_lib.reporting import content, costs, overview, table
from pipeline_lib.reporting.render import costs as render_costs
from pipeline_lib.reporting.render import render
from pipeline_lib.reporting.table import Column, Results

KINDS = {"q": 1000, "v": 1000, "down": 2000}  # kind -> size
# ln ppl dense = 2, baseline = 3 (test) and 2.5 (validation): gaps are easy to tell
# name -> (test, validation)
LOG_PERPLEXITY = {"dense": (2.0, 2.0), "plain": (3.0, 2.5), "base": (3.0, 2.5), "full": (2.75, 2.125)}
DIVERGENCE = {  # the same on both texts
    "plain": {"kl": 0.5, "kl_99": 2.0, "agreement": 0.5},
    "base": {"kl": 0.125, "kl_99": 1.0, "agreement": 0.625},
    "full": {"kl": 0.0625, "kl_99": 1.25, "agreement": 0.75},
}
EVIL = '<script>alert("x")</script> & <b>bold</b> ```` {{ 7 * 7 }}'


def settings(name: str) -> dict[str, Any]:
    """A recipe as prune writes it into the facts."""
    full = name == "full"
    changes: dict[str, Any] = {
        "selection": {"sparsity": 0.5, "group": "block", "block": 128},
        "allocation": {"alpha": 0.15},
    }
    if full:
        changes["allocation"]["method"] = "weight"
        changes |= {
            "quantization": {"bits": 4, "group": 64, "symmetric": False},
            "induce": read_params(ROOT)["induce"],
        }
    return recipe(("obs", "finetune_channels") if full else (), **changes).model_dump(mode="json")


def induction(block: int) -> dict[str, Any]:
    """Outcome of one block: learned, start, none, and over again."""
    choice = ("learned", "start", "none")[block % 3]
    return {
        "choice": choice,
        "judged": (
            {"none": 0.06, "start": 0.08, "learned": 0.07} | ({choice: 0.05} if choice != "none" else {})
        ),
        "held_out": {"none": 0.04, "start": 0.05, "learned": 0.03},
        "mask_changed": 0.03 if choice != "none" else 0.0,
    }


def facts(name: str, depth: int) -> dict[str, Any]:
    full = name == "full"
    matrices = {}
    for block in range(depth):
        for number, (kind, size) in enumerate(KINDS.items()):
            density = 0.5 + (0.1 * (number - 1) if full and kind != "down" else 0)
            # 1000·0.4 + 1000·0.5 + 2000·0.55 = half of 4000
            density += 0.05 if full and kind == "down" else 0
            matrices[f"layers.{block}.{kind}"] = {
                "block": block,
                "kind": kind,
                "size": size,
                "kept": round(density * size),
                "layer_error": 0.01 * (number + 1),
                "damping": 0.01,
            }
    # The last block's fit was of no use: its block came back unfitted.
    fits = [
        {"fit_before": 0.05, "fit_after": 0.04, "held_out_before": 0.06, "held_out_after": 0.05, "epochs": 3}
        for _ in range(depth)
    ]
    fits[-1] |= {"fit_after": 0.05, "held_out_after": 0.06, "epochs": 0}
    transform: dict[str, Any] = {}
    if full:
        transform = {"induction": {str(block): induction(block) for block in range(depth)}}
    kept, size = (sum(matrix[key] for matrix in matrices.values()) for key in ("kept", "size"))
    return {
        "settings": settings(name),
        "kept": kept,
        "prunable": size,
        "sparsity": 1 - kept / size,
        "zeros": size - kept + (100 if full else 0),  # its kept weights are quantised
        "matrices": matrices,
        "blocks": {str(block): {"finetune_channels": fits[block]} if full else {} for block in range(depth)},
        "transform": transform,
        "quantization": None,
        "calibration": None,
    }


def sensitivities(depth: int) -> dict[str, Any]:
    found = {}
    for block in range(depth):
        for number, kind in enumerate(KINDS):
            trace = (-1) ** block * 10.0 ** -(number + 1)
            entry = {
                "trace": trace,
                "stderr": 0.004,
                "sensitivity": max(trace, 0.004),
                "block": block,
                "kind": kind,
            }
            found[f"layers.{block}.{kind}"] = entry
    return found


def sizes(name: str) -> dict[str, Any]:
    """12,000 weights of 16 bits in a file of 30 kB; full has them in nine bits each."""
    formats = {"dense": {"matrix_bytes": 24000, "file_bytes": 30000, "bits": 16.0}}
    if name == "full":
        formats["bitmask"] = {"matrix_bytes": 13500, "file_bytes": 19800, "bits": 9.0}
    return {
        "weights": 12000,
        "zeros": 0 if name == "dense" else 6000,
        "theoretical_bits": 16.0 if name == "dense" else 9.0,
        "formats": formats,
    }


def make(build: Path, depth: int = 3) -> Path:
    """A build folder as the stages leave it."""

    workspace = Workspace(build.parent)
    workspace.made_for("of the model", build)

    def write(name: str, value: Any) -> None:
        workspace.save(build / name, value)

    hashes = {"config.json": "0" * 64}
    source = {
        "path": "data/tiny",
        "id": None,
        "revision": None,
        "family": "llama",
        "dtype": "float32",
        "parameters": 12345,
        "versions": {"torch": "2.13"},
        "architecture": to_json(
            Architecture("llama", "layers", 32, (discovered(make_config("llama")),) * depth, frozenset())
        ),
    }
    write("prepare/model.json", source | {"sha256": hashes})
    for name, (test, validation) in LOG_PERPLEXITY.items():
        better = 0.1 if name == "full" else 0.0
        tasks = {
            "next_line": {
                "metrics": {
                    "acc": {"value": 0.6 + better, "stderr": 0.0123456789},
                    "acc_norm": {"value": 0.7 - better, "stderr": 0.01},
                },
                "chance": 0.25,
                "items": 100,
                "of": 200,
                "truncated": 0,
            },
            "free": {
                "metrics": {"acc": {"value": 0.5, "stderr": 0.02}},
                "chance": None,
                "items": 50,
                "of": 50,
                "truncated": 3,
            },
            "wiki": {
                "metrics": {
                    "exact_match, strict": {"value": 0.25, "stderr": 0.05},
                    "word_perplexity": {"value": 20.0 + 10 * better, "stderr": None},
                },
                "chance": None,
                "items": 5,
                "of": 5,
                "truncated": 0,
            },
        }
        measured = {
            "perplexity": {"test": math.exp(test), "validation": math.exp(validation)},
            "divergence": {},
        }
        if name != "dense":
            measured["divergence"] = dict.fromkeys(measured["perplexity"], DIVERGENCE[name])
        write(f"evaluate/{name}.json", measured)
        write(f"tasks/{name}.json", {"zero": tasks})
        samples = [{"prompt": f"\nof {EVIL}", "completion": f"same then {name} {EVIL}"}]
        write(f"completions/{name}.json", {"completions": samples})
        if name != "dense":
            write(f"facts/{name}.json", facts(name, depth))
            write(f"training/{name}.json", {})
        write(f"sizes/{name}.json", {} if name == "plain" else sizes(name))
    for name, use in (("calibration", "calibrate"), ("validation", "evaluate"), ("test", "evaluate")):
        rows = {
            "rows": 8,
            "length": 32,
            "documents": 1,
            "tokens": 1234,
            "seed": 0 if use == "calibrate" else None,
            "kind": "files",
        }
        rows |= {"start": "document"}
        workspace.save_tensors(
            build / "texts" / use / f"{name}.safetensors",
            {},
            rows | {"sha256": {f"{name}.txt": f"{len(name):064d}"}},
        )
    write(
        "choice.json",
        {
            "text": "validation",
            "chosen": "full",
            "perplexity": {"base": math.exp(2.5), "full": math.exp(2.125)},
        },
    )
    write("sensitivity/sensitivity.json", sensitivities(depth))
    probed = {
        "estimator": "fisher",
        "probes": 24,
        "rows_per_probe": 2,
        "output_moments": "diagonal",
        "wanted_moments": "full",
    }
    write(
        "sensitivity/estimate.json",
        probed | {"agreement": 0.876, "wanted": 0.9, "reached": False, "relative_error": 0.31},
    )
    allocations = {f"allocate-{name}": 1 for name in LOG_PERPLEXITY if name != "dense"}
    stages = allocations | {
        "prune-plain": 10,
        "prune-base": 20,
        "prune-full": 30,
        "induce-full": 40,
        "calibrate": 5,
        "scale": 1,
        "sensitivity": 60,
    }
    for number, (stage, wall) in enumerate(stages.items()):
        record = {"wall_s": wall, "cpu_s": wall / 2, "peak_rss_bytes": (number + 1) * 10**9}
        made = build / "choice.json"
        write_json(
            build / f"costs/{stage}.json", record | {"output": {"path": str(made), "sha256": sha256(made)}}
        )
    return build


def collect(
    build: Path, names: tuple[str, ...] = ("plain", "base", "full"), baseline: str = "base"
) -> Results:
    """What a params.yaml beside ``build`` asks for."""
    rows = {"validation": ("evaluate", 8), "test": ("evaluate", 16), "calibration": ("calibrate", 4)}
    values = {
        "report": {"baseline": baseline, "title": "Trial"},
        "verdict": {"perplexity_ratio": 2.5, "kl": 0.25, "accuracy_drop": 3.0},
        "variants": {name: {} for name in names},
        "texts": {name: {"use": use, "rows": count, "length": 32} for name, (use, count) in rows.items()},
    }
    # JSON is YAML
    (build.parent / "params.yaml").write_text(json.dumps(values) + "\n# <of the rows>\n", encoding="utf-8")
    return table.collect(build.parent)


def forget(build: Path, folder: str) -> None:
    """What the stages write where no variant asks for files, or for tasks."""
    for path in (build / folder).glob("*.json"):
        if folder == "tasks" or path.stem != "dense":
            Workspace(build.parent).save(path, {})


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return make(tmp_path / "build")


@pytest.fixture
def rendered(build: Path) -> str:
    return render(collect(build))


def said(html: str) -> str:
    """The page's words, with `code` marks, without its tables."""
    paragraphs = re.findall(r"<p[^>]*>(.*?)</p>", html, flags=re.DOTALL)
    return unescape(re.sub(r"</?code>", "`", " ".join(paragraphs)))


def drawn(html: str) -> dict[str, str]:
    """Figure -> its SVG."""
    return dict(re.findall(r'<figure id="figure-([^"]+)".*?(<svg.*?</svg>)', html, flags=re.DOTALL))


def tables(results: Results, section: str) -> list[list[Column]]:
    return [
        block.content
        for block in content.SECTIONS[section](results)
        if not isinstance(block, str) and block.kind == "table"
    ]


# The first screen


def test_the_first_screen_names_the_variant_to_take(build: Path) -> None:
    """Oracles: e^2.75 against e^2, the bytes of ``sizes``, and the gate's candidates."""
    results = collect(build)
    assert overview.headline(results) == (
        "Take `full`: its perplexity on `test` is 15.64, 2.1 times the dense model's 7.39, and its weights"
        " take 19.80 kB (`bitmask`) instead of 30.00 kB."
    )
    told = said(render(results))
    assert overview.headline(results) in told
    assert "Of the candidates `base` and `full`, it has the lowest perplexity on `validation`." in told
    assert "not a candidate" not in told and "Verdict: ACCEPT." in told
    alone = replace(results, choice={**results.choice, "perplexity": {"full": math.exp(2.125)}})
    assert "It is the only candidate." in said(render(alone))
    better = {"validation": math.exp(2.1), "test": math.exp(2.0)}
    change_artifact(build / "evaluate" / "plain.json", lambda found: found["perplexity"].update(better))
    assert "Lower, but not a candidate: `plain`." in overview.details(collect(build))


def test_without_candidates_the_lowest_perplexity_is_recommended(build: Path) -> None:
    change_artifact(
        build / "choice.json", lambda found: found.update(text="validation", chosen=None, perplexity={})
    )
    results = collect(build)
    assert overview.recommended(results) is results.pruned[2]
    assert "No variant is a candidate" in overview.details(results)
    assert overview.recommended(collect(build, ("base", "plain"))).name == "base"  # type: ignore[union-attr]
    assert overview.recommended(collect(build, ())) is None


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (2.02, "2.0% above the dense model's"),
        (1.98, "2.0% below"),
        (2.0, "the same as the dense model's 7.39"),
    ],
)
def test_the_quality_in_words(build: Path, own: float, expected: str) -> None:
    change_artifact(
        build / "evaluate" / "full.json", lambda found: found["perplexity"].update(test=math.exp(own))
    )
    assert expected in overview.headline(collect(build))


def test_sizes_of_the_first_screen(build: Path) -> None:
    """``plain`` is not exported: of 12,000 weights of 16 bits, half remain, beside a bit each. A file
    that was written in that format is taken as it is. Oracle: by hand.
    """
    results = collect(build)
    dense, plain, base, full = (overview.size(results, variant) for variant in results.variants)
    assert dense == overview.Size(30000, "dense", True)
    assert plain == base == overview.Size(30000 - 12000 * 7 // 8, "bitmask", False)
    assert full == overview.Size(19800, "bitmask", True)
    columns = {column.head: column.cells for column in overview.columns(results)}
    assert columns["size"] == ("30.00 kB", "≈ 19.50 kB", "≈ 19.50 kB", "19.80 kB")
    assert columns["vs dense"] == ("–", "+171.8%", "+171.8%", "+111.7%")
    assert columns["gap closed"] == ("–", "0.0%", "baseline", "25.0%")
    assert "seconds" not in columns


# The table


def test_gap_closed_by_hand(build: Path) -> None:
    """(3 − 2.75) / (3 − 2) and (2.5 − 2.125) / (2.5 − 2)."""
    results = collect(build)
    plain, base, full = results.pruned
    assert table.gap_closed(results, full, "test") == pytest.approx(0.25)
    assert table.gap_closed(results, full, "validation") == pytest.approx(0.75)
    assert table.gap_closed(results, plain, "test") == pytest.approx(0)
    assert table.gap_closed(results, base, "test") is None
    assert table.gap_closed(results, results.dense, "test") is None


def test_no_gap_without_a_baseline(build: Path) -> None:
    results = collect(build, baseline="gone")
    assert all(table.gap_closed(results, variant, "test") is None for variant in results.variants)
    assert "gap closed" not in {column.head for column in table.comparison(results)}
    assert "<code>report.baseline</code> = <code>gone</code> is not a variant" in render(results)


def test_no_gap_where_the_baseline_is_no_worse(build: Path) -> None:
    """Equal perplexities would divide by zero; a baseline better than the dense model would turn the sign."""
    for text, value in (("test", 2.0), ("validation", 1.9)):
        worse = {text: math.exp(value)}
        change_artifact(
            build / "evaluate" / "base.json", lambda found, worse=worse: found["perplexity"].update(worse)
        )
    results = collect(build)
    assert table.gap_closed(results, results.pruned[2], "test") is None
    assert table.gap_closed(results, results.pruned[2], "validation") is None
    assert "the baseline is at least as good as the dense model" in render(results)


def test_costs_are_of_what_a_variant_needs(build: Path) -> None:
    """full: calibrate 5 + scale 1 + sensitivity 60 + allocate 1 + induce 40 + prune 30; its largest
    memory is that of sensitivity.
    """
    results, measured = collect(build), costs.collect(build / "costs")
    assert table.stages(results.pruned[2]) == [
        "calibrate",
        "scale",
        "sensitivity",
        "allocate-full",
        "induce-full",
        "prune-full",
    ]
    seconds, peak = costs.by_variant(results, measured)
    assert (seconds.head, peak.head) == ("seconds", "peak GB")
    assert seconds.cells == ("–", "11.0", "21.0", "137")
    assert (peak.cells[1], peak.cells[3]) == ("4.00", "10.00")
    assert seconds.best == {1}


def test_a_gpus_memory_is_shown_where_one_was_used(build: Path) -> None:
    """Of ``full``: sensitivity took 5 GB of a GPU, prune 4; the stages of the others ran on a CPU,
    and older records name no GPU at all.
    """
    for name, count in (("sensitivity", 5e9), ("prune-full", 4e9), ("prune-base", None)):
        path = build / "costs" / f"{name}.json"
        path.write_text(
            json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"peak_gpu_bytes": count}),
            encoding="utf-8",
        )
    results, measured = collect(build), costs.collect(build / "costs")
    _, peak, gpu = costs.by_variant(results, measured)
    assert (gpu.head, gpu.cells) == ("peak GPU GB", ("–", "–", "–", "5.00"))
    assert peak.cells[3] == "10.00"
    assert "memory of tensors on the GPU" in render_costs(results, measured)


def test_costs_of_another_run_are_not_shown(build: Path) -> None:
    """A record belongs to the output that its run wrote. Oracles: a changed output, a missing
    record, a missing output.
    """
    record = build / "costs" / "induce-full.json"
    told = json.loads(record.read_text(encoding="utf-8"))
    for output in ({"path": str(build / "gone"), "sha256": ""}, {**told["output"], "sha256": "0" * 64}, None):
        record.write_text(json.dumps({**told, "output": output})) if output else record.unlink()
        seconds, _ = costs.by_variant(collect(build), costs.collect(build / "costs"))
        assert seconds.cells == ("–", "11.0", "21.0", "–")


def test_the_script_completes_the_page(build: Path) -> None:
    """Oracles: the page's section and the script's text, which hold the same anchor; the page
    itself holds no cost.
    """
    results = collect(build)
    page, script = render(results), render_costs(results, costs.collect(build / "costs"))
    assert (
        '<section id="costs">' in page
        and '<script src="costs.js"></script>' in page
        and "137" not in page.split('id="costs"')[1].split("</section>")[0]
    )
    written = re.findall(r"document\.getElementById\('(\w+)'\)\.innerHTML = (.*);\n", script)
    shown = {name: json.loads(html) for name, html in written}
    assert "<h2>Costs</h2>" in shown["costs"] and ">137<" in shown["costs"] and ">full<" in shown["costs"]
    assert ">137<" in shown["overview"] and ">10.00<" in shown["overview"]
    assert shown["spent"] == "Pruning took 137 seconds and 10.00 GB of memory on this machine."
    assert all(f'id="{name}"' in page for name in shown)


@pytest.mark.parametrize(
    ("method", "induced", "expected"),
    [
        ("uniform", False, ["allocate-full"]),
        ("depth", False, ["allocate-full"]),
        ("layer", False, ["sensitivity", "allocate-full"]),
        ("predicted", False, ["calibrate", "sensitivity", "curves-full", "allocate-full"]),
        ("owl", True, ["calibrate", "scale", "curves-full", "allocate-full", "induce-full"]),
    ],
)
def test_stages_that_a_recipe_needs(build: Path, method: str, induced: bool, expected: list[str]) -> None:
    """Oracle: what each allocation reads, and where learned factors come from, in the graph's order."""
    change_artifact(
        build / "facts" / "full.json", lambda found: found["settings"]["allocation"].update(method=method)
    )
    if not induced:
        change_artifact(build / "facts" / "full.json", lambda found: found["settings"].update(induce=None))
    assert table.stages(collect(build).pruned[2]) == [*expected, "prune-full"]


TRAINED = {
    "settings": {"epochs": 4},
    "rows": 6,
    "steps": 24,
    "held_out_before": 0.5,
    "held_out_after": 0.25,
    "curve": [0.6],
    "zeros": 2000,
}


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_trained_is_told_from_what_is_one_shot(build: Path, kept: bool) -> None:
    """In the table of recipes and in a section of its own; its stage counts. Zeros are those of the
    checkpoint that is measured.
    """
    result = {} if kept else {"held_out_after": None, "zeros": None}
    change_artifact(
        build / "training" / "full.json", lambda found: found.update(TRAINED | result | {"kept": kept})
    )
    results = collect(build)
    full = results.pruned[2]
    assert table.stages(full)[-2:] == ["prune-full", "distil-full"]
    assert full.zeros == (2000 if kept else full.facts["zeros"]) / full.facts["prunable"]
    page = " ".join(render(results).split())
    assert page.count("none: one-shot") == 2
    assert ("24 steps of distillation<" in page) == kept and (
        "24 steps of distillation, not kept" in page
    ) != kept
    assert ("The result was kept." in page) == kept and ("training diverged" in page) != kept
    assert "Settings of the distillation of full" in page


def test_a_task_of_several_presets_is_told_apart(build: Path) -> None:
    """A column per preset and task where a model was measured on more than one preset. Oracle: the names."""
    for name in LOG_PERPLEXITY:
        change_artifact(build / "tasks" / f"{name}.json", lambda found: found.update(few=found["zero"]))
    expected = [f"{preset} {task}" for preset in ("few", "zero") for task in ("free", "next_line", "wiki")]
    assert list(collect(build).tasks) == expected
    shown = [column.head for column in table.comparison(collect(build)) if column.group == "accuracy, %"]
    assert shown == [name for name in expected if "wiki" not in name]


def test_the_best_pruned_cell_is_marked(build: Path) -> None:
    """Never the dense row, which is better; ties are marked together; equal columns not at all."""
    marks = {(column.group, column.head): column.best for column in table.comparison(collect(build))}
    assert marks["perplexity, test", "ppl"] == {3}
    assert marks["perplexity, test", "gap closed"] == {3}
    assert marks["accuracy, %", "next_line"] == {3}
    assert marks["accuracy, %", "free"] == frozenset()
    assert marks["accuracy normalised by length, %", "next_line"] == {1, 2}  # of ``full`` it is lower
    assert marks["perplexity per word", "wiki"] == {1, 2}
    assert marks["", "pruned"] == marks["", "zeros"] == frozenset()
    one = {column.head: column.best for column in table.comparison(collect(build, ("full",)))}
    assert not any(one.values())


def test_figures_of_tasks_with_and_without_an_error(build: Path) -> None:
    """Shares in percent, others as they are; a filter stands behind its task. Accuracy first."""
    columns = [
        column
        for column in table.comparison(collect(build))
        if column.head in ("next_line", "free") or "wiki" in column.head
    ]
    assert [(column.group, column.head, column.cells[3]) for column in columns] == [
        ("accuracy, %", "free", "50.0 ± 2.0"),
        ("accuracy, %", "next_line", "70.0 ± 1.2"),
        ("exact match, %", "wiki strict", "25.0 ± 5.0"),
        ("accuracy normalised by length, %", "next_line", "60.0 ± 1.0"),
        ("perplexity per word", "wiki", "21.00"),
    ]


def test_the_plain_table_is_aligned(build: Path) -> None:
    """Numbers end where their heads end, and the name of a group is above its columns."""
    results = collect(build)
    columns = [*table.comparison(results), *costs.by_variant(results, costs.collect(build / "costs"))]
    above, heads, *lines = table.plain(columns).splitlines()
    assert len({len(line) for line in (heads, *lines)}) == 1
    assert heads.split("  ")[0] == "variant"
    assert lines[3].startswith("full ")
    end = heads.index("gap closed", heads.index("gap closed") + 1) + len("gap closed")
    assert lines[3][:end].endswith(" 25.0%")
    start = heads.index("ppl", heads.index("ppl") + 1)
    assert above[start - 2 : end].strip() == "test"
    assert above.endswith("  peak") and heads.endswith("    GB")


def test_the_plain_table_of_the_readme_has_eighty_columns() -> None:
    """Oracle: counted by hand."""
    cells = (*("50.00%",) * 2, *("15.02", "-190.9%") * 2, "238", "0.81")
    groups = ["", "", *["perplexity, validation"] * 2, *["perplexity, test"] * 2, "cost", "cost"]
    heads = ["pruned", "zeros", *["ppl", "gap closed"] * 2, "seconds", "peak GB"]
    named = [Column(*column[:2], (column[2],)) for column in zip(groups, heads, cells, strict=True)]
    lines = table.plain([table.words("variant", ["distilled"]), *named]).splitlines()
    assert [len(line) for line in lines] == [9 + 8 + 8 + 7 + 12 + 7 + 12 + 9 + 6] * 3


def test_pruned_and_zero_are_told_apart(build: Path) -> None:
    """Half of 12,000 weights are pruned; of those kept in full another 100 are zero. Of the dense
    model's nothing was counted.
    """
    columns = {column.head: column.cells for column in table.comparison(collect(build))}
    assert columns["pruned"] == ("0.00%", "50.00%", "50.00%", "50.00%")
    assert columns["zeros"] == ("–", "50.00%", "50.00%", "50.83%")


def test_what_the_table_leaves_out_is_told(build: Path) -> None:
    """On the page and below the table: cut items, moments beyond their budget, and why there is no gap."""
    cut = (
        "3 of the 50 items of `free` are longer than the model's context window; their beginning was cut off."
    )
    moments = (
        "The full output moments exceed `sensitivity.moment_budget_bytes`, so allocations use their"
        " diagonals."
    )
    assert table.notes(collect(build)) == [cut, moments]
    told = said(render(collect(build)))
    assert cut in told and moments in told
    assert (
        "`free`: all of 50 items, accuracy by chance unknown; `next_line`: 100 of 200 items, accuracy by"
        " chance 25%; `wiki`: all of 5 items" in told
    )
    assert "Not exported: `plain`." in told
    forget(build, "tasks")
    assert table.notes(collect(build, ("plain",), baseline="gone")) == [
        "There is no column `gap closed`: `report.baseline` = `gone` is not a variant."
    ]


def test_summary_is_pure_metrics(build: Path) -> None:
    """The exact schema, dense first and with sparsity 0.0, six digits."""
    summary = table.summary(collect(build))
    assert list(summary) == ["dense", "plain", "base", "full"]
    assert summary["dense"] == {
        "sparsity": 0.0,
        "perplexity": {"test": 7.389056, "validation": 7.389056},
        "bytes": 30000,
        "accuracy": {"next_line": 0.6, "free": 0.5},
        "acc_norm": {"next_line": 0.7},
        "exact_match": {"wiki strict": 0.25},
        "word_perplexity": {"wiki": 20.0},
    }
    assert summary["full"]["sparsity"] == 0.5
    assert summary["full"]["zeros"] == round(0.5 + 100 / 12000, 6)
    assert summary["full"]["bytes"] == 19800
    assert summary["full"]["gap"]["test"] == 0.25
    assert "gap" not in summary["base"] and "bytes" not in summary["plain"]
    assert summary["full"]["kl"] == {"test": 0.0625, "validation": 0.0625}
    assert summary["base"]["agreement"] == {"test": 0.625, "validation": 0.625}
    assert "reverse_kl" not in summary["full"]


def test_divergence_beside_perplexity(build: Path) -> None:
    """A table of the pruned variants, the best marked. Oracle: ``DIVERGENCE``; the reverse where it
    was measured of all.
    """
    name, *columns = table.divergence(collect(build))
    assert name.cells == ("plain", "base", "full")
    assert [(column.group, column.head) for column in columns] == [
        (text, head) for text in ("validation", "test") for head in ("KL", "KL, 99%", "same token")
    ]
    found = {column.head: column for column in columns}
    assert (found["KL"].cells, found["KL"].best) == (("0.5000", "0.1250", "0.0625"), {2})
    assert (found["KL, 99%"].cells, found["KL, 99%"].best) == (("2.0000", "1.0000", "1.2500"), {1})
    assert (found["same token"].cells, found["same token"].best) == (("50.0%", "62.5%", "75.0%"), {2})
    assert "KL(dense ‖ pruned) in nats per predicted token" in said(render(collect(build)))
    for variant in DIVERGENCE:
        change_artifact(
            build / "evaluate" / f"{variant}.json",
            lambda found: [one.update(reverse_kl=0.25) for one in found["divergence"].values()] and None,
        )
    assert {column.cells for column in table.divergence(collect(build)) if column.head == "reverse KL"} == {
        ("0.2500",) * 3
    }
    assert table.summary(collect(build))["plain"]["reverse_kl"]["test"] == 0.25


def test_the_verdict_on_each_variant(build: Path) -> None:
    """e^1 and e^0.5 times the dense perplexity against 2.5, KL against a quarter. Oracle: by hand;
    without thresholds there is no table.
    """
    found = table.verdicts(collect(build))
    assert [verdict.word for verdict in found.values()] == ["REGRESSION", "REGRESSION", "ACCEPT"]
    assert (
        found["plain"].reasons
        == "perplexity ratio test 2.718 > 2.5, KL test 0.5 > 0.25, KL validation 0.5 > 0.25"
    )
    assert found["base"].reasons == "perplexity ratio test 2.718 > 2.5"
    assert (
        "perplexity ratio test 2.117 <= 2.5" in found["full"].reasons
        and "accuracy drop wiki 0 <= 3" in found["full"].reasons
    )
    assert [column.cells for column in tables(collect(build), "Comparison")[2]][:2] == [
        ("plain", "base", "full"),
        ("REGRESSION", "REGRESSION", "ACCEPT"),
    ]
    results = collect(build)
    silent = replace(results, verdict=VerdictParams(perplexity_ratio=None, kl=None, accuracy_drop=None))
    assert [verdict.word for verdict in table.verdicts(silent).values()] == ["not judged"] * 3
    assert "section `verdict`" in said(render(results)) and "section `verdict`" not in said(render(silent))


def test_the_points_for_dvc(build: Path) -> None:
    """Every model on every text, dense first: e^2 and the exponents of ``LOG_PERPLEXITY``; what was
    pruned of each.
    """
    points = table.points(collect(build))
    assert [(point["text"], point["variant"]) for point in points] == [
        (text, name) for text in ("validation", "test") for name in LOG_PERPLEXITY
    ]
    assert [math.log(point["perplexity"]) for point in points] == pytest.approx(
        [2, 2.5, 2.5, 2.125, 2, 3, 3, 2.75]
    )
    assert [point["sparsity"] for point in points] == [0, 0.5, 0.5, 0.5] * 2


def test_the_plot_names_fields_of_the_points(build: Path) -> None:
    """Oracle: DVC's own renderer, which refuses a template without data or with unknown axes."""
    plot = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["report"]["plots"][0]["report/perplexity.json"]
    points = [{"rev": "one", **point} for point in table.points(collect(build))]
    filled = VegaRenderer(
        points, "report/perplexity.json", template_dir=str(ROOT / ".dvc" / "plots"), **plot
    ).get_filled_template()
    assert filled["data"]["values"] == points and "<DVC_METRIC" not in json.dumps(filled)
    fields = set(re.findall(r'"field": "(\w+)"', json.dumps({**filled, "data": None})))
    assert fields == {"text", "variant", "sparsity", "perplexity", "rev"} == set(points[0])


def test_the_gate_is_told(build: Path) -> None:
    """e^2.125 against e^2.5."""
    assert (
        "`choose` selects `full`: its perplexity on `validation` is 8.37. The other candidates: `base` 12.18."
        in said(render(collect(build)))
    )
    change_artifact(build / "choice.json", lambda _: {"text": "validation", "chosen": None, "perplexity": {}})
    assert "The stage `choose` selects" not in said(render(collect(build)))


def test_recipes_are_in_words(build: Path) -> None:
    """Oracle: ``settings``, in the words of tests/test_card.py."""
    recipes = {column.head: column.cells for column in tables(collect(build), "Comparison")[3]}
    assert recipes["variant"] == ("plain", "base", "full")
    assert recipes["allocation"] == ("uniform", "uniform", "by weight, α = 0.15")
    assert recipes["reconstruction"] == ("none", "none", "obs + finetune_channels")
    assert recipes["quantisation"] == ("none", "none", "4 bits, groups of 64, zero points")


def test_only_the_named_variants_are_reported(build: Path) -> None:
    (build / "facts" / "stale.json").write_text("not even JSON", encoding="utf-8")
    assert [variant.name for variant in collect(build, ("full", "base")).variants] == [
        "dense",
        "full",
        "base",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "facts/full",
        "evaluate/dense",
        "completions/base",
        "sensitivity/estimate",
        "sensitivity/sensitivity",
        "tasks/dense",
        "prepare/model",
        "sizes/full",
    ],
)
def test_a_missing_file_is_told(build: Path, name: str) -> None:
    (build / f"{name}.json").unlink()
    with pytest.raises(SparselineError, match=f"{re.escape(name)}.json is missing; run `dvc repro`"):
        collect(build)


def test_a_damaged_file_is_told(build: Path) -> None:
    (build / "facts" / "full.json").write_text("{", encoding="utf-8")
    with pytest.raises(SparselineError, match=r"full\.json is damaged .* run `dvc repro`"):
        collect(build)


# Sizes


def test_the_size_table_by_hand(build: Path) -> None:
    """13,500 of 24,000 bytes, 19,800 of 30,000; the variant that is not exported has no row, and
    perplexities are the variants' own.
    """
    columns = {(column.group, column.head): column.cells for column in content.sizes(collect(build))}
    assert columns["", "variant"] == ("dense", "base", "full", "full")
    assert columns["", "format"] == ("dense", "dense", "dense", "bitmask")
    assert columns["pruned matrices", "of dense"] == ("1.000", "1.000", "1.000", "0.562")
    assert columns["all weights", "of dense"] == ("1.000", "1.000", "1.000", "0.660")
    assert columns["bits per weight", "stored"] == ("16.000", "16.000", "16.000", "9.000")
    assert columns["bits per weight", "theory"] == ("16.000", "9.000", "9.000", "9.000")
    assert columns["perplexity, test", "ppl"] == ("7.39", "20.09", "15.64", "15.64")


def test_sizes_are_on_the_page(build: Path) -> None:
    """Where something was exported; compressed-tensors is called what it is where it was written."""
    html = render(collect(build))
    assert ">bits per weight<" in html and "no smaller than the same" not in html
    compressed = {"matrix_bytes": 2062, "file_bytes": 4200, "bits": 4.125}
    change_artifact(
        build / "sizes" / "full.json",
        lambda found: found["formats"].update({"compressed-tensors": compressed}),
    )
    assert "no smaller than the same quantisation without pruning" in render(collect(build))
    change_artifact(
        build / "sizes" / "full.json", lambda found: found["formats"].update({"gguf": compressed})
    )
    assert "So does <code>gguf</code>" in render(collect(build))
    forget(build, "sizes")
    nothing = render(collect(build))
    assert "No variant is exported" in nothing and ">bits per weight<" not in nothing


# The page


class Page(HTMLParser):
    """What a browser would load, which ids there are, and the text of each completion."""

    VOID = frozenset(("meta", "link", "br", "img", "input", "hr"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.pre: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.pre[-1] += data


def test_the_page_is_self_contained(rendered: str) -> None:
    """All that it refers to is in it, but for the script that adds the costs; every element is
    closed, nothing else runs.
    """
    page = Page(rendered)
    assert not page.open
    inside = [address for address in page.addresses if address.startswith("#")]
    assert inside and page.addresses.count("costs.js") == 1 and len(inside) == len(page.addresses) - 1
    assert {address[1:] for address in inside} <= set(page.ids)
    assert page.tags.count("script") == 1
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in rendered
    assert not re.findall(r"url\((?!#)", rendered)
    assert len(page.tags) > 100


def test_completions_are_escaped(rendered: str) -> None:
    """The parser returns exactly this text, with its first line break, and creates no element from it."""
    page = Page(rendered)
    assert f"\n\nof {EVIL}" in page.pre  # the parser of a browser drops the first of the two
    assert [text[1:] for text in page.pre if "same then" in text] == [
        f"same then {name} {EVIL}" for name in LOG_PERPLEXITY
    ]
    assert "<b>" not in rendered
    assert "49" not in "".join(text for text in page.pre if "alert" in text)


def test_samples_split_where_they_leave_the_dense_model(build: Path) -> None:
    """The split never loses a character."""
    results = collect(build)
    samples = [
        block.content
        for block in content.SECTIONS["Sample completions"](results)
        if not isinstance(block, str)
    ]
    dense, plain, _, full = samples[0]["continuations"]
    assert dense == ("dense", "", f"same then dense {EVIL}")
    assert plain == ("plain", "same then ", f"plain {EVIL}")
    assert full[1] + full[2] == f"same then full {EVIL}"


def test_every_figure_is_there_and_is_xml(rendered: str) -> None:
    figures = drawn(rendered)
    assert list(figures) == ["tradeoff", "perplexity", "sparsity-full", "sensitivity", "layer-error"]
    for svg in figures.values():
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "currentColor" in svg
    assert rendered.count("<figure ") == len(figures)


def test_errors_that_were_not_measured_stay_empty(build: Path) -> None:
    """Magnitude runs no forward pass and Wanda factorises nothing: their matrices have neither
    error nor damping. Oracle: the figure's texts.
    """

    def unmeasured(found: Any) -> None:
        found["transform"] = found["transform"] or None
        for matrix in found["matrices"].values():
            del matrix["layer_error"], matrix["damping"]

    change_artifact(build / "facts" / "plain.json", unmeasured)
    html = render(collect(build))
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", drawn(html)["layer-error"])
    assert {"base", "full"} <= set(shown) and "plain" not in shown
    assert "Not measured: plain." in html
    for name in ("base", "full"):
        change_artifact(build / "facts" / f"{name}.json", unmeasured)
    assert "layer-error" not in drawn(render(collect(build)))


def test_without_induction_sensitivity_and_fit(build: Path) -> None:
    """Each section says in a sentence why it has no figure."""
    forget(build, "sizes")
    html = render(collect(build, ("plain", "base")))
    assert list(drawn(html)) == ["tradeoff", "perplexity", "layer-error"]
    for sentence in (
        "No variant is exported",
        "No variant learns factors",
        "No variant uses sensitivities",
        "No variant trains whole blocks",
        "Every matrix has the same sparsity, to one percentage point: `plain` and `base`.",
    ):
        assert sentence in said(html)


def test_the_dense_model_alone(build: Path) -> None:
    html = render(collect(build, ()))
    assert "no pruned variant" in html
    assert not drawn(html)


def test_without_tasks_and_completions(build: Path) -> None:
    for name in LOG_PERPLEXITY:
        change_artifact(build / "completions" / f"{name}.json", lambda _: {"completions": []})
    forget(build, "tasks")
    html = render(collect(build))
    for sentence in ("No tasks were run", "There are no completions"):
        assert sentence in html


def test_what_induction_did_by_hand(rendered: str) -> None:
    """Three blocks kept one each; judged (6 + 6 + 6)/3 → (5 + 5 + 6)/3, masks (3 + 3 + 0)/3; one of
    three fits was thrown away.
    """
    told = said(rendered)
    assert "`full`: of 3 blocks, the gate kept `learned` in 1, `start` in 1 and `none` in 1." in told
    assert "The mean error of a block's output falls from 6.00% to 5.33%." in told
    assert "changed 2.00% of the mask entries on average (0.00% to 3.00% per block)" in told
    assert "on the held-out split from 6.00% to 5.33%, on the training split from 5.00% to 4.33%." in told
    assert "kept in 2 of 3 blocks" in told


def test_induction_block_by_block(build: Path) -> None:
    """Oracle: ``induction``, cell by cell; marked is what was kept."""
    (found,) = tables(collect(build), "Induction")
    columns = {column.head: column for column in found}
    assert list(columns["none"].cells) == ["6.00%"] * 3
    assert list(columns["start"].cells) == ["8.00%", "5.00%", "8.00%"]
    assert list(columns["learned"].cells) == ["5.00%", "7.00%", "7.00%"]
    assert [columns[name].best for name in ("none", "start", "learned")] == [{2}, {1}, {0}]
    assert list(columns["mask changed"].cells) == ["3.00%", "3.00%", "0.00%"]
    assert list(columns["layer error"].cells) == ["4.00% → 3.00%", "4.00% → 5.00%", "4.00% → 4.00%"]


def test_fits_block_by_block(build: Path) -> None:
    """Oracle: ``facts``, cell by cell; marked is where the fit was kept."""
    (found,) = tables(collect(build), "Reconstruction")
    columns = {column.head: column for column in found}
    assert list(columns["held-out split"].cells) == ["6.00% → 5.00%", "6.00% → 5.00%", "6.00% → 6.00%"]
    assert list(columns["training split"].cells) == ["5.00% → 4.00%", "5.00% → 4.00%", "5.00% → 5.00%"]
    assert list(columns["epochs"].cells) == ["3", "3", "0"]
    assert columns["held-out split"].best == {0, 1}


def test_shares_of_every_matrix(build: Path) -> None:
    """Oracle: the kept counts of ``facts``: 60, 50 and 45% of full's are pruned, half of every other."""
    matrices, *shares = tables(collect(build), "Share pruned per matrix")[0]
    by_matrix = dict(zip(matrices.cells, zip(*(column.cells for column in shares), strict=True), strict=True))
    assert [column.head for column in shares] == ["plain", "base", "full"]
    assert by_matrix["layers.0.q"] == ("50.00%", "50.00%", "60.00%")
    assert by_matrix["layers.2.down"] == ("50.00%", "50.00%", "45.00%")
    assert "`full` prunes from 45.00% (`layers.0.down`) to 60.00% (`layers.0.q`)." in said(
        render(collect(build))
    )


def test_a_deep_model(tmp_path: Path) -> None:
    """The map has no numbers in its cells, few ticks, and a colour bar."""
    html = render(collect(make(tmp_path / "build", depth=40)))
    assert "<summary>All 40 blocks of full</summary>" in html
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", drawn(html)["sparsity-full"])
    assert len(shown) < 40


def test_provenance_is_complete(build: Path, rendered: str) -> None:
    """Oracles: the files' own hashes, params.yaml to the letter, versions and seeds."""
    code = "\n".join(Page(rendered).pre)
    for path in build.glob("texts/*/*.safetensors"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f'"rows_sha256": "{digest}"' in code
        assert f'"{path.stem}.txt": "{len(path.stem):064d}"' in code
    assert f'"config.json": "{"0" * 64}"' in code
    model, texts = tables(collect(build), "Provenance")
    assert ("versions", "torch 2.13") in zip(*(column.cells for column in model), strict=True)
    rows = list(zip(*(column.cells for column in texts), strict=True))
    assert ("calibration", "calibrate", "files", "document", "8", "32", "1", "1,234", "0") in rows
    assert ("test", "evaluate", "files", "document", "8", "32", "1", "1,234", "none: in order") in rows
    assert "# <of the rows>" in code and "# &lt;of the rows&gt;" in rendered


def test_a_damaged_text_is_told(build: Path) -> None:
    (build / "texts" / "evaluate" / "test.safetensors").write_bytes(b"")
    with pytest.raises(SparselineError, match=r"test\.safetensors is damaged .* run `dvc repro`"):
        collect(build)


# The stage


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_runs_give_the_same_bytes(build: Path) -> None:
    """In processes with different hash seeds; the paths are printed."""
    work = build.parent
    collect(build)  # writes params.yaml
    (work / "env.lock.json").write_bytes((ROOT / "env.lock.json").read_bytes())
    seen = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-m", "stages.report"],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seen.append(digests(work / "report"))
    assert seen[0] == seen[1]
    files, output = seen[0], run.stdout
    assert {"index.html", "table.txt", "summary.json", "perplexity.json"} == set(files)
    assert re.search(
        r"report: 3 pruned variants; read report/index\.html, or report/table\.txt; \d+(\.\d)? s\n$", output
    )
    written = (work / "report" / "table.txt").read_text(encoding="utf-8").splitlines()
    assert len(written) == 2 + 4 + 2  # lines of the head, models, notes on what is left out
    assert all(f"report: {note}" in output.splitlines() for note in written[6:])
    summary = json.loads((work / "report" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) == set(LOG_PERPLEXITY)


def test_the_library_starts_fast() -> None:
    """Neither torch nor transformers nor pyplot comes with it."""
    code = (
        "import sys, pipeline_lib.reporting.render; print([m for m in ('torch', 'transformers',"
        " 'matplotlib.pyplot') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
