"""Predict memory, disk and rough time of every stage from the model's header alone, before anything runs.

Symbols: n calibration tokens, P parameters of a block, B blocks, d channels of a site. Bytes; floats are 4 bytes while computing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline_lib.evaluation.settings import EvaluateParams
from pipeline_lib.evaluation.tasks import TasksParams
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.prune.prune import FITS, PruneParams

LIBRARIES = 730e6 if torch.version.cuda or torch.version.hip else 450e6  # resident size of Python with torch and transformers, measured
TASK_LIBRARIES = 150e6  # what lm-eval and datasets come to beside them
SLOWDOWN = 2.0  # wall time over pure matrix products: softmax, norms, sorting, small shapes


@dataclass(frozen=True)
class Work:
    """What the parameters ask for."""

    rows: int
    length: int
    held_out: float  # share of the rows that judges
    compute_dtype: torch.dtype  # of the block-wise stages' forward passes
    batch_rows: int
    median_tokens: int
    second_order: bool  # sensitivity by Hessian-vector products instead of gradients
    probes: int
    agreement: float  # of the probes' halves, at which probing stops before it has used all
    rows_per_probe: int
    probes_per_pass: int
    full_moments: bool  # of output gradients; diagonals weigh nothing
    moment_budget_bytes: int
    induction_steps: int
    densities: int  # of an error curve
    gram_budget_bytes: int


@dataclass(frozen=True)
class Estimate:
    """One stage's needs."""

    stage: str
    memory_bytes: float
    disk_bytes: float
    flops: float
    least: float = 1.0  # share of the FLOPs after which the stage may be done already

    def seconds(self, flops_per_second: float) -> float:
        return SLOWDOWN * self.flops / flops_per_second


def measure_speed(device: torch.device) -> float:
    """Matrix-product throughput [FLOP/s] of this machine in float32, from half a second of products."""
    a = torch.randn(1024, 1024, device=device)
    a @ a
    started, count = time.monotonic(), 0
    while time.monotonic() - started < 0.5:
        float((a @ a)[0, 0])
        count += 1
    return 2 * 1024**3 * count / (time.monotonic() - started)


def estimate(checkpoint: Checkpoint, work: Work) -> dict[str, Estimate]:
    """Needs per stage, but for those that hang on the variant or on the whole model (``pruning``, ``exporting``, ``evaluating``, ``answering``).

    Formulas: an activation stream takes e·n·D, e the bytes of ``compute_dtype``; a block in use 4·P; calibrate adds its Grams 2·Σ4d², the samples that
    medians are taken over (the widest site's four times: joined, sorted, and with places), and what summing the widest site's batch takes, 15
    bytes a value (itself in float32 and in float64, its square): measured. Induce prunes each block up to three times for its gate, whose rows are there before and after the block;
    curves prunes each matrix of a block at every density and takes two products with its errors, one of them with the block's output moments. Both read stored Grams; beyond their budget they walk as calibrate does.
    Sensitivity holds every block's inputs for a pass of probes, one block (weights, probe vector, gradients, products: 20 bytes a
    parameter; 8 without second derivatives), the graph of one probe in it, and the logits of one row (copies per token of every site's
    inputs, of every head's attention row and of the logits are fitted to a measurement), and one block's full moments. Its time is that of all
    probes; unless an agreement of 1 is asked for, those of the first pass (two at least) may be enough.
    """
    entry = checkpoint.architecture
    shapes = [checkpoint.matrix_shape(0, matrix) for matrix in entry.matrices]
    block = sum(rows * columns for rows, columns in shapes)
    sites = [len(site.index) for site in entry.sites]
    tokens = work.rows * work.length
    outside = _outside(checkpoint)
    stream = work.compute_dtype.itemsize * tokens * entry.width
    grams = 4 * sum(d * d for d in sites)
    batch = work.batch_rows * work.length
    inner = _inner(checkpoint, work.batch_rows, work.length)
    forward = 2 * tokens * block * entry.depth
    gram_flops = 2 * tokens * sum(d * d for d in sites) * entry.depth
    factor = entry.depth * 3 * sum(d**3 for d in sites)
    sweep = entry.depth * sum(rows * columns * columns for rows, columns in shapes)
    errors = 6 * entry.depth * sum(rows * columns * columns for rows, columns in shapes)
    stored_grams = 2 * grams * entry.depth if 2 * grams * entry.depth <= work.gram_budget_bytes else 0
    base = LIBRARIES + outside
    sampled = 4 * min(tokens, 2 * work.median_tokens) * sum(sites) + 16 * min(tokens, work.median_tokens) * max(sites)
    walk = stream + 2 * grams + max(inner + 15 * batch * max(sites), sampled)  # what a walk over the blocks holds beside the block
    again, repeated = (0, 0) if stored_grams else (walk, forward + gram_flops)
    judged = 2 * stream * (work.held_out or 1)
    config = checkpoint.config
    orders = 2 if work.second_order else 1  # values, or values and their tangents
    boundaries = orders * 4 * work.probes_per_pass * work.rows_per_probe * work.length * entry.width * (entry.depth + 1)
    inputs, attention, logits = (24, 6, 10) if work.second_order else (8, 1, 6)
    graph = 4 * work.rows_per_probe * work.length * (inputs * sum(sites) + attention * config.num_attention_heads * work.length)
    top = 4 * work.length * logits * config.vocab_size
    moments = 4 * entry.depth * sum(rows * rows for rows, _ in shapes) if work.full_moments else 0
    moments = moments if moments <= work.moment_budget_bytes else 0
    forwards = 14 if work.second_order else 4  # matrix products, in units of a forward pass
    probed = work.probes * work.rows_per_probe * work.length
    first = min(work.probes, max(2, work.probes_per_pass)) if work.agreement < 1 else work.probes
    steps = [
        Estimate("prepare", LIBRARIES, 1e5, 0),
        Estimate("calibrate", base + 4 * block + walk, stored_grams + entry.depth * 20 * sum(sites), forward + gram_flops),
        Estimate("scale", LIBRARIES + 4 * block + 2 * grams, entry.depth * 4 * sum(sites), 0),
        Estimate(
            "induce",
            base + judged + again + 20 * block + 4 * grams + inner,
            entry.depth * 8 * sum(sites),
            forward + repeated + errors * work.induction_steps + 3 * (factor + sweep),
        ),
        Estimate(
            "sensitivity",
            base + boundaries + (20 if work.second_order else 8) * block + max(graph, top) + moments / entry.depth,
            1e4 + moments,
            forwards * 2 * probed * (block * entry.depth + entry.width * config.vocab_size),
            first / work.probes,
        ),
        Estimate(
            "curves",
            LIBRARIES + again + 24 * block + 2 * grams + 16 * max(sites) ** 2 + moments / entry.depth,
            1e4 * entry.depth,
            repeated + factor + work.densities * 4 * sweep,
        ),
    ]
    return {step.stage: step for step in steps}


def _outside(checkpoint: Checkpoint) -> float:
    """Bytes of embeddings, head and last norm in float32."""
    return 4 * sum(math.prod(checkpoint.shapes[name]) for name in checkpoint.outside_blocks())


def _inner(checkpoint: Checkpoint, rows: int, length: int) -> float:
    """Bytes of a batch's activations within a block, in float32: every site's inputs, four of the stream's width, and rows of the attention."""
    entry = checkpoint.architecture
    sites = sum(len(site.index) for site in entry.sites)
    return 4 * rows * length * (sites + 4 * entry.width + checkpoint.config.num_attention_heads * length / 4)


def _loaded(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """Bytes of the whole model in ``dtype``; where that is not the file's, its largest tensor twice."""
    largest = max(math.prod(shape) for shape in checkpoint.shapes.values())
    return checkpoint.parameters * dtype.itemsize + (0 if dtype == checkpoint.dtype else largest * checkpoint.dtype.itemsize)


def evaluating(checkpoint: Checkpoint, params: EvaluateParams, texts: Sequence[tuple[int, int]]) -> Estimate:
    """Needs of `evaluate` for one model: texts of (rows, length).

    Memory: the whole model, a batch's activations, and of one row the logits: as the model gives them, their log-softmax, and a float32 copy where
    they are of another dtype. Completions take the logits of their last tokens, and keys and values.
    """
    dtype, entry, config = getattr(torch, params.compute_dtype), checkpoint.architecture, checkpoint.config
    rows = min(params.batch_rows, max((rows for rows, _ in texts), default=0))
    length = max((length for _, length in texts), default=0)
    asked = params.completions
    cache = 2 * dtype.itemsize * asked.count * (asked.prompt_tokens + asked.new_tokens) * entry.width * entry.depth
    tops = max(length * _logits(dtype) * config.vocab_size, 4 * asked.count * config.vocab_size)
    tokens = sum(rows * length for rows, length in texts) + asked.count * (asked.prompt_tokens + asked.new_tokens)
    hidden = dtype.itemsize * rows * length * entry.width
    memory = (
        LIBRARIES + _loaded(checkpoint, dtype) + max(_inner(checkpoint, rows, length) * dtype.itemsize / 4, hidden + tops, cache + tops)
    )
    return Estimate("evaluate", memory, 1e4, 2 * checkpoint.parameters * tokens)


def answering(checkpoint: Checkpoint, name: str, params: TasksParams, lengths: Sequence[int]) -> Estimate:
    """Needs of `tasks` for one model and a preset whose requests have these lengths [tokens], the longest first.

    Memory: the whole model, and a batch's activations or its logits, of all rows at once: as the model gives them, their log-softmax, and a float32 copy
    where they are of another dtype. lm-eval runs the longest batch first, and keeps its log-softmax until the next batch has its own.
    """
    dtype, window = getattr(torch, params.compute_dtype), getattr(checkpoint.config, "max_position_embeddings", None)
    cut = [length if window is None else min(length, window) for length in lengths]
    rows, length = min(params.batch_rows, len(cut)), max(cut, default=0)
    first, second = (
        len(batch) * max(batch, default=0) for batch in (cut[: params.batch_rows], cut[params.batch_rows : 2 * params.batch_rows])
    )
    tops = max(first * _logits(dtype), first * 4 + second * _logits(dtype)) * checkpoint.config.vocab_size
    memory = LIBRARIES + TASK_LIBRARIES + _loaded(checkpoint, dtype) + max(_inner(checkpoint, rows, length) * dtype.itemsize / 4, tops)
    return Estimate(name, memory, 1e4, 2 * checkpoint.parameters * sum(cut))


def _logits(dtype: torch.dtype) -> int:
    """Bytes that a logit takes until its token's loss is known."""
    return dtype.itemsize + 4 + (4 if dtype != torch.float32 else 0)


def pruning(checkpoint: Checkpoint, name: str, params: PruneParams, rows: int, length: int, dtype: torch.dtype) -> Estimate:
    """Needs of one variant's `prune`.

    Memory: the streams, e·n·D each with e the bytes of ``dtype`` (one; two where something aims at the dense model; one more for windows) up to their budget; then the
    larger of two phases. Selection: a block as stored, another 4·P to compute with if that is not float32, 4·P as pruned where the dense
    block is needed again or a fit follows; the Grams 4·Σd² (site by site only the largest, and the cross moment beside it); the largest
    site's factorisation (4·d²; 4·d² more for ADMM's inverse); of the largest matrix 5 bytes a weight for the sweep, 4 for a target to aim
    at, 8 for least squares, 12 for ADMM; and a batch's activations. Fit: per block of the window 23·P with ``weights`` (as they move,
    Adam's moments, gradient, the best so far, masks and bfloat16 copies), else 4·P as pruned and 12·P (18·P where scales of what was
    quantised are fitted again); and one batch's graph.

    Time: the products of all forward passes, of the sweeps (R·C²) and of at most all iterations and epochs, gradients at twice a forward pass.
    Quantisation after ``lsq`` is another sweep; after a fit it is one towards the block's own outputs, from statistics of its own, and another fit.
    """
    entry, how = checkpoint.architecture, params.reconstruction
    shapes = [checkpoint.matrix_shape(0, matrix) for matrix in entry.matrices]
    block, largest = sum(r * c for r, c in shapes), max(r * c for r, c in shapes)
    sites = [len(site.index) for site in entry.sites]
    tokens = rows * length
    fits = [getattr(how, step) for step in FITS if step in how.steps]
    window = how.block.window if "block" in how.steps else 1
    sitewise, aimed, refit = how.collect == "site", how.towards_dense > 0, "lsq" in how.steps
    streams = (1 + (aimed or bool(fits)) + (window > 1)) * dtype.itemsize * tokens * entry.width
    kept = streams if streams <= params.activation_budget_bytes else 12 * params.batch_rows * length * entry.width
    outside = _outside(checkpoint)

    d = max(sites)
    grams = 4 * (d * d if sitewise else sum(size * size for size in sites)) + (4 * d * d if aimed else 0)
    item, masked = checkpoint.dtype.itemsize, refit and how.lsq.mask_iterations > 0
    solver = (4 + 4 * masked) * d * d + (5 + 4 * aimed + 8 * refit + 12 * masked) * largest
    held = item + (item != 4) * 4 + (aimed or bool(fits)) * 4
    selecting = held * block * window + grams + solver + _inner(checkpoint, params.batch_rows, length)
    again = params.quantization.bits is not None and bool(fits)  # quantised after a fit: moments, sweep and fit once more
    refitted = again and bool(params.quantization.refit)
    fitting = [
        window * (23 if "weights" in fit.parts else 22 if refitted else 16) * block + 3 * _inner(checkpoint, fit.batch_rows, length)
        for fit in fits
    ]
    forward = 2 * tokens * block
    collects = (2.2 if sitewise else 1) * (2 if aimed else 1)  # site by site, a pass stops where it has what it came for
    passes = collects + 1 + bool(fits or aimed) + sum(4 * fit.epochs for fit in fits)
    each = sum(r * c * c for r, c in shapes)
    passes += again * 2 * 2.2 + (4 * fits[-1].epochs if refitted else 0)
    twice = params.quantization.bits is not None and (refit or again)  # a sweep for the mask, and one for the grid
    sweeps = ("obs" in how.steps) * (1 + twice + 4 * again)
    solve = sweeps + 4 * aimed + (2 * (how.lsq.iterations + 4 * how.lsq.mask_iterations) if refit else 0)
    statistics = 2 * tokens * sum(size * size for size in sites) * (1 + aimed + 2 * again)
    flops = passes * forward + statistics + 3 * sum(size**3 for size in sites) * (1 + again) + solve * each
    disk = checkpoint.parameters * (torch.finfo(checkpoint.dtype).bits // 8) + checkpoint.parameters / 8
    disk += streams if streams > params.activation_budget_bytes else 0
    return Estimate(name, LIBRARIES + outside + kept + max([selecting, *fitting]), disk, entry.depth * flops)


def exporting(checkpoint: Checkpoint, name: str, formats: Sequence[str], sparsity: float) -> Estimate:
    """Needs of one variant's `export`: one tensor with its mask, values and what they decode to, about 10 bytes a weight; every format's bytes.

    Quantised variants need less for `bitmask` than what is said here.
    """
    entry, item = checkpoint.architecture, checkpoint.dtype.itemsize
    inside = entry.depth * sum(rows * columns for rows, columns in (checkpoint.matrix_shape(0, matrix) for matrix in entry.matrices))
    outside = (checkpoint.parameters - inside) * item
    bytes_each = {"dense": item, "bitmask": (1 - sparsity) * item + 1 / 8, "compressed-tensors": (4 + 16 / 128) / 8}
    largest = max(math.prod(shape) for shape in checkpoint.shapes.values())
    return Estimate(name, LIBRARIES + 10 * largest, sum(outside + inside * bytes_each[one] for one in formats), 0)
