"""Memory of a stage on a GPU: the peak of its tensors there, as ``torch.cuda.max_memory_allocated``
reports it afterwards.

It includes neither the libraries nor freed memory that the allocator keeps. Each stage has a few
phases, of which the largest counts. Symbols: P parameters of a block, D channels of the stream, V
tokens of the vocabulary, T tokens per sample. The numbers of tensors in a phase were counted in the
code, and for gradients by tracking every tensor's storage on a Llama (tests/test_device_memory.py).
"""

import math
from dataclasses import replace

import torch

from pipeline_lib.core import ranks, settings
from pipeline_lib.core.threads import SMALL
from pipeline_lib.evaluation.settings import EvaluateParams
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.measure.fisher import at_once
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.stream import HEAD_TOKENS
from pipeline_lib.prune.plan import Plan
from pipeline_lib.prune.run import stream_bytes
from pipeline_lib.prune.shapes import Shapes, outside
from pipeline_lib.stats.lanes import LANES
from pipeline_lib.stats.settings import CalibrateParams

# bytes of GPU memory that CUDA and its libraries take per process, roughly; torch does not report them
CONTEXT = 0.6e9


def streams_budget(memory: float) -> float:
    """Bytes of hidden states that stay on an otherwise empty GPU with ``memory`` bytes."""
    asked = settings.gpu_activation_bytes()
    return settings.GPU_SHARE * (memory - CONTEXT) if asked is None else asked


def held(streams: float, batch: float, budget: float) -> float:
    """Bytes of streams on the GPU: all; or up to the budget, plus three batches of the others (one
    read, one prefetched, one written).
    """
    return streams if streams <= budget else min(streams, budget + 3 * batch)


def pruning(plan: Plan, shapes: Shapes, budget: float) -> float:
    """Bytes of the streams, and the larger of two: the embeddings that compute the streams, or the
    largest step.
    """
    width = shapes.checkpoint.architecture.width
    streams, batch = 0.0, shapes.dtype.itemsize * shapes.batch * shapes.length * width
    if plan.needs.text:
        tokens = math.ceil(shapes.extended * shapes.own)
        whole = stream_bytes(plan, tokens, width, shapes.dtype.itemsize)
        streams, shapes = held(whole, batch, budget), replace(shapes, room=max(0.0, budget - whole))
    return streams + max(
        plan.needs.text * outside(shapes.checkpoint, shapes.dtype),
        *(step.memory(shapes) for step in plan.steps),
    )


def calibrating(shapes: Shapes, params: CalibrateParams, budget: float) -> float:
    """Bytes of the stream, a block, and the largest of three phases. First come the Gram matrices
    of the training split and of a lane, samples for medians, and a batch. The second adds the same
    for the held-out split. The third computes the statistics, with those of the widest site once
    more.

    A sum over a sample takes 16 bytes per value: in float64, and its square.
    """
    widest, channels = max(shapes.sites), sum(shapes.sites)
    item, length, width = shapes.dtype.itemsize, shapes.length, shapes.checkpoint.architecture.width

    def passing(rows: int) -> float:
        return max(
            shapes.activations(rows), item * rows * length * (widest + 3 * width) + 16 * length * widest
        )

    judging = math.ceil(shapes.rows * shapes.held_out)
    samples = [
        4 * channels * min(count * length, params.median_tokens) for count in (shapes.rows - judging, judging)
    ]
    batches = [min(params.batch_rows, math.ceil(count / 4)) for count in (shapes.rows - judging, judging)]
    finishing = 4 * widest * min(shapes.tokens, params.median_tokens) + 8 * widest * widest
    phases = [
        2 * shapes.grams + samples[0] + passing(batches[0]),
        (2 + (judging > 0)) * shapes.grams + sum(samples) + passing(batches[1]),
        2 * (1 + (judging > 0)) * shapes.grams + sum(samples) + finishing - 8 * widest * widest,
    ]
    streams = held(shapes.stream(shapes.dtype), item * batches[0] * length * width, budget)
    return streams + max(outside(shapes.checkpoint, shapes.dtype), item * shapes.block + max(phases))


def inducing(shapes: Shapes, again: float, budget: float) -> float:
    """Bytes of the held-out samples before and after a block, and the larger of two: the block with
    its pruned form and a batch, or the pass that collects the Gram matrices again.
    """
    item = shapes.dtype.itemsize
    rows = shapes.rows * (shapes.held_out or 1)
    streams = held(
        2 * shapes.stream(shapes.dtype) * rows / shapes.rows,
        item * shapes.batch * shapes.length * shapes.checkpoint.architecture.width,
        budget,
    )
    return streams + max(again, (item + 4 + shapes.copied) * shapes.block + shapes.activations(shapes.batch))


def probes(params: SensitivityParams, processes: int) -> int:
    """The most probes of a pass that one of several processes has. Each process has whole lanes."""
    sizes = [len(range(lane, params.probes_per_pass, LANES)) for lane in range(LANES)]
    return max(sum(sizes[lane] for lane in own) for own in ranks.division(LANES, processes))


def probing(shapes: Shapes, params: SensitivityParams, moments: float) -> float:
    """Bytes of every block's inputs for the process's probes of a pass, in float32; with second
    derivatives also their tangents. In addition a block, and the largest of three: the graph of one
    call's probes in it; the rest of that graph with the block's output moments; the head with some
    copies of logits.

    Args:
        moments: bytes of the output moments of one block.
    """
    checkpoint, entry = shapes.checkpoint, shapes.checkpoint.architecture
    tokens = params.rows_per_probe * shapes.length
    boundaries = 4 * probes(params, shapes.processes) * tokens * entry.width * (entry.depth + 1)
    logits = 4 * shapes.length * checkpoint.vocabulary

    lane = -(-params.probes_per_pass // LANES)
    # probes whose rows are one batch, without second derivatives
    together = min(lane, at_once(params.rows_per_probe, shapes.length))

    def graph(sites: float, attention: float) -> float:
        return 4 * tokens * (sites * sum(shapes.sites) + attention * checkpoint.heads * shapes.length)

    first, second = 0.0, 0.0
    if params.estimator == "fisher" or params.output_moments != "none":
        before = moments * (lane > together)  # moments of a lane's probes that are done
        few = 4 * min(shapes.length, HEAD_TOKENS) * checkpoint.vocabulary
        first = (
            boundaries
            + 4 * shapes.block
            + max(
                together * graph(7.5, 0) + before,
                together * graph(5, 0) + moments,
                outside(checkpoint) + 4 * few,
            )
        )
    # no fused kernel for attention; weights, probe, gradients and products; their mean in float64
    if params.estimator == "hutchinson":
        inner = max(16 * shapes.block + graph(8, 11), 20 * shapes.block + 8 * shapes.largest)
        second = 2 * boundaries + max(inner, 4 * shapes.block + outside(checkpoint) + 7 * logits)
    return max(first, second)


def trained(params: DistilParams, dtype: torch.dtype | None) -> float:
    """Bytes per weight of the pruned model while the whole model is trained: the weight, Adam's two
    averages, and a bit of mask.

    Args:
        dtype: that of a quantised checkpoint, or None. Only its scales are trained, so that a
            weight takes its stored bytes and its integer.
    """
    if dtype is not None:
        return dtype.itemsize + 2
    return 4 + 2 * getattr(torch, params.state_dtype).itemsize + 1 / 8


def kept_graphs(shapes: Shapes, bfloat16: bool) -> int:
    """Number of blocks whose graphs a distillation step keeps from the forward to the backward pass:
    as many as fit in ``shapes.room``.

    Args:
        shapes: sizes with the samples of a step as the batch.
        bfloat16: products are in bfloat16.
    """
    each, depth = shapes.graph(shapes.batch_rows, bfloat16), shapes.checkpoint.architecture.depth
    return int(min(shapes.room, depth * each) // each)


def learning(params: DistilParams, shapes: Shapes, bfloat16: bool) -> float:
    """Bytes of a distillation step besides weights. It holds the inputs of every block for its
    samples, and the larger of two: the graphs that are kept (``kept_graphs``), or the graph of a lane's
    samples in one block. It also holds six copies of a few tokens' logits:
    both models', their logarithms, probabilities, and gradient.

    Args:
        bfloat16: products are in bfloat16.
    """
    depth, lane = shapes.checkpoint.architecture.depth, math.ceil(params.batch_rows / LANES)
    boundaries = 4 * params.batch_rows * shapes.length * shapes.checkpoint.architecture.width * (depth + 1)
    # small models pass their lanes side by side
    at_once = params.batch_rows if shapes.blocks * shapes.block <= SMALL else lane
    kept = kept_graphs(shapes, bfloat16) * shapes.graph(params.batch_rows, bfloat16)
    graph = max(kept, 3 * shapes.inner(at_once))
    return boundaries + graph + 6 * 4 * min(shapes.length, HEAD_TOKENS) * shapes.checkpoint.vocabulary


def evaluating(checkpoint: Checkpoint, params: EvaluateParams, rows: int, length: int, tops: float) -> float:
    """Bytes of the whole model and a batch's hidden states, and the larger of two: the batch's
    activations in a block with the logits of the previous sample, or ``tops`` bytes for logits.

    Args:
        rows: samples of a batch, with ``length`` tokens each.
    """
    dtype: torch.dtype = getattr(torch, params.compute_dtype)
    hidden = dtype.itemsize * rows * length * checkpoint.architecture.width
    inner = (
        Shapes(checkpoint, rows, length, rows, dtype=dtype).activations(rows)
        + dtype.itemsize * length * checkpoint.vocabulary
    )
    return checkpoint.parameters * dtype.itemsize + hidden + max(inner, tops)
