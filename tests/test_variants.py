"""Plug and play: every shipped criterion takes induction before it and any reconstruction after it,
without a word in the code about which.

Oracles: the saved checkpoints, counted; the facts' own inequalities; and the same variant without either.
"""

from pathlib import Path
from typing import Any

import pytest
from project import ROOT, build, make_workspace, merge
from ruamel.yaml import YAML
from safetensors.torch import load_file

from pipeline_lib.core import artifacts
from pipeline_lib.models.transform import read_transforms

CRITERIA = ("magnitude", "wanda", "sparsegpt", "papers")
PATTERNS = {"unstructured": "unstructured", "2of4": "2:4"}
# What comes after the criterion's own steps: one fit, or two of a window that aim at the dense
# stream, with masks chosen anew.
AFTER: dict[str, Any] = {
    "unstructured": {"steps": ["finetune_channels"]},
    "2of4": {
        "steps": ["finetune_channels", "finetune"],
        "statistics": "per_site",
        "dense_target": 0.5,
        "finetune": {"window": 2, "refresh_epochs": 1, "rate": 0.005},
    },
}
NAMES = [f"{criterion}-{short}" for criterion in CRITERIA for short in PATTERNS]
LAYERS = 2


def variants() -> dict[str, Any]:
    """The shipped entries, each with its own induction, once per pattern with what comes after it."""
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    found = {}
    for name in NAMES:
        criterion, short = name.split("-")
        own = values["variants"][criterion]
        steps = merge(values["prune"]["reconstruction"], own.get("reconstruction", {}))["steps"]
        steps = [step for step in steps if step not in AFTER[short]["steps"]]
        # where no weight changes there is nothing to aim
        aims = {} if "obs" in steps else {"dense_target": 0.0}
        changes = {
            "induce": {},
            "selection": {"pattern": PATTERNS[short]},
            "reconstruction": {**AFTER[short], **aims, "steps": [*steps, *AFTER[short]["steps"]]},
        }
        found[name] = merge(own, changes)
    return found


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant induced and pruned; GPT-NeoX has biases, a fused projection and an uncoupled
    site. Read only.
    """
    directory = tmp_path_factory.mktemp("variants")
    made = make_workspace(
        directory / "project", model={"family": request.param, "layers": LAYERS}, variants=variants()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELINE_SCRATCH", str(directory / "scratch"))
        patch.chdir(made)
        build("prepare", "text calibration", "calibrate", "scale", "sensitivity")
        build(*(f"{stage} {name}" for name in NAMES for stage in ("allocate", "induce", "prune")))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_is_induced_and_fitted(workspace: Path, name: str) -> None:
    """The gate judged three candidates in every block and took the best, no fit made a block worse,
    and zeros are as many as asked for.
    """
    _, written = read_transforms(workspace / "build" / "induce" / name / "transform.safetensors", LAYERS)
    facts = artifacts.read_json(workspace / "build" / "facts" / f"{name}.json")
    assert facts["transform"] == written
    assert list(written["induction"]) == list(facts["blocks"]) == [str(block) for block in range(LAYERS)]
    for block in written["induction"].values():
        assert block["judged"].keys() == block["held_out"].keys() == {"none", "start", "learned"}
        assert block["judged"][block["choice"]] == min(block["judged"].values())
    for steps in facts["blocks"].values():
        assert steps.keys() == {*AFTER[name.split("-")[1]]["steps"]}
        for fitted in steps.values():
            assert fitted["held_out_after"] <= fitted["held_out_before"]
            assert (fitted["held_out_after"] < fitted["held_out_before"]) == (fitted["epochs"] > 0)
    prunable = zeros = step = 0  # step: weights of one N more or less, where each matrix has its own
    for path in sorted((workspace / "build" / "prune" / name / "checkpoint").glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            if ".layers." in key and tensor.ndim == 2:
                prunable, zeros = prunable + tensor.numel(), zeros + int((tensor == 0).sum())
                if name.endswith("2of4"):
                    step = max(step, tensor.numel() // 4)
                    assert (tensor.reshape(-1, 4) != 0).sum(1).unique().tolist() in ([1], [2], [3]), key
    assert zeros == facts["prunable"] - facts["kept"]
    assert prunable == facts["prunable"]
    assert abs(zeros - prunable // 2) <= (step // 2 if name == "papers-2of4" else 0)


def test_something_came_of_it(workspace: Path) -> None:
    """Not vacuous: some gate kept more than nothing, and some fit was kept."""
    facts = [artifacts.read_json(workspace / "build" / "facts" / f"{name}.json") for name in NAMES]
    assert any(block["choice"] != "none" for one in facts for block in one["transform"]["induction"].values())
    kept = [
        {step for block in one["blocks"].values() for step, fitted in block.items() if fitted["epochs"] > 0}
        for one in facts
    ]
    assert all(kept)
    assert set().union(*kept) == {"finetune_channels", "finetune"}
