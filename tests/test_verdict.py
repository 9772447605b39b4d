"""ACCEPT or REGRESSION. Oracles: arithmetic by hand, and the exit codes of the command on a workspace."""

import math
from pathlib import Path
from typing import Any

import pytest
from project import WANDA, change_artifact, change_params, invoke, make_workspace

from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.settings import VerdictParams
from pipeline_lib.evaluation.verdict import Measured, judge


def limits(ratio: float | None = None, kl: float | None = None, drop: float | None = None) -> VerdictParams:
    return VerdictParams(perplexity_ratio=ratio, kl=kl, accuracy_drop=drop)


def accuracy(value: float, stderr: float | None) -> dict[str, Any]:
    return {"metrics": {"acc_norm": {"value": 0.0, "stderr": 0.1}, "acc": {"value": value, "stderr": stderr}}}


def models(
    tasks: dict[str, Any] | None = None, dense: dict[str, Any] | None = None
) -> tuple[Measured, Measured]:
    divergence = {"test": {"kl": 0.25, "agreement": 0.5}, "wiki": {"kl": 0.5, "agreement": 0.5}}
    return Measured({"test": 12.0, "wiki": 22.0}, divergence, tasks or {}), Measured(
        {"test": 10.0, "wiki": 20.0}, {}, dense or {}
    )


@pytest.mark.parametrize(
    ("params", "broken"),
    [
        (limits(ratio=1.2), []),  # exactly that much is allowed
        (limits(ratio=1.15), ["perplexity ratio test 1.2 > 1.15"]),
        (limits(ratio=1.05), ["perplexity ratio test 1.2 > 1.05", "perplexity ratio wiki 1.1 > 1.05"]),
        (limits(kl=0.5), []),
        (limits(ratio=1.2, kl=0.3), ["KL wiki 0.5 > 0.3"]),
    ],
)
def test_every_text_has_to_meet_the_thresholds(params: VerdictParams, broken: list[str]) -> None:
    found = judge(params, *models())
    assert [str(finding) for finding in found.findings if not finding.met] == broken
    assert found.word == ("REGRESSION" if broken else "ACCEPT")
    assert not broken or found.reasons == ", ".join(broken)


def test_without_thresholds_nothing_is_judged() -> None:
    assert judge(limits(), *models()).word == "not judged"
    assert judge(limits(drop=1.0), *models()).word == "not judged"  # no task was measured


def test_accuracy_falls_in_units_of_its_error() -> None:
    """A drop from 0.60 to 0.50 with errors of 0.03 and 0.04 is 0.1 / 0.05, two standard errors. A
    rise is no drop. A task that only one model has is ignored.
    """
    own, dense = models(
        {"a": accuracy(0.5, 0.03), "mine": accuracy(0.0, 0.01)},
        {"a": accuracy(0.6, 0.04), "theirs": accuracy(1.0, 0.01)},
    )
    (finding,) = judge(limits(drop=3.0), own, dense).findings
    assert (finding.where, finding.value) == ("a", pytest.approx(2.0))
    assert judge(limits(drop=2.1), own, dense).accepted and not judge(limits(drop=1.9), own, dense).accepted
    assert judge(limits(drop=0.0), *models({"a": accuracy(0.7, 0.03)}, {"a": accuracy(0.6, 0.04)})).accepted
    for error in (0.0, None):
        certain = judge(limits(drop=3.0), *models({"a": accuracy(0.5, error)}, {"a": accuracy(1.0, error)}))
        assert certain.findings[0].value == math.inf and not certain.accepted
    assert judge(limits(drop=0.0), *models({"a": accuracy(1.0, 0.0)}, {"a": accuracy(1.0, 0.0)})).accepted


def test_perplexities_of_tasks_are_no_accuracies() -> None:
    facts = {"metrics": {"word_perplexity": {"value": 20.0, "stderr": None}}}
    assert judge(limits(drop=1.0), *models({"wiki": facts}, {"wiki": facts})).word == "not judged"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the stages leave it. The dense model was measured on two presets, the variant on one."""
    monkeypatch.chdir(make_workspace(tmp_path / "project", variants={"wanda": WANDA}))
    made = Workspace()
    for name, perplexity, divergence in (
        ("dense", 10.0, {}),
        ("wanda", 11.0, {"test": {"kl": 0.3, "agreement": 0.5}}),
    ):
        made.save(made.evaluation(name), {"perplexity": {"test": perplexity}, "divergence": divergence})
    made.save(made.tasks("wanda"), {"embedded": {"corrupted": accuracy(0.5, 0.03)}})
    made.save(
        made.tasks("dense"),
        {"embedded": {"corrupted": accuracy(0.6, 0.04)}, "more": {"corrupted": accuracy(0.9, 0.01)}},
    )
    return Path()


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        (
            (1.2, None, 3.0),
            0,
            [
                "wanda: ACCEPT",
                "  perplexity ratio test 1.1 <= 1.2",
                "  accuracy drop embedded corrupted 2 <= 3",
            ],
        ),
        (
            (1.2, 0.25, None),
            1,
            ["wanda: REGRESSION", "  perplexity ratio test 1.1 <= 1.2", "  KL test 0.3 > 0.25"],
        ),
        ((None, None, 1.0), 1, ["wanda: REGRESSION", "  accuracy drop embedded corrupted 2 > 1"]),
        (
            (None, None, None),
            2,
            [
                "error: params.yaml: section verdict has no threshold for anything that was measured of"
                " wanda; set one."
            ],
        ),
        (
            (0, None, None),
            2,
            [
                "error: params.yaml: verdict.perplexity_ratio = 0 cannot be used: Input should be greater"
                " than 0."
            ],
        ),
    ],
)
def test_the_exit_code_is_the_verdict(values: tuple[float | None, ...], code: int, said: list[str]) -> None:
    change_params(
        Path(), "verdict", dict(zip(("perplexity_ratio", "kl", "accuracy_drop"), values, strict=True))
    )
    result = invoke("verdict", "wanda")
    assert (result.exit_code, result.output.splitlines()) == (code, said)


def test_the_verdict_follows_the_artifacts(workspace: Path) -> None:
    assert invoke("verdict", "wanda").exit_code == 0
    change_artifact(
        workspace / "build/evaluate/wanda.json", lambda found: found["perplexity"].update(test=13.0)
    )
    assert invoke("verdict", "wanda").exit_code == 1


def test_what_cannot_be_judged_is_told(workspace: Path) -> None:
    gone = invoke("verdict", "gone")
    assert gone.exit_code == 2 and "variants.gone" in gone.output
    (workspace / "build/evaluate/wanda.json").unlink()
    missing = invoke("verdict", "wanda")
    assert (
        missing.exit_code == 2 and "build/evaluate/wanda.json is missing; run `dvc repro`" in missing.output
    )
