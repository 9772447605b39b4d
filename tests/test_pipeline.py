"""The whole graph under DVC, on a tiny random model. Oracles: DVC's own account of what it ran, and
readers that share no code with ours.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from dvc.repo import Repo
from project import (
    REMOVED,
    WANDA,
    build,
    change_params,
    commit,
    invoke,
    make_project,
    make_workspace,
    read_params,
    results,
    run,
    text,
    tree,
    write_params,
)
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline_lib.core.params import merge
from pipeline_lib.core.workspace import Workspace

TEXTS = {"text@calibration", "text@validation", "text@test"}
GENERATED = {text.replace("text", "generate") for text in TEXTS}
PER_VARIANT = ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks", "export")


def of(*stages: str, variants: tuple[str, ...] = ("wanda", "sparseline")) -> set[str]:
    return {f"{stage}@{variant}" for stage in stages for variant in variants}


PRUNINGS = of("prune")
EVALUATIONS = {"evaluate-dense"} | of("evaluate")
SUMMARIES = {"choose", "report"}
SHARED = (
    TEXTS
    | GENERATED
    | {"prepare", "calibrate", "scale", "sensitivity", "evaluate-dense", "tasks-dense"}
    | SUMMARIES
)
ALL = SHARED | of(*PER_VARIANT)
OWN = of(
    "allocate", "induce", "prune", "distil", "evaluate", "tasks", "export", variants=("sparseline",)
)  # what follows from its allocation
PRUNING_CODE = of("curves", "induce", "prune")  # all three prune
LAYERS, WIDTH, INNER, HEADS = 2, 32, 48, 16  # HEADS: channels of all key heads
PRUNABLE = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * HEADS + 3 * WIDTH * INNER)


class Ran(NamedTuple):
    project: Path
    output: str  # of the first `dvc repro`


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A project after its first `dvc repro`. Read only."""
    project = make_project(tmp_path_factory.mktemp("pipeline") / "project")
    return Ran(project, run(project, "dvc", "repro"))


@pytest.fixture
def project(ran: Ran, tmp_path: Path) -> Path:
    """A copy to change; it shares the cache."""
    return Path(shutil.copytree(ran.project, tmp_path / "project"))


@pytest.fixture(scope="module")
def copy(ran: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For ``edited``."""
    return Path(shutil.copytree(ran.project, tmp_path_factory.mktemp("edited") / "project"))


@pytest.fixture
def edited(copy: Path) -> Iterator[Path]:
    """A copy whose inputs may be changed: git puts them back after each test. No stage runs in it,
    so that DVC hashes its outputs once.
    """
    yield copy
    run(copy, "git", "checkout", "--quiet", "--", ".")


KEYS = {"keys"}  # whatever changes params.yaml or the code runs it, and what it writes says what else runs


def executed(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output)) - KEYS


def restored(output: str) -> set[str]:
    return set(re.findall(r"Stage '([^']+)' is cached", output)) - KEYS


def status(project: Path) -> set[str]:
    """What `dvc status` calls changed, asked in this process."""
    with chdir(project), Repo() as repo:
        return set(repo.status())


def stale(project: Path) -> set[str]:
    """The same once the first stage has run."""
    with chdir(project):
        build("keys")
    return status(project) - KEYS


def rerun(project: Path, *stages: str) -> None:
    """Stages in this process, and what they wrote into dvc.lock and the cache, as `dvc repro` leaves them."""
    with chdir(project):
        for stage in stages:
            build(stage.replace("@", " "))
            with Repo() as repo:
                repo.commit(stage, force=True)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def checkpoint(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def masks(variant: Path) -> dict[str, np.ndarray]:
    """Read as docs/artifacts.md says: bits, row-major, first entry in the highest bit, 1 = kept;
    shapes in the header's facts.
    """
    found = {}
    for path in sorted((variant / "masks").glob("*.safetensors")):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        shapes = json.loads(header["__metadata__"]["sparseline"])["shapes"]
        for name, bits in load_file(path).items():
            found[name] = np.unpackbits(bits, count=math.prod(shapes[name])).reshape(shapes[name])
    return found


def prunable(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


# One run


def test_every_stage_runs_once(ran: Ran) -> None:
    """Oracle: the stages that dvc.yaml and the two variants should give."""
    assert executed(ran.output) == ALL
    assert ran.output.count("Running stage") == len(ALL | KEYS)


def test_the_documented_files_are_there(ran: Ran) -> None:
    """Oracle: the table in docs/artifacts.md. Nothing else lies below build/, no temporary file stays."""
    variants, blocks = ("wanda", "sparseline"), range(LAYERS)
    source = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    }
    shards = {f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors" for number in range(1, LAYERS + 2)}
    others = source - {"model.safetensors.index.json"}
    expected = {
        *(
            f"keys/{stage}.json"
            for stage in ("calibrate", "scale", "sensitivity", "evaluate", "choose", "tasks/dense")
        ),
        *(f"keys/{stage}/{variant}.json" for stage in {*PER_VARIANT} - {"evaluate"} for variant in variants),
        *(f"keys/code/{re.split('[@-]', stage)[0]}.json" for stage in ALL),
        *("prepare/model.json", "prepare/matrices.json"),
        *(f"generated/{name}.json" for name in ("calibration", "validation", "test")),
        *(
            "texts/calibrate/calibration.safetensors",
            "texts/evaluate/test.safetensors",
            "texts/evaluate/validation.safetensors",
        ),
        *(f"calibrate/block-{block:03d}.safetensors" for block in blocks),
        *("scale/transform.safetensors", "induce/sparseline/transform.safetensors"),
        *(f"induce/{variant}/curve.json" for variant in variants),
        *(f"sensitivity/{name}.json" for name in ("sensitivity", "estimate", "by_depth")),
        *(f"sensitivity/moments/block-{block:03d}.safetensors" for block in blocks),
        *(
            f"{kind}/{variant}.json"
            for kind in ("curves", "allocate", "facts", "training")
            for variant in variants
        ),
        *(f"prune/{variant}/checkpoint/{name}" for variant in variants for name in source | shards),
        *(f"distil/sparseline/checkpoint/{name}" for name in source | shards),
        *(f"prune/{variant}/masks/block-{block:03d}.safetensors" for variant in variants for block in blocks),
        *(f"export/sparseline/dense/{name}" for name in {*others, "model.safetensors", "README.md"}),
        *(
            f"export/sparseline/bitmask/{name}"
            for name in {*others, "model.bitmask.safetensors", "bitmask.json", "README.md"}
        ),
        *(
            f"{kind}/{model}.json"
            for kind in ("evaluate", "completions", "tasks", "sizes")
            for model in ("dense", *variants)
        ),
        *(f"costs/{re.sub('@', '-', stage)}.json" for stage in ALL - SUMMARIES - TEXTS),
        *(
            f"{place}/seal.json"
            for place in ("prepare", "calibrate", "scale", "sensitivity/moments", "export/wanda")
        ),
        *(f"{kind}/{variant}/seal.json" for kind in ("induce", "prune", "distil") for variant in variants),
        "choice.json",
    }
    assert set(tree(ran.project / "build")) == expected
    report = {path.split("/")[0] for path in tree(ran.project / "report")} - {".gitignore"}  # DVC's
    assert report == {"index.html", "table.txt", "perplexity.json", "summary.json"}


def test_the_summary_has_its_schema(ran: Ran) -> None:
    """Oracle: {variant: {sparsity, perplexity{text}, of the pruned zeros, kl{text} and
    agreement{text}, and where there are any gap{text}, bytes, accuracy{task}}}, and
    build/evaluate's figures.
    """
    summary = read(ran.project / "report" / "summary.json")
    assert set(summary) == {"dense", "wanda", "sparseline"}
    for name, variant in summary.items():
        assert set(variant) == {"sparsity", "perplexity"} | {
            "dense": {"bytes", "accuracy"},
            "sparseline": {"zeros", "kl", "agreement", "gap", "bytes", "accuracy"},
        }.get(name, {"zeros", "kl", "agreement"})
        assert variant["sparsity"] == (0 if name == "dense" else 0.5)
        assert set(variant["perplexity"]) == {"test", "validation"}
        if "accuracy" in variant:
            tasks = read(ran.project / "build" / "tasks" / f"{name}.json")["embedded"]
            told = {task: round(found["metrics"]["acc"]["value"], 6) for task, found in tasks.items()}
            assert variant["accuracy"] == told and set(told) == {"corrupted"}
        measured = read(ran.project / "build" / "evaluate" / f"{name}.json")
        assert all(
            math.isclose(value, measured["perplexity"][one], rel_tol=1e-6)
            for one, value in variant["perplexity"].items()
        )
        for figure in {"kl", "agreement"} & set(variant):
            assert variant[figure] == {
                text: round(found[figure], 6) for text, found in measured["divergence"].items()
            }
            assert set(variant[figure]) == {"test", "validation"} and all(
                value > 0 for value in variant[figure].values()
            )


def test_the_report_names_every_variant_and_text(ran: Ran) -> None:
    """Oracle: the names."""
    content = (ran.project / "report" / "index.html").read_text(encoding="utf-8")
    assert all(
        name in content for name in ("dense", "wanda", "sparseline", "test", "validation", "corrupted")
    )


def test_dvc_shows_the_metrics(ran: Ran) -> None:
    """`dvc metrics show` reads quality. Oracle: the files."""
    shown = json.loads(run(ran.project, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert shown["report/summary.json"]["data"] == read(ran.project / "report" / "summary.json")
    assert set(shown) == {"report/summary.json"}


def test_dvc_shows_the_plots(ran: Ran, tmp_path: Path) -> None:
    """`dvc plots show` draws perplexity and sensitivity. Oracle: the page's specifications."""
    output = run(ran.project, "dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    assert "failed" not in output
    page = (tmp_path / "plots" / "index.html").read_text(encoding="utf-8")
    titles = ("Perplexity over the share of pruned weights", "Sensitivity by depth")
    assert all(f'"text": "{title}"' in page for title in titles)
    assert page.count("vegaEmbed(") == len(titles)


@pytest.mark.parametrize("variant", ["wanda", "sparseline"])
def test_exactly_the_budget_is_kept(ran: Ran, variant: str) -> None:
    """Oracle: round((1 − p)·N) with N from the config's sizes; non-zeros and mask bits counted by a
    reader of our own.
    """
    out = ran.project / "build" / "prune" / variant
    weights = {name: tensor for name, tensor in checkpoint(out / "checkpoint").items() if prunable(name)}
    assert sum(tensor.size for tensor in weights.values()) == PRUNABLE
    kept = masks(out)
    assert set(kept) == set(weights)
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.5 * PRUNABLE)
    for name, tensor in weights.items():
        assert np.array_equal(tensor != 0, kept[name] == 1), name
    facts = read(ran.project / "build" / "facts" / f"{variant}.json")
    assert (facts["kept"], facts["prunable"], facts["sparsity"]) == (round(0.5 * PRUNABLE), PRUNABLE, 0.5)
    assert facts["zeros"] == PRUNABLE - facts["kept"]
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    assert {f"model.{name}.weight": matrix["kept"] for name, matrix in facts["matrices"].items()} == counts
    allocated = read(ran.project / "build" / "allocate" / f"{variant}.json")
    assert {f"model.{name}.weight": count for name, count in allocated["kept"].items()} == counts


def test_the_rest_of_the_model_is_untouched(ran: Ran) -> None:
    """Oracle: the source's tensors. Wanda changes no kept weight; no variant changes names, shapes,
    dtypes, embeddings or head.
    """
    source = checkpoint(ran.project / "data" / "model")
    wanda = checkpoint(ran.project / "build" / "prune" / "wanda" / "checkpoint")
    for name, tensor in wanda.items():
        assert np.array_equal(
            tensor, np.where(tensor == 0, 0, source[name]) if prunable(name) else source[name]
        ), name
    sparseline = checkpoint(ran.project / "build" / "prune" / "sparseline" / "checkpoint")
    for variant in (wanda, sparseline):
        assert {name: (t.shape, t.dtype) for name, t in variant.items()} == {
            name: (t.shape, t.dtype) for name, t in source.items()
        }
    outside = [name for name in source if ".layers." not in name]
    assert len(outside) == 3
    assert all(np.array_equal(sparseline[name], source[name]) for name in outside)


@pytest.mark.parametrize("variant", ["wanda", "sparseline"])
def test_checkpoints_are_for_transformers(ran: Ran, variant: str) -> None:
    """Oracle: transformers' own loss on the saved checkpoint gives the perplexity that evaluate
    wrote; source files byte for byte.
    """
    path = Workspace(ran.project).checkpoint(variant)
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = torch.from_numpy(
        load_file(ran.project / "build" / "texts" / "evaluate" / "test.safetensors")["rows"]
    )
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    measured = read(ran.project / "build" / "evaluate" / f"{variant}.json")["perplexity"]["test"]
    assert math.isclose(math.exp(sum(losses) / len(losses)), measured, rel_tol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(path)("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(ran.project / "data" / "model")("a b")["input_ids"]
    )
    source = ran.project / "data" / "model"
    for original in source.iterdir():
        if original.suffix != ".safetensors":
            assert (path / original.name).read_bytes() == original.read_bytes(), original.name


def test_what_is_exported_is_what_was_trained(ran: Ran) -> None:
    """Oracle: the trained checkpoint, with the zeros of the pruned one. Dense is one file, as the
    source is; the bitmask one unpacks to the same.
    """
    before, pruned = (
        checkpoint(ran.project / "build" / stage / "sparseline" / "checkpoint")
        for stage in ("prune", "distil")
    )
    assert all(
        np.array_equal(pruned[name] == 0, tensor == 0) for name, tensor in before.items() if prunable(name)
    )
    out = ran.project / "build" / "export" / "sparseline"
    dense = checkpoint(out / "dense")
    assert dense.keys() == pruned.keys()
    assert all(np.array_equal(dense[name], tensor) for name, tensor in pruned.items())
    assert invoke("unpack", str(out / "bitmask"), str(ran.project.parent / "unpacked")).exit_code == 0
    assert (ran.project.parent / "unpacked" / "model.safetensors").read_bytes() == (
        out / "dense" / "model.safetensors"
    ).read_bytes()
    sizes = read(ran.project / "build" / "sizes" / "sparseline.json")
    assert (sizes["weights"], sizes["zeros"]) == (PRUNABLE, PRUNABLE - round(0.5 * PRUNABLE))
    assert sizes["formats"]["bitmask"]["matrix_bytes"] == PRUNABLE // 8 + 4 * round(0.5 * PRUNABLE)  # float32


def test_cards_tell_what_was_measured(ran: Ran) -> None:
    """Oracles: build/evaluate, the source's bytes, the documented table."""
    build, name = ran.project / "build", "README.md"
    for path in (
        build / "export" / "sparseline" / "dense" / name,
        build / "export" / "sparseline" / "bitmask" / name,
    ):
        card = path.read_text(encoding="utf-8")
        values = [
            read(build / "evaluate" / f"{one}.json")["perplexity"]["test"] for one in ("dense", "sparseline")
        ]
        row = next(line for line in card.splitlines() if line.startswith("| test |")).split(" | ")
        assert [row[1], row[2].removesuffix(" |")] == [f"{value:.2f}" for value in values]
        for original in (ran.project / "data" / "model").glob("*.safetensors"):
            assert hashlib.sha256(original.read_bytes()).hexdigest() in card
        assert (
            hashlib.sha256(
                (build / "texts" / "calibrate" / "calibration.safetensors").read_bytes()
            ).hexdigest()
            in card
        )
        assert "samples 0, induction 0, finetune_channels 0" in card


# What reruns


def test_nothing_reruns(ran: Ran) -> None:
    """Oracle: DVC's words."""
    output = run(ran.project, "dvc", "repro")
    assert not executed(output) and not restored(output)
    assert "Data and pipelines are up to date." in output


def test_what_a_recipe_does_not_need_is_not_made(ran: Ran) -> None:
    """Wanda reads no curves, learns nothing, and asks for neither files nor tasks. Oracle: the
    empty artifacts of docs/artifacts.md.
    """
    build = ran.project / "build"
    assert read(build / "induce/wanda/curve.json") == []
    assert all(
        Workspace(ran.project).load(build / name) == {}
        for name in ("curves/wanda.json", "tasks/wanda.json", "sizes/wanda.json")
    )
    assert Workspace(ran.project).load(build / "export/wanda/seal.json") == {"files": {}}


def test_an_experiment_reruns_its_variant(project: Path) -> None:
    """Oracle: a variant's sparsity matters to its allocation, induction (mask in the loop),
    pruning, evaluation, and the report; not to its curves, which are measured at sparsities of
    their own.
    """
    commit(project)
    output = run(
        project, "dvc", "exp", "run", "-S", "+variants.sparseline.selection.sparsity=0.6", "prune@sparseline"
    )
    ran = of("allocate", "induce", "prune", variants=("sparseline",))
    assert executed(output) == ran
    assert not restored(output)
    # choose follows from the evaluation (tests/test_experiments.py)
    assert stale(project) == OWN - ran | {"report"}
    weights = checkpoint(project / "build" / "prune" / "sparseline" / "checkpoint")
    assert sum(np.count_nonzero(tensor) for name, tensor in weights.items() if prunable(name)) == round(
        0.4 * PRUNABLE
    )
    with chdir(project):
        build("report")
    assert read(project / "report" / "summary.json")["sparseline"]["sparsity"] == 0.6


def test_a_missing_key_is_told_before_anything_runs(project: Path) -> None:
    """Oracle: DVC's account of what it ran, and the stage's sentence (what else is refused:
    tests/test_bad_input.py).
    """
    change_params(project, "prune.reconstruction.steps", REMOVED)
    change_params(project, "variants.sparseline.reconstruction", {})
    output = run(project, "dvc", "repro", code=255)
    assert "params.yaml: variants.sparseline.reconstruction.steps is missing; add it." in output
    assert not executed(output) and not restored(output)


SPARSELINE = ("sparseline",)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("variants.sparseline.allocation.alpha", 0.05, of("allocate", "prune", variants=SPARSELINE)),
        # the other has its own
        ("prune.allocation.alpha", 0.05, of("allocate", "prune", variants=("wanda",))),
        ("prune.reconstruction.finetune_channels.epochs", 1, PRUNINGS),
        (
            "variants.sparseline.allocation",
            {"method": "predicted", "weighting": "trace"},
            # output moments are for `kronecker` alone
            {"sensitivity"} | of("allocate", "prune", variants=SPARSELINE),
        ),
        ("prune.allocation.weighting", "trace", {"sensitivity"} | of("allocate", "prune")),
        ("prune.selection.sparsity", 0.6, of("allocate", "prune")),  # induction follows from the allocation
        ("variants.sparseline.reconstruction.steps", ["obs"], of("prune", variants=SPARSELINE)),
        # no sweep
        (
            "variants.sparseline.reconstruction.steps",
            ["finetune_channels"],
            of("curves", "induce", "prune", variants=SPARSELINE),
        ),
        ("prune.reconstruction.steps", [], set()),  # both have their own
        ("prune.selection.damping", 0.02, of("curves", "induce", variants=SPARSELINE) | PRUNINGS),
        ("calibrate.batch_rows", 2, {"calibrate"} | of("curves", "induce")),
        ("scale.limit", 2.0, {"scale"}),
        ("curves.densities", [0.5], of("curves", variants=SPARSELINE)),
        ("induce.steps", 3, of("induce", "prune", variants=SPARSELINE)),
        ("sensitivity.probes", 3, {"sensitivity"}),
        (
            "model.compute_dtype",
            "bfloat16",
            {"prepare", "calibrate"} | GENERATED | PRUNING_CODE | of("distil"),
        ),
        ("model.exclude", ["*.q_proj"], {"prepare"}),
        ("texts.test.rows", 7, {"text@test", "generate@test"}),
        ("evaluate.completions.count", 0, EVALUATIONS),
        ("presets.embedded.limit", 3, {"tasks-dense", "tasks@sparseline"}),
        ("presets.induction.limit", 3, set()),  # nobody asks for it
        ("variants.wanda.tasks", ["embedded"], {"tasks@wanda"}),
        ("variants.sparseline.export", ["bitmask"], {"export@sparseline"}),
        ("prune.export", ["dense"], {"export@wanda"}),
        ("variants.wanda.candidate", False, {"choose"}),
        ("choose.text", "test", {"choose"}),
        ("report.title", "Another", set()),
    ],
)
def test_a_knob_concerns_its_stages(edited: Path, key: str, value: Any, expected: set[str]) -> None:
    """Oracle: what each knob means. These stages change at once; what depends on their outputs follows."""
    change_params(edited, key, value)
    assert stale(edited) == expected | {"report"}  # which prints all of them


def test_another_preset_concerns_who_asks_for_it(project: Path) -> None:
    """Oracles: DVC's words; the report's two sets of columns."""
    change_params(
        project,
        "presets.more",
        {"names": ["next_line"], "limit": 2, "shots": 0, "seed": 0, "chat_template": False, "system": None},
    )
    change_params(project, "variants.sparseline.tasks", ["embedded", "more"])
    assert stale(project) == {"tasks-dense", "tasks@sparseline", "report"}
    with chdir(project):
        build("tasks dense", "tasks sparseline", "report")
    assert set(read(project / "report" / "summary.json")["sparseline"]["accuracy"]) == {
        "embedded corrupted",
        "more next_line",
    }


def test_sensitivities_concern_the_variants_that_use_them(project: Path) -> None:
    """Oracle: what the two allocations read. That of wanda reads none, so that its stages end with
    the bytes that they had.
    """
    change_params(project, "sensitivity.probes", 3)
    with chdir(project):
        build("keys")
    rerun(project, "sensitivity")
    assert stale(project) == of("curves", "allocate") | {"report"}
    rerun(project, "curves@wanda", "allocate@wanda")
    assert stale(project) == of("curves", "allocate", variants=SPARSELINE) | {"report"}


def test_another_allocation_prunes_and_nothing_else(project: Path) -> None:
    """Neither calibration nor curves run again for another method or α (what follows from pruning:
    the experiment above).

    Oracles: DVC's words; the kept counts, which change. With `trace` nobody reads output moments;
    OWL reads curves alone, and then nobody reads sensitivities.
    """
    counts = []
    for allocation in (
        {"method": "predicted", "alpha": 1.0, "weighting": "trace"},
        {"method": "owl", "alpha": 0.2},
    ):
        change_params(project, "variants.sparseline.allocation", allocation)
        found = stale(project) - SUMMARIES
        assert (
            {"sensitivity"} | of("allocate", "prune", variants=SPARSELINE) <= found <= {"sensitivity"} | OWN
        )
        with chdir(project):
            build("allocate sparseline", "prune sparseline")
        facts = read(project / "build" / "facts" / "sparseline.json")
        assert facts["kept"] == round(0.5 * PRUNABLE)
        counts.append([matrix["kept"] for matrix in facts["matrices"].values()])
    assert counts[0] != counts[1]


def test_an_edited_text_concerns_those_who_read_it(project: Path) -> None:
    """Oracle: evaluation texts go to evaluation, the calibration text to everything before it."""
    (project / "data" / "texts" / "test.txt").write_text(text(seed=9), encoding="utf-8")
    assert stale(project) == {"text@test", "generate@test"}
    rerun(project, "text@test", "generate@test")
    assert stale(project) == EVALUATIONS | {"report"}


def test_an_edited_calibration_text_concerns_those_who_read_it(project: Path) -> None:
    (project / "data" / "texts" / "calibration.txt").write_text(text(seed=9), encoding="utf-8")
    assert stale(project) == {"text@calibration", "generate@calibration"}
    rerun(project, "text@calibration", "generate@calibration")
    assert stale(project) == {"calibrate", "sensitivity", "report"} | PRUNING_CODE | of("distil")


def test_edited_weights_concern_everything(project: Path) -> None:
    """Same path, same size, other bytes. Oracle: every stage that reads the model hangs on
    prepare's hashes.
    """
    path = project / "data" / "model" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    assert stale(project) == {"prepare"}
    rerun(project, "prepare")
    assert stale(project) == ALL - {"prepare", "choose"} - of("tasks")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pipeline_lib/solve/sweep.py", PRUNING_CODE),
        ("pipeline_lib/masks/select.py", PRUNING_CODE),
        # the fit of a block has induction's spectral term
        ("pipeline_lib/fit/fit.py", of("induce", "prune", "distil")),
        ("pipeline_lib/induce/induce.py", of("induce")),
        ("pipeline_lib/prune/run.py", PRUNINGS),
        ("pipeline_lib/allocate/methods.py", of("allocate")),
        ("pipeline_lib/measure/hutchinson.py", {"sensitivity"}),
        ("pipeline_lib/stats/moments.py", {"calibrate", "scale", "sensitivity"} | PRUNING_CODE),
        ("pipeline_lib/texts/rows.py", TEXTS | GENERATED),
        ("pipeline_lib/models/sample.py", GENERATED),
        ("pipeline_lib/evaluation/perplexity.py", EVALUATIONS),
        ("pipeline_lib/evaluation/divergence.py", EVALUATIONS),
        ("pipeline_lib/evaluation/tasks.py", {"tasks-dense"} | of("tasks")),
        ("pipeline_lib/models/architecture.py", ALL - SUMMARIES - of("allocate")),
        ("pipeline_lib/core/artifacts.py", ALL),
        ("pipeline_lib/reporting/report.html.jinja", {"report"}),
        ("pipeline_lib/export/card.py", of("export")),
        ("pipeline_lib/planning/estimate.py", set()),
    ],
)
def test_an_edited_module_concerns_its_stages(edited: Path, file: str, expected: set[str]) -> None:
    """Oracle: what each module is for, by hand."""
    with (edited / file).open("a", encoding="utf-8") as stream:
        stream.write("{#- a remark #}" if file.endswith(".jinja") else "# a remark\n")
    assert stale(edited) == expected


def test_byte_code_concerns_nothing(project: Path) -> None:
    """Stray caches of Python and tools are no inputs, wherever they are. Oracle: DVC's words."""
    for folder in ("pipeline_lib", "stages", "data/tasks", "data/model"):
        (project / folder / "__pycache__").mkdir()
        (project / folder / "__pycache__" / "module.cpython-311.pyc").write_bytes(b"x")
    assert status(project) == set()


# Variants come and go


def test_a_variant_is_one_entry(ran: Ran, project: Path) -> None:
    """An entry is changed, one is added, and taken away again. Oracles: DVC's account of what it
    ran, and the files of the first run.
    """
    change_params(project, "variants.sparseline.allocation.alpha", 0.05)
    output = run(project, "dvc", "repro")
    assert executed(output) == OWN | SUMMARIES
    assert not restored(output)
    change_params(project, "variants.sparseline.allocation.alpha", 0.15)
    change_params(
        project,
        "variants.magnitude",
        {"selection": {"score": "magnitude", "group": "matrix"}, "reconstruction": {"steps": []}},
    )
    output = run(project, "dvc", "repro")
    assert executed(output) == of(*PER_VARIANT, variants=("magnitude",)) | SUMMARIES
    assert restored(output) == OWN
    assert set(read(project / "report" / "summary.json")) == {"dense", "wanda", "sparseline", "magnitude"}
    change_params(project, "variants.magnitude", REMOVED)
    output = run(project, "dvc", "repro")
    assert executed(output) <= SUMMARIES and executed(output) | restored(output) == SUMMARIES
    assert results(project) == results(ran.project)
    assert not [path for path in (project / "build").rglob("*magnitude*") if "costs" not in path.parts]


# Determinism and sharing


def test_a_second_process_writes_the_same_bytes(ran: Ran, project: Path) -> None:
    """Oracle: the first run's files, written by another process in another directory, one stage
    after the other.
    """
    code = """
import shutil, sys
from importlib import import_module
from pathlib import Path

for step in sys.argv[1:]:
    stage, *variant = step.split()
    shutil.rmtree(Path("build") / stage)
    for facts in Path("build/facts").glob("*"):
        facts.unlink()
    import_module(f"stages.{stage}").main(variant, standalone_mode=False)
"""
    steps = ("sensitivity", *(f"{stage} sparseline" for stage in ("curves", "allocate", "induce", "prune")))
    run(project, "python", "-c", code, *steps)
    first, second = tree(ran.project / "build"), tree(project / "build")
    files = (f"{kind}/sparseline.json" for kind in ("curves", "allocate", "facts"))
    for place in ("sensitivity/", "induce/sparseline/", "prune/sparseline/", *files):
        written = [path for path in first if path.startswith(place)]
        assert written
        assert {path: second.get(path) for path in written} == {path: first[path] for path in written}


def test_a_clone_is_served_from_the_shared_cache(ran: Ran, tmp_path: Path) -> None:
    """A fresh clone without dvc.lock restores every stage, metrics outside the cache included.
    Oracles: DVC's words, the first run's files.
    """
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(ran.project), str(clone))
    assert not (clone / "dvc.lock").exists()
    assert not (clone / "build").exists()
    output = run(clone, "dvc", "repro")
    assert executed(output) == set()
    assert restored(output) == ALL
    assert results(clone) == results(ran.project)


def test_the_plan_writes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the project's files before and after."""
    before = tree(project)
    monkeypatch.chdir(project)
    build("plan")
    assert tree(project) == before


# Names


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"variants": {"wanda-0.6": WANDA}}, ("'wanda-0.6'", "letters, digits")),
        ({"variants": {"": WANDA}}, ("''", "letters, digits")),
        ({"variants": {"../up": WANDA}}, ("'../up'", "letters, digits")),
        ({"variants": {True: WANDA}}, ("True", "letters, digits")),
        ({"presets": {"a b": {"names": []}}}, ("the preset name 'a b'", "letters, digits")),
        (
            {"variants": {"wanda": {"tasks": ["none"]}}},
            ("variants.wanda.tasks names 'none', which is not a preset", "embedded"),
        ),
        ({"exported": {"wanda": {}}}, ("exported is no longer a key", "export: [dense, bitmask]")),
        ({"curved": []}, ("curved is no longer a key",)),
        ({"tasks": {"presets": ["embedded"]}}, ("tasks.presets is no longer a key", "tasks: [<preset>]")),
        ({"variants": {"dense": WANDA}}, ("'dense' is taken by the source model",)),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], told: tuple[str, ...]
) -> None:
    """In one sentence, by the first stage of the graph. Nothing is written."""
    make_workspace(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    write_params(Path(), merge(read_params(Path()), change))
    result = invoke("keys")
    assert result.exit_code == 2
    assert all(part in result.stderr for part in told), result.stderr
    assert not Path("build").exists()


def test_dvc_refuses_a_variant_of_the_name_of_the_source(project: Path) -> None:
    """Before it builds its graph, in which two stages would write one file. Oracle: DVC's exit code
    and words.
    """
    change_params(project, "variants.dense", WANDA)
    assert "data/errors/name-is-taken.yaml" in run(project, "dvc", "repro", code=255)


def test_spaces_in_the_path(ran: Ran, tmp_path: Path) -> None:
    """Nothing runs again in a copy whose path has spaces. Oracle: DVC's words."""
    moved = Path(shutil.copytree(ran.project, tmp_path / "my own project", symlinks=True))
    assert status(moved) == set()
    assert executed(run(moved, "dvc", "repro", "--force", "--single-item", "choose")) == {"choose"}
