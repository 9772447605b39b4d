"""Predict memory, disk and rough time of every stage from the model's header alone, before anything runs.

Symbols: n calibration tokens, P parameters of a block, B blocks, d channels of a site. Bytes; floats are 4 bytes while computing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.pruning.prune import FITS, PruneParams

LIBRARIES = 450e6  # resident size of Python with torch and transformers
SLOWDOWN = 2.0  # wall time over pure matrix products: softmax, norms, sorting, small shapes


@dataclass(frozen=True)
class Work:
    """What the parameters ask for."""

    rows: int
    length: int
    batch_rows: int
    evaluation_tokens: int
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
    activation_bytes: int  # of a value of the hidden states


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
    """Needs per stage, but for `prune`, which depends on the variant (``pruning``).

    Formulas: an activation stream takes n·D values of the computing dtype; a block in use 4·P; calibrate adds its Grams 2·Σ4d²; induce prunes each block up to three times for its gate, whose held-out rows (counted as all) stream along; curves prunes each matrix of a block
    at every density and takes two products with its errors, all from stored Grams (beyond their budget a dense pass comes on top);
    sensitivity holds every block's inputs for a pass of probes, one block (weights, probe vector, gradients, products: 20 bytes a
    parameter; 8 without second derivatives), the graph of one probe in it, and the logits of one row (copies per token of every site's
    inputs, of every head's attention row and of the logits are fitted to a measurement), and one block's full moments. Its time is that of all
    probes; unless an agreement of 1 is asked for, those of the first pass (two at least) may be enough.
    """
    entry = checkpoint.architecture
    shapes = [checkpoint.matrix_shape(0, matrix) for matrix in entry.matrices]
    block = sum(rows * columns for rows, columns in shapes)
    sites = [len(site.index) for site in entry.sites]
    tokens = work.rows * work.length
    total = checkpoint.parameters
    outside = 4 * sum(math.prod(checkpoint.shapes[name]) for name in checkpoint.outside_blocks())
    stream = work.activation_bytes * tokens * entry.width
    grams = 4 * sum(d * d for d in sites)
    batch = 4 * work.batch_rows * work.length
    inner = batch * (sum(sites) + 4 * entry.width) + batch * work.length
    forward = 2 * tokens * block * entry.depth
    gram_flops = 2 * tokens * sum(d * d for d in sites) * entry.depth
    factor = entry.depth * 3 * sum(d**3 for d in sites)
    sweep = entry.depth * sum(rows * columns * columns for rows, columns in shapes)
    errors = 6 * entry.depth * sum(rows * columns * columns for rows, columns in shapes)
    stored_grams = 2 * grams * entry.depth if 2 * grams * entry.depth <= work.gram_budget_bytes else 0
    base = LIBRARIES + outside
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
        Estimate(
            "calibrate", base + stream + 4 * block + 2 * grams + inner, stored_grams + entry.depth * 20 * sum(sites), forward + gram_flops
        ),
        Estimate("scale", LIBRARIES + 4 * block + 2 * grams, entry.depth * 4 * sum(sites), 0),
        Estimate(
            "induce",
            base + stream + 20 * block + 4 * grams + inner,
            entry.depth * 8 * sum(sites),
            forward + errors * work.induction_steps + 3 * (factor + sweep),
        ),
        Estimate(
            "sensitivity",
            base + boundaries + (20 if work.second_order else 8) * block + max(graph, top) + moments / entry.depth,
            1e4 + moments,
            forwards * 2 * probed * (block * entry.depth + entry.width * config.vocab_size),
            first / work.probes,
        ),
        Estimate(
            "curves", LIBRARIES + 16 * block + 2 * grams + 16 * max(sites) ** 2, 1e4 * entry.depth, factor + work.densities * 4 * sweep
        ),
        Estimate("evaluate", LIBRARIES + 4 * total, 1e4, 2 * total * work.evaluation_tokens),
    ]
    return {step.stage: step for step in steps}


def pruning(checkpoint: Checkpoint, name: str, params: PruneParams, rows: int, length: int, activation_bytes: int) -> Estimate:
    """Needs of one variant's `prune`, with so many bytes per value of the hidden states.

    Memory: the streams, n·D values each (one; two where something aims at the dense model; one more for windows) up to their budget; then the
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
    streams = (1 + (aimed or bool(fits)) + (window > 1)) * activation_bytes * tokens * entry.width
    kept = streams if streams <= params.activation_budget_bytes else 3 * activation_bytes * params.batch_rows * length * entry.width
    outside = 4 * sum(math.prod(checkpoint.shapes[outer]) for outer in checkpoint.outside_blocks())

    def inner(batch_rows: int) -> float:
        return 4 * batch_rows * length * (sum(sites) + 4 * entry.width + checkpoint.config.num_attention_heads * length / 4)

    d = max(sites)
    grams = 4 * (d * d if sitewise else sum(size * size for size in sites)) + (4 * d * d if aimed else 0)
    item, masked = checkpoint.dtype.itemsize, refit and how.lsq.mask_iterations > 0
    solver = (4 + 4 * masked) * d * d + (5 + 4 * aimed + 8 * refit + 12 * masked) * largest
    held = item + (item != 4) * 4 + (aimed or bool(fits)) * 4
    selecting = held * block * window + grams + solver + inner(params.batch_rows)
    again = params.quantization.bits is not None and bool(fits)  # quantised after a fit: moments, sweep and fit once more
    refitted = again and bool(params.quantization.refit)
    fitting = [window * (23 if "weights" in fit.parts else 22 if refitted else 16) * block + 3 * inner(fit.batch_rows) for fit in fits]
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
