"""Key files: the parameters and the code that each stage reads.

DVC runs a stage again only if its own file changes.
"""

from collections.abc import Mapping

from pydantic import BaseModel

from pipeline_lib.core import artifacts, code, environment, params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.settings import ChooseParams, EvaluatePart, Preset, TasksParams, VerdictParams
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.induce.settings import ScaleParams
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.recipe import names
from pipeline_lib.recipe.variants import Variant, read_all
from pipeline_lib.stats.settings import CalibrateParams

STAGES = (
    *(
        "prepare",
        "generate",
        "text",
        "calibrate",
        "scale",
        "sensitivity",
        "curves",
        "allocate",
        "induce",
        "prune",
        "distil",
    ),
    *("evaluate", "tasks", "export", "choose", "report"),
)


def write(workspace: Workspace) -> str:
    """Check all parameters, and write a file per stage, or per stage and variant. It holds null if
    the stage has nothing to do. Returns a summary.

    Raises:
        SparselineError: a name or a value cannot be used.
    """
    names.check()
    variants = read_all()
    found = parts(variants)
    versions = artifacts.read_json(environment.FILE)
    with artifacts.replacing(workspace.keys) as directory:
        for place, part in found.items():
            artifacts.write_json(
                directory / f"{place}.json", None if part is None else part.model_dump(mode="json")
            )
        for stage in STAGES:
            artifacts.write_json(
                directory / "code" / f"{stage}.json", {"sha256": code.digest(stage), "versions": versions}
            )
    _tidy(workspace, variants)
    return f"{len(variants)} variants: {', '.join(variants)}"


def parts(variants: Mapping[str, Variant]) -> dict[str, BaseModel | None]:
    """The parameters that each stage reads, by ``<stage>`` or ``<stage>/<variant>``.

    Raises:
        SparselineError: a value cannot be used.
    """
    baseline = params.section("report.baseline")
    if not isinstance(baseline, str) or baseline not in variants:
        raise SparselineError(
            f"{params.FILE}: report.baseline = {baseline!r} is not a variant; variants:"
            f" {', '.join(variants) or 'none'}."
        )
    found: dict[str, BaseModel | None] = {
        "calibrate": calibrate(variants),
        "scale": scale(variants),
        "sensitivity": sensitivity(variants),
        "evaluate": EvaluatePart.read(),
        f"tasks/{DENSE}": tasks(DENSE, variants),
        "choose": choose(variants),
    }
    for name, variant in variants.items():
        own: dict[str, BaseModel | None] = {
            "curves": variant.curves,
            "allocate": variant.allocate,
            "induce": variant.induce,
            "prune": variant.recipe,
            "distil": variant.distil,
            "tasks": tasks(name, variants),
            "export": export(variant),
        }
        found |= {f"{stage}/{name}": part for stage, part in own.items()}
    return found


def _tidy(workspace: Workspace, variants: Mapping[str, Variant]) -> None:
    """Remove the outputs of entries that are gone from params.yaml. Stages read whole directories,
    and DVC leaves these files there. The cache keeps them.
    """
    texts = {
        name: text.get("use") if isinstance(text, Mapping) else None
        for name, text in params.section("texts").items()
    }
    for left in workspace.texts("").glob("*/*.safetensors"):
        if texts.get(left.stem) != left.parent.name:
            artifacts.remove(left)
    for left in workspace.generated("").parent.glob("*.json"):
        if left.stem not in texts:
            artifacts.remove(left)
    for left in workspace.of_models():
        if left.name.removesuffix(".json") not in (*variants, DENSE):
            artifacts.remove(left)


class ChoosePart(params.Params):
    """The candidates of ``choose``, and the text."""

    text: str
    candidates: list[str]


def choose(variants: Mapping[str, Variant]) -> ChoosePart:
    """The parameters of ``choose``; the earlier candidate wins ties.

    Raises:
        SparselineError: the text is not evaluated.
    """
    text = params.load(ChooseParams, "choose").text
    names.check_evaluated("choose.text", text)
    return ChoosePart(text=text, candidates=[name for name, variant in variants.items() if variant.candidate])


class TasksPart(params.Params):
    """The parameters of `tasks` for one model."""

    tasks: TasksParams
    presets: dict[str, Preset]


def tasks(name: str, variants: Mapping[str, Variant]) -> TasksPart | None:
    """The tasks of a variant, or of the source model, which is measured on all presets of the
    variants; None without any preset.

    Raises:
        SparselineError: a variant names a preset that does not exist.
    """
    chosen = variants.values() if name == DENSE else [variants[name]]
    for variant in chosen:
        names.check_presets(variant.name, variant.tasks)
    presets = dict.fromkeys(preset for variant in chosen for preset in variant.tasks)
    if not presets:
        return None
    found = {preset: params.load(Preset, f"presets.{preset}") for preset in presets}
    return TasksPart(tasks=params.load(TasksParams, "tasks"), presets=found)


def export(variant: Variant) -> ExportParams | None:
    """The parameters of ``export``; None if no format is requested."""
    verdict = params.load(VerdictParams, "verdict")
    return ExportParams(formats=variant.export, verdict=verdict) if variant.export else None


def sensitivity(variants: Mapping[str, Variant]) -> SensitivityParams | None:
    """The parameters of ``sensitivity``; None if no allocation reads sensitivities. Without output
    moments if no allocation reads them.
    """
    found = params.load(SensitivityParams, "sensitivity")
    if not any(one.needs.output_moments for one in variants.values()):
        found = found.model_copy(update={"output_moments": "none"})
    return found if any(one.needs.sensitivities for one in variants.values()) else None


def calibrate(variants: Mapping[str, Variant]) -> CalibrateParams | None:
    """The parameters of ``calibrate``; None if neither curves nor induction read statistics of the
    dense model.
    """
    found = params.load(CalibrateParams, "calibrate")
    return found if any(one.needs.curves or one.needs.factors for one in variants.values()) else None


def scale(variants: Mapping[str, Variant]) -> ScaleParams | None:
    """The parameters of ``scale``; None if no factors are learned."""
    found = params.load(ScaleParams, "scale")
    return found if any(one.needs.factors for one in variants.values()) else None
