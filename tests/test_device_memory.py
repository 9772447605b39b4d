"""What a stage holds on a GPU, foretold from the model's header.

Oracle: the peak of the bytes of all live tensors while the stage's heavy function runs, each
storage counted from the operator that made it until nobody refers to it: what
``torch.cuda.max_memory_allocated`` would tell, but for what operators use inside. On the CPU, with
a bfloat16 checkpoint: what computes in float32 is a copy here as it is on a GPU.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from project import ROOT, read_params, recipe
from safetensors.torch import load_file
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline_lib.core.products import bfloat16_is_faster
from pipeline_lib.evaluation.divergence import Dense, Divergence
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.evaluation.settings import EvaluateParams
from pipeline_lib.measure import fisher, hutchinson
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models import places
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.places import Storage
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.models.whole import load_model
from pipeline_lib.planning import device
from pipeline_lib.planning.estimate import Estimate, Work, estimate, evaluating, pruning
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.run import Rows, Source, prune
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.stats.lanes import LANES
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import walk

CPU = torch.device("cpu")
SHIPPED = read_params(ROOT)
VOCABULARY, WIDTH, ROWS, HELD_OUT, MEDIAN = 4096, 512, 32, 0.25, 4096
NEAR = 0.25  # of what is held
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm")}
LITTLE = {"iterations": 2, "mask_iterations": 3}
CLOSED: dict[str, dict[str, Any]] = {  # the shipped variants' closed-form parts, in fewer iterations
    "magnitude": {"steps": [], "selection": {"score": "magnitude", "group": "matrix"}},
    "wanda": {"steps": [], "selection": {"score": "wanda", "group": "row"}},
    "sparsegpt": {"steps": ["obs"], "batch_rows": 4},
    "fast": {"steps": ["obs", "lsq"], "batch_rows": 4, "lsq": LITTLE},
    "best": {"steps": ["obs", "lsq"], "lsq": LITTLE, "statistics": "per_site", "dense_target": 0.5},
}


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while it is open, as long as anything
    refers to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with self:  # operators that are made of others, which inference mode hands over whole
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = _computed(func, args, kwargs or {})
        given = {leaf.untyped_storage()._cdata for leaf in _on_cpu((args, kwargs))}
        for tensor in _on_cpu(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result. A CPU without bfloat16 instructions computes products in float32, which
    is faster there. What that holds meanwhile is not counted.
    """
    if func in PRODUCTS and args[0].dtype == torch.bfloat16 and not bfloat16_is_faster():
        return func(*(each.float() for each in args), **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _on_cpu(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device == CPU]


def peak(run: Callable[[], None]) -> int:
    with Live() as live:
        run()
    return live.peak


def test_live_tensors_are_counted() -> None:
    """By hand: at most two tensors exist at the same time. A view, an earlier tensor and a deleted
    one do not count.
    """
    before = torch.ones(1000)

    def run() -> None:
        a = before + 1  # 4000 bytes
        b = a[:10].view(2, 5)
        del a
        c = before.double()  # 8000
        del b
        before.add_(1)
        _ = c + 1  # c and its like: 16000

    assert peak(run) == 16000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    place = tmp_path_factory.mktemp("wide")
    return open_checkpoint(
        make_model(
            place,
            "llama",
            2,
            dtype=torch.bfloat16,
            tokenizer=False,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            **sizes,
        )
    )


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(0, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(0))
    cut = int(ROWS * (1 - HELD_OUT))
    return rows[:cut], rows[cut:]


def settings_of(name: str) -> Recipe:
    changes = dict(CLOSED[name])
    steps = changes.pop("steps")
    own = {key: changes.pop(key) for key in ("batch_rows", "selection") if key in changes}
    return recipe(steps, reconstruction=changes, **own)


def pruned(
    checkpoint: Checkpoint, name: str, length: int, storage: Storage, dtype: torch.dtype = torch.float32
) -> int:
    """The peak of a variant's pruning."""
    made, model = plan(settings_of(name), checkpoint.dtype), BlockModel(checkpoint, dtype, CPU)
    kept = {
        place: math.prod(checkpoint.matrix_shape(*place)) // 2 for place in checkpoint.architecture.places()
    }
    source = Source(model, [Transform()] * checkpoint.architecture.depth, kept)
    rows = Rows(*tokens(length), settings_of(name).batch_rows) if made.needs.text else None

    def run() -> None:
        for _, block in prune(source, rows, made, lambda _: None, storage):
            del block  # as the job does

    return peak(run)


def foretold(
    checkpoint: Checkpoint,
    name: str,
    length: int,
    budget: float = math.inf,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    made = plan(settings_of(name), checkpoint.dtype)
    return pruning(
        name,
        made,
        Shapes(checkpoint, ROWS, length, settings_of(name).batch_rows, made.window, dtype, HELD_OUT),
        budget,
    )


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("name", list(CLOSED))
def test_pruning_holds_what_is_foretold(checkpoint: Checkpoint, name: str, length: int) -> None:
    """With short rows weights and solver outweigh activations, with long ones activations and
    streams outweigh them.
    """
    assert foretold(checkpoint, name, length).gpu_bytes == pytest.approx(
        pruned(checkpoint, name, length, Storage()), rel=NEAR
    )


def test_an_mlp_without_a_gate_holds_what_is_foretold(tmp_path: Path) -> None:
    sizes = {"hidden_size": WIDTH, "ffn_dim": 2048, "num_attention_heads": 8, "word_embed_proj_dim": WIDTH}
    made = make_model(
        tmp_path,
        "opt",
        2,
        dtype=torch.bfloat16,
        tokenizer=False,
        vocab_size=VOCABULARY,
        max_position_embeddings=514,
        **sizes,
    )
    opt = open_checkpoint(made)
    assert foretold(opt, "sparsegpt", 256).gpu_bytes == pytest.approx(
        pruned(opt, "sparsegpt", 256, Storage()), rel=NEAR
    )


def test_pruning_in_bfloat16_holds_what_is_foretold(checkpoint: Checkpoint) -> None:
    found = pruned(checkpoint, "sparsegpt", 512, Storage(), torch.bfloat16)
    assert foretold(checkpoint, "sparsegpt", 512, dtype=torch.bfloat16).gpu_bytes == pytest.approx(
        found, rel=NEAR
    )


def test_streams_beyond_their_budget_are_not_held(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all but a few batches are in files, as with a GPU they are in host memory. Batches that
    are read count.
    """
    monkeypatch.setattr(
        places, "load_file", lambda file: {name: tensor.clone() for name, tensor in load_file(file).items()}
    )
    everything = foretold(checkpoint, "best", 512).gpu_bytes
    found = pruned(checkpoint, "best", 512, Storage(0, 0, tmp_path))
    assert foretold(checkpoint, "best", 512, budget=0).gpu_bytes == pytest.approx(found, rel=NEAR)
    assert found < everything - 3 * 4 * 6 * 512 * WIDTH


@pytest.mark.parametrize("length", [64, 512])
def test_calibrating_holds_what_is_foretold(checkpoint: Checkpoint, length: int) -> None:
    model, params = (
        BlockModel(checkpoint, torch.float32, CPU),
        CalibrateParams(batch_rows=16, median_tokens=MEDIAN),
    )

    def run() -> None:
        for _, sites in walk(model, *tokens(length), params, grams=True):
            del sites

    shapes = Shapes(checkpoint, ROWS, length, 16, held_out=HELD_OUT)
    assert device.calibrating(shapes, params, math.inf) == pytest.approx(peak(run), rel=NEAR)


def asked(checkpoint: Checkpoint, rows: torch.Tensor) -> Subject:
    """All matrices."""
    entry = checkpoint.architecture
    matrices = {
        index: {entry.matrix_name(index, m): m for m in entry.layouts[index].matrices}
        for index in range(entry.depth)
    }
    return Subject(BlockModel(checkpoint, torch.float32, CPU), rows, matrices)


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize(
    ("estimator", "moments"),
    [("fisher", "full"), ("fisher", "none"), ("hutchinson", "none"), ("hutchinson", "full")],
)
def test_probing_holds_what_is_foretold(
    checkpoint: Checkpoint, tmp_path: Path, estimator: str, moments: str, length: int
) -> None:
    changes = {"estimator": estimator, "output_moments": moments, "probes": 8, "probes_per_pass": 8}
    params = SensitivityParams.model_validate(SHIPPED["sensitivity"] | changes)
    subject = asked(checkpoint, tokens(length)[0])
    sums = fisher.OutputMoments(tmp_path, True) if moments == "full" else None

    def run() -> None:
        if estimator == "fisher" or sums is not None:
            fisher.samples(subject, params, range(8), sums)
        if estimator == "hutchinson":
            hutchinson.samples(subject, params, range(8))

    shapes = Shapes(checkpoint, ROWS, length, 16, held_out=HELD_OUT)
    work = Work(shapes, HELD_OUT, torch.float32, CalibrateParams(batch_rows=16, median_tokens=MEDIAN), params)
    assert estimate(work)["sensitivity"].gpu_bytes == pytest.approx(peak(run), rel=NEAR)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("length", [64, 512])
def test_a_graph_keeps_what_is_foretold(checkpoint: Checkpoint, length: int, bfloat16: bool) -> None:
    """Oracle: what autograd saves for the backward pass, weights in float32 aside."""
    model = BlockModel(checkpoint, torch.float32, CPU)
    model.embed(tokens(length)[0][:2], [2])
    weights = {name: tensor.float().requires_grad_() for name, tensor in checkpoint.block(0).items()}
    hidden = torch.randn(2, length, WIDTH, requires_grad=True)
    given = {tensor.untyped_storage()._cdata for tensor in (hidden, *weights.values())}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        _ = model.call(model.templates[0], 0, hidden, weights)
    assert Shapes(checkpoint, 2, length, 2).graph(2, bfloat16) == pytest.approx(sum(saved.values()), rel=NEAR)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_probing_holds_the_inputs_of_its_own_probes(tmp_path: Path, processes: int) -> None:
    """Of 32 blocks, which are most of it. The first of several processes has the probes of its lanes."""
    checkpoint = open_checkpoint(make_model(tmp_path / "deep", "llama", 32))
    changes = {"probes": 16, "probes_per_pass": 16, "output_moments": "none"}
    params = SensitivityParams.model_validate(SHIPPED["sensitivity"] | changes)
    rows = torch.arange(32 * 64).view(32, 64) % checkpoint.vocabulary
    subject = asked(checkpoint, rows)
    own = [probe for probe in range(16) if probe % LANES < LANES // processes]
    shapes = Shapes(checkpoint, 32, 64, 16, processes=processes)
    expected = device.probing(shapes, params, 0)
    assert expected == pytest.approx(peak(lambda: fisher.samples(subject, params, own)), rel=NEAR)


@pytest.mark.parametrize("batch_rows", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluating_holds_what_is_foretold(checkpoint: Checkpoint, dtype: str, batch_rows: int) -> None:
    """The weights, which are loaded where no operator is seen, and all that comes with a batch."""
    model = load_model(checkpoint.path, dtype, CPU)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = peak(lambda: print(perplexity(model, tokens(512)[0], batch_rows)))
    params = EvaluateParams.model_validate(
        SHIPPED["evaluate"] | {"compute_dtype": dtype, "batch_rows": batch_rows}
    )
    assert evaluating(checkpoint, params, [(ROWS, 512)]).gpu_bytes == pytest.approx(weights + found, rel=NEAR)
    dense = Dense(checkpoint, getattr(torch, dtype), CPU)
    rows = tokens(512)[0]
    compared = peak(
        lambda: perplexity(model, rows, batch_rows, see=Divergence(dense.logits(rows, batch_rows), False).add)
    )
    assert evaluating(checkpoint, params, [(ROWS, 512)], compared=True).gpu_bytes == pytest.approx(
        weights + compared, rel=NEAR
    )
