"""Predict memory, disk and rough time of every stage from the model's header alone, before anything
runs.

Memory is for a stage on the CPU; ``device`` predicts its parts on a GPU and on the host.

Symbols: n calibration tokens, P parameters of a block, B blocks, d channels of a site. Bytes;
floats take 4 bytes while computing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline_lib.core import settings
from pipeline_lib.core.products import affords
from pipeline_lib.evaluation.settings import EvaluateParams, TasksParams
from pipeline_lib.fit.distil import stream_bytes as learning_bytes
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.measure.fisher import at_once
from pipeline_lib.measure.settings import CurvesParams, SensitivityParams
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.stream import HEAD_TOKENS
from pipeline_lib.planning import device
from pipeline_lib.prune.plan import Plan
from pipeline_lib.prune.run import stream_bytes
from pipeline_lib.prune.shapes import Shapes, outside
from pipeline_lib.recipe.settings import InduceParams
from pipeline_lib.stats.lanes import LANES
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.texts.texts import GeneratedParams, TextParams

# resident size of Python with torch and transformers, measured
LIBRARIES = 730e6 if torch.version.cuda or torch.version.hip else 450e6
TASK_LIBRARIES = 150e6  # lm-eval and datasets, in addition
SLOWDOWN = 2.0  # wall time over pure matrix products: softmax, norms, sorting, small shapes


@dataclass(frozen=True)
class Work:
    """The parameters of the estimate, besides the variants' recipes."""

    shapes: Shapes  # of the calibration rows, in batches of ``calibrate.batch_rows``
    held_out: float  # share of the rows in the held-out split
    compute_dtype: torch.dtype  # of the block-wise stages' forward passes
    calibrate: CalibrateParams
    sensitivity: SensitivityParams
    budget: float = math.inf  # bytes of hidden states that stay on a GPU


@dataclass(frozen=True)
class Estimate:
    """The needs of one stage."""

    stage: str
    memory_bytes: float
    disk_bytes: float
    flops: float
    least: float = 1.0  # share of the FLOPs after which the stage may be done already
    gpu_bytes: float = 0.0  # on the GPU, if there is one
    host_bytes: float | None = None  # in host memory, if there is a GPU; None: as on a CPU
    processes: int = 1  # processes with as many bytes each; FLOPs are those of the busiest one

    def seconds(self, flops_per_second: float) -> float:
        return SLOWDOWN * self.flops / flops_per_second


def measure_speed(place: torch.device) -> float:
    """Matrix-product throughput [FLOP/s] of this machine in float32, from half a second of products."""
    a = torch.randn(1024, 1024, device=place)
    a @ a
    started, count = time.monotonic(), 0
    while time.monotonic() - started < 0.5:
        float((a @ a)[0, 0])
        count += 1
    return 2 * 1024**3 * count / (time.monotonic() - started)


def estimate(work: Work) -> dict[str, Estimate]:
    """The needs of the stages that all variants share.

    Formulas: an activation stream takes e·n·D, with e the bytes of ``compute_dtype``; a block in
    use takes 4·P. calibrate adds its Gram matrices 3·Σ4d² (of both splits and of a lane) and the
    samples for medians (the widest site's four times: joined, sorted, and with positions). The sum
    over a sample of the widest site takes 15 bytes per value (in float32, in float64, and its
    square): measured. Sensitivity: see ``_probing``.
    """
    shapes, depth = work.shapes, work.shapes.blocks
    base = LIBRARIES + outside(shapes.checkpoint)
    return {
        "prepare": Estimate(
            "prepare", LIBRARIES, 1e5, 0, gpu_bytes=max(outside(shapes.checkpoint), 12 * shapes.block)
        ),
        "calibrate": Estimate(
            "calibrate",
            base + 4 * shapes.block + _walk(work),
            _stored(work) + depth * 20 * sum(shapes.sites),
            depth * (shapes.forward + shapes.gram_flops),
            gpu_bytes=device.calibrating(shapes, work.calibrate, work.budget),
            host_bytes=base
            + shapes.stored * shapes.block
            + 2 * shapes.grams
            + _beyond(shapes.stream(work.compute_dtype), work.budget),
            processes=shapes.processes,
        ),
        "scale": Estimate(
            "scale", LIBRARIES + 4 * shapes.block + 2 * shapes.grams, depth * 4 * sum(shapes.sites), 0
        ),
        "sensitivity": _probing(work),
    }


def inducing(work: Work, name: str, params: InduceParams) -> Estimate:
    """The needs of one variant's `induce`: each block is pruned up to three times for its gate; the
    held-out samples before and after the block are in memory.
    """
    shapes, depth = work.shapes, work.shapes.blocks
    again, repeated = _walked_again(work)
    judged = 2 * shapes.stream(work.compute_dtype) * (work.held_out or 1)
    memory = LIBRARIES + outside(shapes.checkpoint) + judged + again + 20 * shapes.block + 4 * shapes.grams
    flops = (
        shapes.forward + repeated + 6 * shapes.sweep * params.steps + 3 * (shapes.factor_flops + shapes.sweep)
    )
    return Estimate(
        name,
        memory + shapes.inner(shapes.batch_rows),
        depth * 8 * sum(shapes.sites),
        depth * flops,
        gpu_bytes=device.inducing(shapes, _walked_on_gpu(work), work.budget),
        host_bytes=memory - judged - again + _beyond(judged, work.budget),
        processes=shapes.processes,
    )


def measuring(work: Work, name: str, params: CurvesParams) -> Estimate:
    """The needs of one variant's `curves`: each matrix of a block is pruned at every density, with two
    products for its errors.
    """
    shapes, depth = work.shapes, work.shapes.blocks
    again, repeated = _walked_again(work)
    memory = (
        LIBRARIES
        + again
        + 24 * shapes.block
        + 2 * shapes.grams
        + 16 * max(shapes.sites) ** 2
        + _moments(work) / depth
    )
    flops = repeated + shapes.factor_flops + len(params.densities) * 4 * shapes.sweep
    return Estimate(
        name,
        memory,
        1e4 * depth,
        depth * flops,
        gpu_bytes=_walked_on_gpu(work),
        host_bytes=memory - again,
        processes=shapes.processes,
    )


def _beyond(streams: float, budget: float) -> float:
    """Bytes of streams in host memory, where a GPU keeps some."""
    return max(0.0, streams - budget)


def _walk(work: Work) -> float:
    """Bytes that a walk over the dense blocks holds beside the block."""
    shapes, widest = work.shapes, max(work.shapes.sites)
    median = work.calibrate.median_tokens
    sampled = (
        4 * min(shapes.tokens, 2 * median) * sum(shapes.sites) + 16 * min(shapes.tokens, median) * widest
    )
    summed = shapes.inner(shapes.batch_rows) + 15 * shapes.length * widest
    return shapes.stream(work.compute_dtype) + 3 * shapes.grams + max(summed, sampled)


def _stored(work: Work) -> float:
    """Bytes of the Gram matrices on disk; 0 if they exceed their budget."""
    size = 2 * work.shapes.grams * work.shapes.blocks
    return size if size <= settings.gram_bytes() else 0


def _walked_again(work: Work) -> tuple[float, float]:
    """Bytes and FLOPs per block to collect the Gram matrices again; 0 if they are stored."""
    return (0, 0) if _stored(work) else (_walk(work), work.shapes.forward + work.shapes.gram_flops)


def _walked_on_gpu(work: Work) -> float:
    return 0 if _stored(work) else device.calibrating(work.shapes, work.calibrate, work.budget)


def _moments(work: Work) -> float:
    """Bytes of full output moments; 0 if they exceed their budget."""
    depth = work.shapes.blocks
    size = (
        4 * depth * sum(rows * rows for rows, _ in work.shapes.matrices)
        if work.sensitivity.output_moments == "full"
        else 0
    )
    return size if size <= work.sensitivity.moment_budget_bytes else 0


def _probing(work: Work) -> Estimate:
    """The needs of `sensitivity`. Memory holds every block's inputs for the process's probes of a
    pass, one block, the graph of one probe in it, and the logits of one row. It holds one block's
    full moments twice, before and after they grow. A block takes 20 bytes per parameter (weights,
    probe vector, gradients, products). Without second derivatives it takes 8, the graph is that of
    one batch, and the logits are those of a few tokens. On disk, each lane has its moments.

    The copies per token of every site's inputs, of every head's attention row and of the logits are
    fitted to a measurement. Time is that of all probes. With an agreement below 1, the probes of
    the first pass (at least two) may be enough.
    """
    shapes, params = work.shapes, work.sensitivity
    checkpoint, entry = shapes.checkpoint, shapes.checkpoint.architecture
    second = params.estimator == "hutchinson"
    tokens = params.rows_per_probe * shapes.length
    probes = device.probes(params, shapes.processes)
    # values; with second derivatives also their tangents
    boundaries = (1 + second) * 4 * probes * tokens * entry.width * (entry.depth + 1)
    inputs, attention, logits = (24, 6, 10) if second else (8, 1, 5)
    lane = -(-params.probes_per_pass // LANES)
    together = tokens if second else tokens * min(lane, at_once(params.rows_per_probe, shapes.length))
    graph = 4 * together * (inputs * sum(shapes.sites) + attention * checkpoint.heads * shapes.length)
    top = 4 * (shapes.length if second else min(shapes.length, HEAD_TOKENS)) * logits * checkpoint.vocabulary
    moments = _moments(work)
    memory = boundaries + (20 if second else 8) * shapes.block + max(graph, top) + 2 * moments / entry.depth
    forwards = 14 if second else 4  # matrix products, in units of a forward pass
    flops = (
        forwards
        * 2
        * params.probes
        * (probes / params.probes_per_pass)
        * tokens
        * (shapes.block * shapes.blocks + entry.width * checkpoint.vocabulary)
    )
    first = min(params.probes, max(2, params.probes_per_pass)) if params.agreement < 1 else params.probes
    base = LIBRARIES + outside(shapes.checkpoint)
    gpu = device.probing(shapes, params, moments / entry.depth)
    host = base + shapes.stored * shapes.block + 2 * moments / entry.depth
    least, disk = first / params.probes, 1e4 + 4 * moments
    return Estimate("sensitivity", base + memory, disk, flops, least, gpu, host, shapes.processes)


def _loaded(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """Bytes of the whole model in ``dtype``. If the file has another dtype, the stored form of its
    largest tensor comes on top.
    """
    largest = max(math.prod(shape) for shape in checkpoint.shapes.values())
    return checkpoint.parameters * dtype.itemsize + (
        0 if dtype == checkpoint.dtype else largest * checkpoint.dtype.itemsize
    )


def evaluating(
    checkpoint: Checkpoint,
    params: EvaluateParams,
    texts: Sequence[tuple[int, int]],
    compared: bool = False,
    processes: int = 1,
) -> Estimate:
    """The needs of `evaluate` for one model: texts of (samples, length). ``compared``: with the dense
    model, as for every variant. Each of several processes holds the whole model.

    Memory: the whole model, a batch's activations, and the logits of one sample: the model's
    output, their log-softmax, and a float32 copy if they have another dtype. Completions need the
    logits of their last tokens, and keys and values. The comparison needs the dense model's hidden
    states up to SPARSELINE_ACTIVATION_BYTES, a block of it or its head, and six times the logits of
    a piece of a sample.
    """
    dtype, entry = getattr(torch, params.compute_dtype), checkpoint.architecture
    rows = min(params.batch_rows, max((rows for rows, _ in texts), default=0))
    length = max((length for _, length in texts), default=0)
    asked = params.completions
    cache = (
        2
        * dtype.itemsize
        * asked.count
        * (asked.prompt_tokens + asked.new_tokens)
        * entry.width
        * entry.depth
    )
    tops = max(length * _logits(dtype) * checkpoint.vocabulary, 4 * asked.count * checkpoint.vocabulary)
    if compared:
        tops = max(tops, (dtype.itemsize * length + 24 * min(length, HEAD_TOKENS)) * checkpoint.vocabulary)
    tokens = sum(rows * length for rows, length in texts) + asked.count * (
        asked.prompt_tokens + asked.new_tokens
    )
    hidden = dtype.itemsize * rows * length * entry.width
    memory = (
        LIBRARIES
        + _loaded(checkpoint, dtype)
        + max(
            Shapes(checkpoint, rows, length, rows).inner(rows) * dtype.itemsize / 4,
            hidden + tops,
            cache + tops,
        )
    )
    gpu = device.evaluating(checkpoint, params, rows, length, max(tops, cache + tops - hidden))
    host = LIBRARIES + _loaded(checkpoint, dtype)
    name, flops, beside = "evaluate dense", 2 * checkpoint.parameters * tokens / processes, 0.0
    if compared:
        states = min(
            settings.activation_bytes(),
            dtype.itemsize * entry.width * max((rows * length for rows, length in texts), default=0),
        )
        beside = states + max(
            Shapes(checkpoint, rows, length, rows).block * dtype.itemsize, outside(checkpoint, dtype)
        )
        name, flops = "evaluate", 2 * flops
    gpu, memory = gpu + beside, memory + beside
    return Estimate(name, memory, 1e4, flops, gpu_bytes=gpu, host_bytes=host, processes=processes)


def generating(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, text: TextParams, how: GeneratedParams
) -> Estimate:
    """The needs of `generate` for one text: the whole model, keys and values of a batch, and four
    copies of its logits in float32.
    """
    entry, tokens = checkpoint.architecture, how.prompt_tokens + how.new_tokens
    cache = 2 * dtype.itemsize * how.batch_rows * tokens * entry.width * entry.depth
    beside = cache + how.batch_rows * (dtype.itemsize + 16) * checkpoint.vocabulary
    host, flops = (
        LIBRARIES + _loaded(checkpoint, dtype),
        2 * checkpoint.parameters * (text.samples or 0) * text.length,
    )
    gpu = checkpoint.parameters * dtype.itemsize + beside
    return Estimate(
        name, host + beside, 8 * (text.samples or 0) * text.length, flops, gpu_bytes=gpu, host_bytes=host
    )


def answering(
    checkpoint: Checkpoint, name: str, params: TasksParams, lengths: Sequence[int], processes: int = 1
) -> Estimate:
    """The needs of `tasks` for one model and a preset with requests of these lengths [tokens], the
    longest first.

    Memory: the whole model, and a batch's activations or its logits, of all samples at once: the
    model's output, their log-softmax, and a float32 copy if they have another dtype. lm-eval runs
    the longest batch first, and keeps its log-softmax until the next batch has its own.
    """
    dtype, window = (
        getattr(torch, params.compute_dtype),
        getattr(checkpoint.config, "max_position_embeddings", None),
    )
    cut = [length if window is None else min(length, window) for length in lengths]
    rows, length = min(params.batch_rows, len(cut)), max(cut, default=0)
    first, second = (
        len(batch) * max(batch, default=0)
        for batch in (cut[: params.batch_rows], cut[params.batch_rows : 2 * params.batch_rows])
    )
    tops = max(first * _logits(dtype), first * 4 + second * _logits(dtype)) * checkpoint.vocabulary
    memory = (
        LIBRARIES
        + TASK_LIBRARIES
        + _loaded(checkpoint, dtype)
        + max(Shapes(checkpoint, rows, length, rows).inner(rows) * dtype.itemsize / 4, tops)
    )
    inner = Shapes(checkpoint, rows, length, rows, dtype=dtype).activations(rows)
    gpu = (
        checkpoint.parameters * dtype.itemsize
        + dtype.itemsize * rows * length * checkpoint.architecture.width
        + max(inner, tops)
    )
    host = LIBRARIES + TASK_LIBRARIES + _loaded(checkpoint, dtype)
    flops = 2 * checkpoint.parameters * sum(cut) / processes
    return Estimate(name, memory, 1e4, flops, gpu_bytes=gpu, host_bytes=host, processes=processes)


def _logits(dtype: torch.dtype) -> int:
    """Bytes per logit until its token's loss is known."""
    return dtype.itemsize + 4 + (4 if dtype != torch.float32 else 0)


def pruning(name: str, plan: Plan, shapes: Shapes, budget: float = math.inf) -> Estimate:
    """The needs of one variant's `prune`: the streams of hidden states up to their budget, and the
    largest of its steps; the FLOPs of all.

    Args:
        budget: bytes of hidden states that stay on a GPU.
    """
    checkpoint, dtype = shapes.checkpoint, shapes.dtype
    width = checkpoint.architecture.width
    streams, whole = (
        stream_bytes(plan, tokens, width, dtype.itemsize) if plan.needs.text else 0
        for tokens in (math.ceil(shapes.extended * rows) for rows in (shapes.own, shapes.tokens))
    )
    spilt = whole > settings.activation_bytes()
    kept = 3 * dtype.itemsize * shapes.length * shapes.batch_rows * width if spilt else streams
    gpu = device.pruning(plan, shapes, budget)
    shapes = replace(shapes, room=0 if spilt else settings.activation_bytes() - streams)
    passes = plan.needs.text + plan.needs.dense_stream  # through finished blocks
    flops = passes * shapes.extended * shapes.forward + sum(step.flops(shapes) for step in plan.steps)
    memory = LIBRARIES + outside(checkpoint) + kept + max(step.memory(shapes) for step in plan.steps)
    disk = checkpoint.parameters * checkpoint.dtype.itemsize + checkpoint.parameters / 8 + spilt * whole
    beyond = min(_beyond(streams, budget), settings.activation_bytes() / shapes.processes)
    host = LIBRARIES + outside(checkpoint) + shapes.stored * shapes.block + beyond
    flops *= shapes.blocks
    return Estimate(name, memory, disk, flops, gpu_bytes=gpu, host_bytes=host, processes=shapes.processes)


def distilling(
    name: str, params: DistilParams, shapes: Shapes, budget: float = math.inf, rounded: bool = False
) -> Estimate:
    """The needs of one variant's `distil`. The dense model takes one block at a time and leaves the
    hidden states of all samples.

    Memory of the pruned model, for each of its W weights: 4 bytes, two averages, a bit of mask. In
    addition the inputs of every block for a step's samples; one block's gradient, a lane's, and a
    rounded copy, 10 bytes per weight; graphs and logits (``device.learning``). Quantised weights of
    a block are computed from scales and integers for each lane, 8 bytes more. Blocks whose graphs
    are not kept pass forward twice.

    Args:
        shapes: sizes with the samples of a step as the batch.
        budget: bytes of hidden states that stay on a GPU.
        rounded: the pruned model is quantised.
    """
    checkpoint, dtype = shapes.checkpoint, shapes.dtype
    width, weights = checkpoint.architecture.width, shapes.blocks * shapes.block
    rows, judging = shapes.rows + shapes.training, math.ceil(shapes.rows * shapes.held_out)
    lengths = shapes.length * (rows - judging), shapes.length * judging
    whole = learning_bytes(*lengths, width, dtype.itemsize)
    streams, spilt = whole * shapes.share, whole > settings.activation_bytes()
    limit = settings.activation_bytes() if math.isinf(budget) else budget
    shapes = replace(shapes, room=max(0, limit - streams))
    bfloat16 = affords(torch.device("cpu" if math.isinf(budget) else "cuda"), params.compute_dtype)
    state = device.trained(params, checkpoint.dtype if rounded else None) * weights
    training = state + (18 if rounded else 10) * shapes.block + device.learning(params, shapes, bfloat16)
    kept = 3 * dtype.itemsize * shapes.length * shapes.batch_rows * width if spilt else streams
    head = 2 * width * checkpoint.vocabulary * shapes.own * shapes.extended
    again = 1 - device.kept_graphs(shapes, bfloat16) / checkpoint.architecture.depth
    forward, share = shapes.blocks * shapes.forward * shapes.extended + head, 1 - judging / rows
    flops = forward + params.epochs * share * ((3 + again) * forward + head) + 2 * (1 - share or 1) * forward
    disk = checkpoint.parameters * checkpoint.dtype.itemsize + 2 * state + spilt * whole
    # glibc keeps the memory of the embeddings that embedded the rows
    base = LIBRARIES + 2 * outside(checkpoint)
    beyond = min(_beyond(streams, budget), settings.activation_bytes() / shapes.processes)
    host = base + shapes.stored * shapes.block + beyond
    gpu = (
        device.held(streams, dtype.itemsize * shapes.batch * shapes.length * width, budget)
        + outside(checkpoint, dtype)
        + training
    )
    memory = base + kept + training
    return Estimate(name, memory, disk, flops, gpu_bytes=gpu, host_bytes=host, processes=shapes.processes)


def exporting(checkpoint: Checkpoint, name: str, formats: Sequence[str], sparsity: float) -> Estimate:
    """The needs of one variant's `export`: one tensor with its mask, values and decoded form, about 10
    bytes per weight; every format's bytes.

    `bitmask` of a quantised variant needs less than predicted.
    """
    entry, item = checkpoint.architecture, checkpoint.dtype.itemsize
    inside = sum(math.prod(checkpoint.matrix_shape(*place)) for place in entry.places())
    outside = (checkpoint.parameters - inside) * item
    bytes_each = {
        "dense": item,
        "bitmask": (1 - sparsity) * item + 1 / 8,
        "compressed-tensors": (4 + 16 / 128) / 8,
        "gguf": 2,
    }
    largest = max(math.prod(shape) for shape in checkpoint.shapes.values())
    if "gguf" in formats:  # a block's experts are one tensor
        joined = [own for own in checkpoint.pieces.values() if own[0].expert is not None]
        sizes = [sum(math.prod(checkpoint.shapes[piece.stored]) for piece in own) for own in joined]
        largest = max(largest, *sizes)
    return Estimate(
        name, LIBRARIES + 10 * largest, sum(outside + inside * bytes_each[one] for one in formats), 0
    )
