"""Predict memory, disk and rough time for the configured model, before anything runs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pipeline_lib.core import params, runtime, settings
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.products import rounded
from pipeline_lib.core.workspace import DENSE
from pipeline_lib.evaluation.settings import EvaluateParams
from pipeline_lib.evaluation.tasks import Unread, request_lengths
from pipeline_lib.jobs import keys
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import fetch
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.planning import device, estimate
from pipeline_lib.planning.estimate import Estimate, Work, measure_speed
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.recipe import names
from pipeline_lib.recipe.variants import Variant, read_all
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.texts.texts import TextParams

START = 4  # seconds that a stage takes to start, whatever the model
LESS = {  # by a stage's first word: how it needs less GPU memory
    "prepare": "Run it with SPARSELINE_DEVICE=cpu, which changes no key",
    "calibrate": (
        "Lower calibrate.batch_rows, calibrate.median_tokens or SPARSELINE_GPU_ACTIVATION_BYTES, or set"
        " model.compute_dtype: bfloat16"
    ),
    "induce": (
        "Lower calibrate.batch_rows or SPARSELINE_GPU_ACTIVATION_BYTES, or set model.compute_dtype: bfloat16"
    ),
    "curves": "Lower calibrate.batch_rows or SPARSELINE_GPU_ACTIVATION_BYTES, or raise SPARSELINE_GRAM_BYTES",
    "sensitivity": (
        "Lower sensitivity.probes_per_pass or rows_per_probe, or set sensitivity.output_moments: diagonal"
    ),
    "prune": (
        "Lower prune.batch_rows or SPARSELINE_GPU_ACTIVATION_BYTES, or set model.compute_dtype: bfloat16 or"
        " reconstruction.statistics: per_site"
    ),
    "generate": "Lower the text's generated.batch_rows, or set model.compute_dtype: bfloat16",
    "distil": (
        "Lower distil.batch_rows or SPARSELINE_GPU_ACTIVATION_BYTES, or set distil.state_dtype: bfloat16"
    ),
    "evaluate": "Lower evaluate.batch_rows, or set evaluate.compute_dtype: bfloat16",
    "tasks": "Lower tasks.batch_rows, or set tasks.compute_dtype: bfloat16",
}


@dataclass(frozen=True)
class Machine:
    """The machine of the stages; None: from the settings, or measured here."""

    device: str | None = None
    gpu_memory: float | None = None  # bytes
    processes: int | None = None
    speed: float | None = None  # of a process's matrix products [FLOP/s]


@dataclass
class Planned:
    """Stages, the number of runs of each, and what could not be predicted."""

    base: "_Base"
    memory: float | None  # bytes of a process's GPU, if there is one
    steps: list[tuple[Estimate, int]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def foreseen(machine: Machine) -> Iterator[str]:
    """Lines of a table: one per stage, then the totals; with a GPU also the stages that do not fit,
    and remedies. Memory is that of one process.

    Raises:
        SparselineError: a parameter cannot be used, or the GPU's memory is unknown.
    """
    found = counted(machine)
    checkpoint, memory, processes = found.base.checkpoint, found.memory, found.base.processes
    speed = machine.speed or _measured()
    yield (
        f"{checkpoint.path}: {checkpoint.parameters:,} parameters, {checkpoint.architecture.depth} blocks;"
        f" {processes} process{'es' * (processes > 1)} with {speed / 1e9:.0f} GFLOP/s"
        f"{' each' * (processes > 1)}\n"
    )
    yield (
        f"{'stage':<20}{'runs':>5}{'memory':>12}{'' if memory is None else 'on the GPU':>12}"
        f"{'disk each':>12}{'time each':>18}"
    )
    least = most = disk = peak = whole = on_gpu = 0.0
    for step, runs in found.steps:
        early, late = START + step.least * step.seconds(speed), START + step.seconds(speed)
        taken = step.memory_bytes if memory is None or step.host_bytes is None else step.host_bytes
        least, most, disk, peak = (
            least + early * runs,
            most + late * runs,
            disk + step.disk_bytes * runs,
            max(peak, taken),
        )
        whole = max(whole, taken * step.processes)
        on_gpu = max(on_gpu, step.gpu_bytes)
        gpu = "" if memory is None else _size(step.gpu_bytes)
        yield (
            f"{step.stage:<20}{runs:>5}{_size(taken):>12}{gpu:>12}"
            f"{_size(step.disk_bytes):>12}{_span(early, late):>18}"
        )
    yield from found.unknown
    if memory is not None:
        yield from _too_large([step for step, _ in found.steps], memory)
    yield (
        f"\npeak memory {_size(peak)}{'' if memory is None else f', on the GPU {_size(on_gpu)}'}"
        f"{f' (per process; {_size(whole)} for all processes of one machine)' * (processes > 1)}, disk"
        f" {_size(disk)} (each output also in DVC's cache unless links are set), about"
        f" {_span(least, most)} in all{', without communication between processes' * (processes > 1)}"
    )
    yield (
        "not predicted: text, which holds the text and its tokens, and allocate, choose and report, which"
        " need very little"
    )


def counted(machine: Machine) -> Planned:
    """The needs of every stage.

    Raises:
        SparselineError: a parameter cannot be used, or nothing is known of the GPU.
    """
    name = machine.device or settings.device_name()
    if name == "auto":
        name = str(runtime.compute())
    memory = None if name == "cpu" else machine.gpu_memory or _memory_of(name)
    names.check()
    source = params.load(ModelParams, "model")
    checkpoint = open_checkpoint(fetch(source), None, source.remote_code, source.dequantize)
    texts = {name: params.load(TextParams, f"texts.{name}") for name in params.section("texts")}
    budget = math.inf if memory is None else device.streams_budget(memory)
    processes = machine.processes or settings.processes()
    base = _Base(checkpoint, getattr(torch, source.compute_dtype), budget, processes)
    return _planned(Planned(base, memory), texts, read_all())


def _measured() -> float:
    """Speed of matrix products on this machine [FLOP/s]."""
    here = runtime.compute()
    with rounded(here, params.load(ModelParams, "model").products):
        return measure_speed(here)


def _memory_of(name: str) -> float:
    """Bytes of this machine's GPU."""
    try:
        return float(torch.cuda.get_device_properties(name).total_memory)
    except (RuntimeError, AssertionError) as error:
        raise SparselineError(
            f"{name} is not a device of this machine; say what memory it has, for instance --gpu-memory 24e9."
        ) from error


def _too_large(steps: Sequence[Estimate], memory: float) -> Iterator[str]:
    """A sentence for each stage that does not fit into a GPU of ``memory`` bytes."""
    for step in steps:
        if step.gpu_bytes + device.CONTEXT > memory:
            yield (
                f"{step.stage} does not fit into the GPU's {_size(memory)}: {_size(step.gpu_bytes)} of its"
                f" own and about {_size(device.CONTEXT)} of CUDA's. {LESS[step.stage.split()[0]]}."
            )


@dataclass(frozen=True)
class _Base:
    """Parameters that all stages share."""

    checkpoint: Checkpoint
    dtype: torch.dtype  # of forward passes
    budget: float  # bytes of hidden states that stay on a GPU
    processes: int

    def shapes(self, text: TextParams, batch_rows: int, window: int = 1, training: int = 0) -> Shapes:
        """Shapes of the calibration rows, in batches, and of at most so many of those for training."""
        assert text.rows is not None  # validated
        sizes = (text.rows, text.length, batch_rows, window)
        more = min(text.training, training)
        return Shapes(self.checkpoint, *sizes, self.dtype, text.held_out, self.processes, more)


def _planned(found: Planned, texts: dict[str, TextParams], variants: dict[str, Variant]) -> Planned:
    base = found.base
    checkpoint, dtype, budget, processes = base.checkpoint, base.dtype, base.budget, base.processes
    (text,) = (text for text in texts.values() if text.use == "calibrate")
    calibrate = params.load(CalibrateParams, "calibrate")
    shapes = base.shapes(text, calibrate.batch_rows)
    asked = keys.sensitivity(variants)
    used = {"calibrate": keys.calibrate(variants), "scale": keys.scale(variants), "sensitivity": asked}
    work = Work(
        shapes,
        text.held_out,
        dtype,
        calibrate,
        asked or params.load(SensitivityParams, "sensitivity"),
        budget,
    )
    found.steps += [(step, 1) for name, step in estimate.estimate(work).items() if used.get(name, True)]
    for name, one in texts.items():
        if one.generated is not None:
            found.steps.append(
                (estimate.generating(checkpoint, f"generate {name}", dtype, one, one.generated), 1)
            )
    for name, variant in variants.items():
        if variant.curves is not None:
            found.steps.append((estimate.measuring(work, f"curves {name}", variant.curves.curves), 1))
        if variant.induce is not None:
            found.steps.append((estimate.inducing(work, f"induce {name}", variant.induce.induce), 1))
        steps = plan(variant.recipe, checkpoint.dtype)
        trains = variant.recipe.training if steps.judged else 0
        own = base.shapes(text, variant.recipe.batch_rows, steps.window, trains)
        found.steps.append((estimate.pruning(f"prune {name}", steps, own, budget), 1))
        if (learn := variant.trained) is not None:
            own = base.shapes(text, learn.batch_rows, training=text.training)
            rounded = variant.recipe.quantization.bits is not None
            found.steps.append((estimate.distilling(f"distil {name}", learn, own, budget, rounded), 1))
    evaluate = params.load(EvaluateParams, "evaluate")
    measured = [
        (one.rows or evaluate.batch_rows, one.length) for one in texts.values() if one.use == "evaluate"
    ]
    whole = [name for name, one in texts.items() if one.rows is None]
    found.unknown += [
        f"evaluate takes the text {name} whole: of its rows one batch is counted here." for name in whole
    ]
    runs = {False: 1} | ({True: len(variants)} if variants else {})
    found.steps += [
        (estimate.evaluating(checkpoint, evaluate, measured, compared, processes), count)
        for compared, count in runs.items()
    ]
    _add_tasks(found, variants)
    for name, variant in variants.items():
        if variant.export:
            step = estimate.exporting(
                checkpoint, f"export {name}", variant.export, variant.recipe.selection.overall
            )
            found.steps.append((step, 1))
    return found


def _add_tasks(found: Planned, variants: dict[str, Variant]) -> None:
    """A line per preset, which runs on the source model and on every variant that asks for it."""
    part, checkpoint = keys.tasks(DENSE, variants), found.base.checkpoint
    if part is None:
        return
    for name, preset in part.presets.items():
        runs = 1 + sum(name in variant.tasks for variant in variants.values())
        try:
            lengths = request_lengths(
                load_tokenizer(checkpoint.path, checkpoint.vocabulary, checkpoint.remote_code),
                part.tasks.path,
                preset,
            )
        except Unread as error:
            found.unknown.append(f"tasks {name} are not counted. {error}")
            continue
        needs = estimate.answering(checkpoint, f"tasks {name}", part.tasks, lengths, found.base.processes)
        found.steps.append((needs, runs))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _span(least: float, most: float) -> str:
    return " to ".join(dict.fromkeys((_duration(least), _duration(most))))
