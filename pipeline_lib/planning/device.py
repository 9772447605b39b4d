"""What a stage holds on a GPU: the peak of its tensors there, which is what
``torch.cuda.max_memory_allocated`` tells afterwards.

Nothing of the libraries is in it, nor what the allocator keeps of freed memory. Each stage has a
few phases, of which the largest counts. Symbols: P parameters of a block, D channels of the stream,
V tokens of the vocabulary, T tokens of a row. The numbers of tensors that a phase holds were
counted in the code, and for gradients on a Llama by following every tensor's storage
(tests/test_device_memory.py).
"""

import math

import torch

from pipeline_lib.core import settings
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

# of a GPU's memory that CUDA and its libraries take for a process, about; not in what torch tells
CONTEXT = 0.6e9


def streams_budget(memory: float) -> float:
    """Bytes of hidden states that stay on a GPU of so much memory, if nothing else is on it."""
    asked = settings.gpu_activation_bytes()
    return settings.GPU_SHARE * (memory - CONTEXT) if asked is None else asked


def held(streams: float, batch: float, budget: float) -> float:
    """Bytes of streams on the GPU: all, or up to the budget and of the others a batch that is read,
    one ahead, and one that is written.
    """
    return streams if streams <= budget else min(streams, budget + 3 * batch)


def pruning(plan: Plan, shapes: Shapes, budget: float) -> float:
    """The streams, and the embeddings while these are made; then the largest of the steps."""
    width = shapes.checkpoint.architecture.width
    streams, batch = 0.0, shapes.dtype.itemsize * shapes.batch * shapes.length * width
    if plan.needs.text:
        streams = held(stream_bytes(plan, shapes.tokens, width, shapes.dtype.itemsize), batch, budget)
    return streams + max(
        plan.needs.text * outside(shapes.checkpoint, shapes.dtype),
        *(step.memory(shapes) for step in plan.steps),
    )


def calibrating(shapes: Shapes, params: CalibrateParams, budget: float) -> float:
    """The stream, a block, and the largest of three phases: Gram matrices of the fitting rows and
    of a lane, the samples that medians are taken over, and a batch; the same for the held-out rows
    beside them; what statistics are made of, with the widest site's once more.

    A sum over a row takes 16 bytes a value: in float64, and its square.
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
    """The gate's rows before and after a block, the block and its pruned form, and a batch; or the
    walk that takes the Gram matrices again.
    """
    item = shapes.dtype.itemsize
    rows = shapes.rows * (shapes.held_out or 1)
    streams = held(
        2 * shapes.stream(shapes.dtype) * rows / shapes.rows,
        item * shapes.batch * shapes.length * shapes.checkpoint.architecture.width,
        budget,
    )
    return streams + max(again, (item + 4 + shapes.copied) * shapes.block + shapes.activations(shapes.batch))


def probing(shapes: Shapes, params: SensitivityParams, moments: float) -> float:
    """Every block's inputs for a pass of probes, in float32, with second derivatives their tangents
    too. Beside them a block and the graph of the probes of one call in it, then what is left of it
    with the block's output moments; or a block and the head with some copies of logits.

    Args:
        moments: bytes of the output moments of one block.
    """
    checkpoint, entry = shapes.checkpoint, shapes.checkpoint.architecture
    tokens = params.rows_per_probe * shapes.length
    boundaries = 4 * params.probes_per_pass * tokens * entry.width * (entry.depth + 1)
    logits = 4 * shapes.length * checkpoint.vocabulary

    lane = -(-params.probes_per_pass // LANES)
    # probes whose rows are one batch, without second derivatives
    together = min(lane, at_once(params.rows_per_probe, shapes.length))

    def graph(sites: float, attention: float) -> float:
        return 4 * tokens * (sites * sum(shapes.sites) + attention * checkpoint.heads * shapes.length)

    first, second = 0.0, 0.0
    if params.estimator == "fisher" or params.output_moments != "none":
        before = moments * (lane > together)  # of a lane's probes that are done
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
    # its attention has no fused kernel; weights, probe, gradients and products; their mean in
    # float64
    if params.estimator == "hutchinson":
        inner = max(16 * shapes.block + graph(8, 11), 20 * shapes.block + 8 * shapes.largest)
        second = 2 * boundaries + max(inner, 4 * shapes.block + outside(checkpoint) + 7 * logits)
    return max(first, second)


def trained(params: DistilParams) -> float:
    """Bytes of a weight of the pruned model while the whole of it is trained: as it moves, Adam's
    two averages, and a bit of mask.
    """
    return 4 + 2 * getattr(torch, params.state_dtype).itemsize + 1 / 8


def learning(params: DistilParams, shapes: Shapes) -> float:
    """What a step of distillation holds beside weights: the inputs of every block for its rows; the
    graph of a lane's rows in one block, or of all rows in all blocks without ``recompute``; six
    copies of a few tokens' logits (both models', their logarithms, probabilities, gradient).
    """
    depth, lane = shapes.checkpoint.architecture.depth, math.ceil(params.batch_rows / LANES)
    boundaries = 4 * params.batch_rows * shapes.length * shapes.checkpoint.architecture.width * (depth + 1)
    # small models pass their lanes side by side
    at_once = params.batch_rows if shapes.blocks * shapes.block <= SMALL else lane
    graph = 3 * (shapes.inner(at_once) if params.recompute else depth * shapes.inner(params.batch_rows))
    return boundaries + graph + 6 * 4 * min(shapes.length, HEAD_TOKENS) * shapes.checkpoint.vocabulary


def evaluating(checkpoint: Checkpoint, params: EvaluateParams, rows: int, length: int, tops: float) -> float:
    """The whole model, a batch in a block with the logits of the row before; or its hidden states
    with ``tops`` bytes for logits.

    Args:
        rows: of a batch, with ``length`` tokens each.
    """
    dtype: torch.dtype = getattr(torch, params.compute_dtype)
    hidden = dtype.itemsize * rows * length * checkpoint.architecture.width
    inner = (
        Shapes(checkpoint, rows, length, rows, dtype=dtype).activations(rows)
        + dtype.itemsize * length * checkpoint.vocabulary
    )
    return checkpoint.parameters * dtype.itemsize + hidden + max(inner, tops)
