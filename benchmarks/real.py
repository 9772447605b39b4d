"""A real language model: ``python -m benchmarks.real run|table|verify``, one record for all tables,
``results/real.json``.

The model is SmolLM2-135M-Instruct as ``../shared/testbed/real/convert.py`` writes it, in the
directory SPARSELINE_REAL, by default ``../real/smol``. The *real protocol* of
``../shared/testbed/real/README.md`` applies. Calibration takes 128 rows of 512 tokens of C4's first
900 pages. Of the other rows, ``best`` trains each block on 384 more, and distilled models train on
760. Choices are made on C4's last 100 pages and on ``mix.valid``, 32 rows of 512 tokens each. Most
levers are tried on the first ten blocks, or, for distillation, on fewer rows. Results are reported
on ``wikitext2.test`` and ``mix.test``, 32 rows of 1,024 tokens each, on every device. The nine
tasks have 300 items each.

``run`` computes what the record lacks, cell by cell. Each cell is recorded (with ``--commit`` also
in git) as soon as it is done. A cell that is named by ``--cell`` is computed again; ``verify``
computes recorded cells again and compares. Costs run from model in memory to pruned, in a process
of its own. Those of a distilled model include those of the pruned model that it starts from.

With ``SPARSELINE_TASKS=later``, cells are recorded without tasks, which take as long as pruning. A
run without it adds them, and prunes nothing again.
"""

import functools
import hashlib
import json
import math
import os
import shutil
import statistics as stats
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.alone import Meter, alone, cost, summed
from benchmarks.block import place
from benchmarks.harness import (
    EIGHT_EPOCHS,
    MORE,
    PATTERNS,
    ROOT,
    UNIFORM,
    Cell,
    Record,
    Study,
    commands,
    selection,
)
from benchmarks.lab import Changes, Entries, Lab, section
from benchmarks.rivals import BLOCKWISE, LLMCOMPRESSOR, VERSION_1, compressed
from benchmarks.studies import ALLOCATIONS, BASES
from benchmarks.testbed import RANDOM, Bed, Tensors
from benchmarks.testbed import ROOT as TESTBED
from pipeline_lib.core import code, params
from pipeline_lib.core.artifacts import write_json, write_tensors
from pipeline_lib.core.files import sha256
from pipeline_lib.core.params import merge
from pipeline_lib.core.products import bfloat16_is_faster
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.evaluation.settings import Preset, TasksParams
from pipeline_lib.evaluation.tasks import run_tasks
from pipeline_lib.fit.distil import Trained, held_out_divergence, storage_of, train, training_data
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.models.start import Start, start
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.models.whole import load_model
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.texts.own import Author
from pipeline_lib.texts.prompts import prompts
from pipeline_lib.texts.rows import encode, rows_of
from pipeline_lib.texts.texts import GeneratedParams, TextParams, Texts

MODEL = Path(os.environ.get("SPARSELINE_REAL", ROOT.parent / "real" / "smol"))
NAME = "SmolLM2-135M-Instruct"
DATA = TESTBED / "real"
C4, LENGTH, HELD_BACK = "c4.calib", 512, 100  # pages of C4 that nothing is calibrated on
# rows, tokens
REPORTED, CHOSEN = (
    {"wikitext2.test": (32, 1024), "mix.test": (32, 1024)},
    {"c4.valid": (32, 512), "mix.valid": (32, 512)},
)
NINE = (
    "arc_easy",
    "arc_challenge",
    "piqa",
    "hellaswag",
    "winogrande",
    "openbookqa",
    "sciq",
    "copa",
    "lambada_openai",
)
TASKS = Preset(
    names=[f"real_{name}" for name in NINE], limit=300, shots=0, seed=0, chat_template=False, system=None
)
LATER = os.environ.get("SPARSELINE_TASKS") == "later"  # tasks take as long as a pruning
BATCH_ROWS = 8  # of evaluations
TABLES = ("main", "induction", "sparsity", "ablation")
# The model's own text: its continuations of the beginnings of C4 pages
GENERATED = "generated"
OWN = {
    "prompts": "files",
    "prompt_tokens": 16,
    "new_tokens": 496,
    "temperature": 1.0,
    "batch_rows": 64,
    "seed": 0,
}
# how documents are cut into rows
CUT: Changes = {"packing": "concatenate", "chat_template": False, "distinct": 1, "training": 0}
MASK = "mask:"  # before a parameter's name, in the files of a pruned block
MEASURES = ("calibrate", "sensitivity", "curves")  # stages that allocations read
# stages whose code determines a pruned model
CODE = (*MEASURES, "allocate", "induce", "prune")


@dataclass(frozen=True)
class Method:
    """A variant of params.yaml (none for llm-compressor's and the dense model), and the changes to
    it.
    """

    variant: str | None
    changes: Changes = field(default_factory=dict)
    distil: Changes | None = None  # laid over section `distil`; None: no distillation
    rows: int = 128
    source: str = C4  # of calibration rows; `name:length` for another length
    training: int = 0  # more rows, which only train blocks and models
    depth: int | None = None  # prune so many of the first blocks; None: all


TRAINING = 760  # as in params.yaml
MAIN = {
    "dense": Method(None),
    **{name: Method(name) for name in ("magnitude", "wanda", "sparsegpt", "papers", "fast")},
    "best": Method("best", training=TRAINING),
    "distilled": Method("best", distil={}, training=TRAINING),
    "sparsegpt+distil": Method("sparsegpt", distil={}, training=TRAINING),
    **{name: Method(None) for name in LLMCOMPRESSOR},
}
STARTS = {how.variant for how in MAIN.values() if how.distil is not None}  # of distilled models
SEEDED = ("sparsegpt", "fast", "best")  # three seeds at 50%
TASKED = ("dense", "sparsegpt", "fast", "best", "distilled")  # at 50% and 2:4
INDUCED = " + induction"
INDUCTION = {name: Method(None, changes) for name, changes in BASES.items()} | {
    f"{name}{INDUCED}": Method(
        None,
        merge(
            changes,
            {
                "induce": {},
                "reconstruction": {"steps": [*changes["reconstruction"]["steps"], "finetune_channels"]},
            },
        ),
    )
    for name, changes in BASES.items()
}
SPARSITY = {
    name: Method("sparsegpt", {"allocation": ALLOCATIONS[name]})
    for name in ("uniform", "weight", "layer", "predicted")
}
# Levers are tried one at a time, on validation texts at 50%: those of `fast` and `best` on the first
# blocks (the others stay dense), and those of distillation on 192 rows in all.
FIRST = 10
FEW = 96


def _first(variant: str, levers: Mapping[str, Method]) -> dict[str, Method]:
    """A variant on the first blocks, as it is and with each lever."""
    plain = replace(MAIN[variant], depth=FIRST)
    return {f"{variant}, first {FIRST} blocks": plain} | {
        f"{variant}, first {FIRST} blocks, {name}": replace(how, variant=variant, depth=FIRST)
        for name, how in levers.items()
    }


def _finetuned(changes: Changes) -> Method:
    return Method(None, {"reconstruction": {"finetune": changes}}, training=TRAINING)


def _distilled(levers: Mapping[str, Changes]) -> dict[str, Method]:
    return {
        f"sparsegpt+distil, {name}": Method("sparsegpt", distil=changes, training=FEW)
        for name, changes in levers.items()
    }


ABLATION = {
    "sparsegpt": MAIN["sparsegpt"],
    "fast": MAIN["fast"],
    "fast, uniform": Method("fast", UNIFORM),
    "fast, as in version 1": Method("fast", VERSION_1),
    "best": MAIN["best"],
    **_first("sparsegpt", {}),
    **_first(
        "fast",
        {
            "uniform": Method(None, UNIFORM),
            "Algorithm 1": Method(None, {"allocation": VERSION_1["allocation"]}),
            "statistics per block": Method(None, {"reconstruction": BLOCKWISE}),
            "as in version 1": Method(None, VERSION_1),
            "pruned stream": Method(None, {"reconstruction": {"dense_target": 0.0}}),
            "dense stream": Method(None, {"reconstruction": {"dense_target": 1.0}}),
            "damping 0.001": Method(None, {"selection": {"damping": 0.001}}),
            "damping 0.1": Method(None, {"selection": {"damping": 0.1}}),
            "damping of each diagonal entry": Method(None, {"selection": {"damping_of": "diagonal"}}),
            "alpha 0.05": Method(None, {"allocation": {"alpha": 0.05}}),
            "densities 0.35 to 0.75": Method(None, {"allocation": {"density_bounds": [0.35, 0.75]}}),
            "sweep's mask": Method(None, {"reconstruction": {"lsq": {"mask_iterations": 0}}}),
            "256 rows": Method(None, rows=256),
            "64 rows of 1,024": Method(None, rows=64, source=f"{C4}:1024"),
            "mix.calib": Method(None, source="mix.calib"),
            "WikiText-2": Method(None, source="wikitext2.train-part"),
            "random tokens": Method(None, source=RANDOM),
        },
    ),
    **_first(
        "best",
        {
            "no more rows, 8 epochs": Method(None, EIGHT_EPOCHS),
            "rate 0.005": _finetuned({"rate": 0.005}),
            "4 epochs": _finetuned({"epochs": 4}),
            "windows of 2": _finetuned({"window": 2}),
        },
    ),
    **_distilled(
        {
            f"{FEW + 96} rows": {},
            "rate 0.0005": {"rate": 0.0005},
            "rate 0.002": {"rate": 0.002},
            "2 epochs": {"epochs": 2},
            "batches of 8": {"batch_rows": 8},
            "norms only": {"parts": ["norms"]},
            "states in bfloat16": {"state_dtype": "bfloat16"},
        }
    ),
    "sparsegpt+distil, no more rows, 2 epochs": Method("sparsegpt", distil={"epochs": 2}),
}
METHODS = {"main": MAIN, "induction": INDUCTION, "sparsity": SPARSITY, "ablation": ABLATION}


def texts(table: str) -> Mapping[str, tuple[int, int]]:
    """The texts of a table's perplexities: name -> rows, tokens."""
    return CHOSEN if table == "ablation" else REPORTED


class Real(Bed):
    """The model and its texts; evaluations are on the device too."""

    def __init__(self, length: int = LENGTH) -> None:
        if not MODEL.is_dir():
            raise click.ClickException(
                f"no model at {MODEL}; make it with {DATA / 'convert.py'}, or set SPARSELINE_REAL to its"
                " directory."
            )
        super().__init__(MODEL, length)

    @functools.cached_property
    def whole(self) -> PreTrainedModel:
        return load_model(self.path, "float32", self.device)

    def rows(self, source: str, count: int, seed: int | None = None) -> torch.Tensor:
        """Token rows [count, length], drawn with the seed; without a seed, the first ones."""
        if source == RANDOM:
            return super().rows(source, count, seed)
        asked = {"rows": count, "length": self.length, "seed": seed}
        cut = TextParams.model_construct(None, path=Path(source), **asked, **CUT)
        documents = self.written() if source == GENERATED else encode(self.tokenizer, _documents(source))
        return rows_of(documents, cut, self.begins)

    def evaluated(self, text: str) -> torch.Tensor:
        """The token rows of a text's perplexity."""
        count, length = (REPORTED | CHOSEN)[text]
        return Real(length).rows(text, count)

    @torch.no_grad()
    def perplexity(
        self, blocks: Tensors, text: str, see: Callable[[torch.Tensor], None] | None = None
    ) -> float:
        """Perplexity of the model with these tensors in the place of its own. ``see`` receives each
        row's logits.
        """
        put(self.whole, self, blocks)
        return perplexity(self.whole, self.evaluated(text), BATCH_ROWS, see=see)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, self.checkpoint.vocabulary)

    @functools.cached_property
    def begins(self) -> Start:
        return start(None, self.checkpoint.config.model_type, self.tokenizer)

    def written(self) -> list[list[int]]:
        """Documents that the model wrote, enough for the calibration rows. They are written once,
        and kept below ``results/cells`` as long as neither model, prompts nor code change.
        """
        rows = Method(None).rows
        how = GeneratedParams.model_validate(OWN)
        files = [self.path / "model.safetensors", _file(C4)]
        said = [how.model_dump(), rows, self.length, *map(sha256, files), code.digest("generate")]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]
        kept = STUDY.home / "cells" / f"{GENERATED}-{digest}.json"
        if not kept.exists():
            cut = TextParams.model_construct(
                None, path=_file(C4), generated=how, rows=rows, length=self.length, **CUT
            )
            author = Author(load_model(self.path, "float32", self.device), self.tokenizer, self.begins)
            given = prompts(self.tokenizer, Texts(_documents(C4), [], [], {}), cut, how, self.length)
            write_json(kept, author.documents(given, cut, how, lambda _: None))
        found: list[list[int]] = json.loads(kept.read_text(encoding="utf-8"))
        return found


def _device(bed: Bed) -> str:
    """The device of a cell's costs. A CPU without bfloat16 takes longer for fits and mask searches."""
    slow = bed.device.type == "cpu" and not bfloat16_is_faster()
    return place(bed.device) + " without bfloat16" * slow


def put(model: PreTrainedModel, bed: Bed, blocks: Tensors) -> None:
    """Put these blocks into a whole model, and its own where there are none."""
    base = model.base_model.get_submodule(bed.checkpoint.architecture.blocks)
    for index in range(bed.checkpoint.architecture.depth):
        base.get_submodule(str(index)).load_state_dict(
            blocks.get(index) or bed.checkpoint.block(index), strict=False
        )


def _file(source: str) -> Path:
    """The file of a text, or of the pages that it continues."""
    if source in (C4, "c4.valid", GENERATED):
        return DATA / "texts" / f"{C4}.jsonl"
    return (TESTBED if source.startswith("mix") else DATA) / "texts" / f"{source}.txt"


@functools.cache
def _documents(source: str) -> list[str]:
    text = _file(source).read_text(encoding="utf-8")
    if source in (C4, "c4.valid"):
        pages = [json.loads(line)["text"] for line in text.splitlines() if line]
        return pages[:-HELD_BACK] if source == C4 else pages[-HELD_BACK:]
    if source.startswith("mix"):
        return [document.strip("\n") for document in text.split("<|doc|>\n") if document.strip()]
    return [text]


def cell(table: str, method: str, pattern: str, seed: int) -> Cell:
    """The cell of a table. N:M is N:M in every matrix, as hardware needs it."""
    how = METHODS[table][method]
    key = {"table": table, "model": NAME, "method": method, "pattern": pattern, "seed": seed}
    plain = Cell(key, {}, how.variant, how.rows, how.source, how.training, how.depth)
    if method == "dense" or method in LLMCOMPRESSOR:
        return plain
    changes = merge(
        merge(how.changes, selection(pattern)),
        UNIFORM if (PATTERNS | MORE)[pattern][1] != "unstructured" else {},
    )
    return replace(plain, arms={"ppl": changes})


def cells() -> Iterator[Cell]:
    """All cells. Those that decide come first: one seed of every table, then the others."""
    yield cell("main", "dense", "50%", 0)
    for pattern in ("50%", "2:4", "60%", "70%"):
        yield from (cell("main", method, pattern, 0) for method in MAIN if method != "dense")
    yield from (cell("ablation", method, "50%", 0) for method in ABLATION)
    yield from (cell("induction", method, pattern, 0) for pattern in ("50%", "2:4") for method in INDUCTION)
    yield from (
        cell("sparsity", method, pattern, 0)
        for pattern in ("50%", "60%", "70%", "80%")
        for method in SPARSITY
    )
    yield from (cell("main", method, "50%", seed) for seed in (1, 2) for method in SEEDED)


# Pruning and training, each in a process of its own


def lab(asked: Cell) -> Lab:
    """The model on a cell's calibration rows."""
    source, _, length = asked.source.partition(":")
    bed = Real(int(length or LENGTH))
    return Lab(bed, asked.depth).at(source, asked.rows, asked.key.get("seed", 0), asked.training)


def prune(asked: Cell, out: Path) -> Record:
    """Prune by a cell's recipe, write a file per block with its masks, and return the cost.

    A run that was killed goes on after its last block. Its cost counts all runs, and so also what
    was computed twice.
    """
    here, how = lab(asked), asked.recipe("ppl")
    assert how is not None
    entries, before = measured(asked, here, how)
    kept, spent = here.counts(how, entries), out / "spent.json"
    if spent.exists():
        before = json.loads(spent.read_text(encoding="utf-8"))
    if how.induce is None:
        here.forget()  # stage prune does not hold the measurements of the allocation either
    meter = Meter(here.bed.device)

    def tell() -> Record:
        found = meter.read() if before is None else summed(before, meter.read())
        write_json(spent, found)
        return found

    def finished(index: int) -> Mapping[str, torch.Tensor] | None:
        file = out / f"{index}.safetensors"
        return _split(load_file(file))[0] if file.exists() else None

    for index, block in here.blocks(how, kept, finished):
        masks = {f"{MASK}{parameter}": mask for parameter, mask in block.masks.items()}
        write_tensors(out / f"{index}.safetensors", block.tensors | masks)
        tell()
    return tell()


def measured(asked: Cell, here: Lab, how: Recipe) -> tuple[Entries, Record | None]:
    """What the allocation of a cell reads, and its cost; nothing for a uniform one. Cells whose
    allocations read the same share a file below ``results/cells``; each counts the whole cost.
    """
    if how.allocation.method == "uniform":
        return {}, None
    said = [
        how.allocation.method,
        how.selection.model_copy(update={"sparsity": 0.5}).model_dump(mode="json"),
        how.reconstruction.steps,
        *(section(name) for name in MEASURES),
        *map(code.digest, MEASURES),
        *(asked.rows, asked.training, asked.source, asked.key.get("seed", 0), asked.depth),
        *map(sha256, inputs(asked)),
    ]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    kept = STUDY.home / "cells" / f"measured-{digest}.json"
    if not kept.exists():
        meter = Meter(here.bed.device)
        entries, _ = here.measured(how)
        write_json(kept, {"entries": entries, "cost": meter.read()})
    found = json.loads(kept.read_text(encoding="utf-8"))
    return found["entries"], found["cost"]


def distil(asked: Cell, start: Path, out: Path) -> Record:
    """Train the pruned blocks of a directory by a cell's method, and return the cost and the facts
    of the gate.
    """
    here, how = lab(asked), METHODS[asked.key["table"]][asked.key["method"]]
    settings = params.parse(DistilParams, merge(section("distil"), how.distil or {}), "distil")
    model, facts = here.bed.stream(), {}
    rows = {"fit": torch.cat([here.rows["fit"], here.rows["training"]]), "held_out": here.rows["held_out"]}

    def work() -> None:
        blocks = []
        for index, layout in enumerate(model.checkpoint.architecture.layouts):
            tensors, masks = _split(load_file(start / f"{index}.safetensors", device=str(model.device)))
            blocks.append(Trained(tensors, masks, layout, settings))
        given = training_data(model, rows, settings, storage_of(model, rows))
        before = held_out_divergence(given, lambda index: blocks[index].stored())
        curve = list(train(given, blocks, settings))
        after = held_out_divergence(given, lambda index: blocks[index].stored())
        facts.update(
            {"held_out_before": before, "held_out_after": after, "kept": after < before, "steps": len(curve)}
        )
        for index, block in enumerate(blocks):
            tensors = (
                block.stored() if after < before else _split(load_file(start / f"{index}.safetensors"))[0]
            )
            save_file(
                {parameter: tensor.cpu().contiguous() for parameter, tensor in tensors.items()},
                out / f"{index}.safetensors",
            )

    return cost(work, here.bed.device) | {"training": facts}


def _split(stored: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and masks of a block's file."""
    masks = {name.removeprefix(MASK): mask for name, mask in stored.items() if name.startswith(MASK)}
    return {name: tensor for name, tensor in stored.items() if not name.startswith(MASK)}, masks


def pruned(asked: Cell) -> tuple[Path, Record]:
    """The directory of a cell's pruned blocks, and its cost.

    They are kept below ``results/cells``, as long as neither recipe, inputs nor code change: a run
    that is killed costs one block, and distilled models start from them.
    """
    kept = place_of(asked)
    told = kept / "cost.json"
    if not told.exists():
        kept.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(alone(prune, asked, kept)), encoding="utf-8")  # written last
    found: Record = json.loads(told.read_text(encoding="utf-8"))
    return kept, found


def place_of(asked: Cell) -> Path:
    """Where the pruned blocks of a cell are kept."""
    digest = hashlib.sha256("".join(map(code.digest, CODE)).encode()).hexdigest()[:8]
    return STUDY.file(asked).with_suffix("").with_name(f"{STUDY.file(asked).stem}-{digest}")


def made(asked: Cell, folder: Path) -> tuple[Tensors, Record]:
    """The blocks that result from a cell's method, and their cost."""
    key, how = asked.key, METHODS[asked.key["table"]][asked.key["method"]]
    if key["method"] == "dense":
        return {}, {"wall_s": 0.0, "cpu_s": 0.0, "peak_bytes": 0, "peak_gpu_bytes": None}
    if key["method"] in LLMCOMPRESSOR:
        here = lab(asked)
        rows = torch.cat(list(here.rows.values()))
        blocks, told = compressed(
            here.bed, rows, (LLMCOMPRESSOR[key["method"]], *PATTERNS[key["pattern"]]), folder
        )
        return blocks, told | {
            "peak_bytes": told["peak_rss_bytes"],
            "peak_gpu_bytes": told.get("peak_gpu_bytes"),
        }
    if how.distil is None:
        directory, told = pruned(asked)
    else:
        begun, before = pruned(cell("main", str(how.variant), key["pattern"], key["seed"]))
        directory = folder / "trained"
        directory.mkdir()
        told = alone(distil, asked, begun, directory)
        told |= summed(before, told)
    return loaded(directory), told


def loaded(directory: Path) -> Tensors:
    """The pruned blocks of a directory."""
    return {int(file.stem): _split(load_file(file))[0] for file in directory.glob("*.safetensors")}


@functools.cache
def real() -> Real:
    return Real()


def measure(asked: Cell) -> list[Record]:
    """Measure a cell: a record per text."""
    bed, key = real(), asked.key
    with tempfile.TemporaryDirectory() as folder:
        blocks, told = made(asked, Path(folder))
    gpu = told.pop("peak_gpu_bytes", None)
    taken = {name: round(told[name], 1) for name in ("wall_s", "cpu_s")}
    more = taken | {"peak_bytes": int(gpu or told["peak_bytes"]), "device": _device(bed)}
    more |= {"training": told["training"]} if "training" in told else {}
    ppl = {text: bed.perplexity(blocks, text) for text in texts(key["table"])}
    found = tasks(bed, blocks) if tasked(key) and not LATER else None
    starts = key["table"] == "main" and key["method"] in STARTS
    if not starts and bool(found) == tasked(key):
        shutil.rmtree(place_of(asked), ignore_errors=True)
    return [
        {**key, "text": text, "ppl": value, "dense": bed.dense(text), "tasks": found, **more}
        for text, value in ppl.items()
    ]


def tasked(key: Mapping[str, Any]) -> bool:
    """Whether a cell, or a record of it, has tasks."""
    return bool(
        key["table"] == "main"
        and key["method"] in TASKED
        and key["pattern"] in ("50%", "2:4")
        and key["seed"] == 0
    )


def tasks(bed: Real, blocks: Tensors) -> Record:
    """Accuracies of the model with weights rounded to bfloat16: per task the metric (``acc_norm``
    where there is one), its value, and every item's score as a digit; their mean. Products are in
    float32, so that every processor gives these scores in a fair time.
    """
    model = load_model(bed.path, "bfloat16", bed.device)
    put(model, bed, blocks)
    model.float()
    how = TasksParams(path=DATA / "tasks", compute_dtype="float32", batch_rows=16)
    scores = run_tasks(model, bed.tokenizer, how, TASKS, "tasks").scores
    each: dict[str, Record] = {}
    for name, found in scores.items():
        metric = "acc_norm" if "acc_norm" in found else "acc"
        items = "".join(str(int(score)) for score in found[metric])
        each[name] = {"metric": metric, "value": stats.fmean(found[metric]), "items": items}
    return {
        "mean": stats.fmean(one["value"] for one in each.values()),
        "stderr": _error([one["items"] for one in each.values()]),
        "each": each,
    }


def _error(items: Sequence[Any]) -> float:
    """The standard error of the mean of task means, from each task's items (a text of digits, or
    numbers).
    """
    variances: list[float] = [stats.variance([float(score) for score in one]) / len(one) for one in items]
    return math.sqrt(sum(variances)) / len(variances)


# The record


def base(record: Record) -> Record:
    """The baseline of a record, which closes nothing of the gap in its table."""
    part = f", first {FIRST} blocks"
    method = {
        "induction": record["method"].removesuffix(INDUCED),
        "sparsity": "uniform",
        "ablation": f"sparsegpt{part}" if part in record["method"] else "sparsegpt",
    }
    return {"method": method.get(record["table"], "sparsegpt")}


def inputs(asked: Cell) -> list[Path]:
    """The files that a cell's pruned model depends on."""
    source = asked.source.partition(":")[0]
    return [MODEL / "model.safetensors", *([_file(source)] if source != RANDOM else [])]


STUDY = Study(
    "real",
    cells,
    measure,
    columns=("pattern",),
    base=base,
    whole=lambda record: bool(record["tasks"]) or not tasked(record),
    texts=(*REPORTED, *CHOSEN),
    beside=("cpu_s", "CPU s"),
    files=inputs,
)


def show(records: list[Record]) -> None:
    for table in TABLES:
        own = [record for record in records if record["table"] == table]
        for text in texts(table):
            if any(record["text"] == text for record in own):
                click.echo(f"\n{STUDY.table(own, text)}")
    click.echo(f"\n{task_table(records)}")


def task_table(records: Sequence[Record]) -> str:
    """Markdown table: the mean of nine tasks ± its standard error, and its distances from dense and
    from SparseGPT ± the standard error of the differences item by item.
    """
    known = {
        (r["pattern"], r["method"]): r["tasks"]
        for r in records
        if r["tasks"] and r["text"] == next(iter(REPORTED))
    }
    lines = ["| pattern, method | task mean, % | against dense | against SparseGPT |", "|---|---|---|---|"]
    for (pattern, method), found in known.items():
        beside = [_apart(found, known.get(other)) for other in (("50%", "dense"), (pattern, "sparsegpt"))]
        lines.append(f"| {pattern}, {method} | {task_mean(found)} | {' | '.join(beside)} |")
    return "\n".join(lines)


def task_mean(found: Record) -> str:
    """The task mean in percent ± its standard error."""
    return f"{100 * found['mean']:.2f} ± {100 * found['stderr']:.2f}"


def _apart(found: Record, other: Record | None) -> str:
    if other is None or other is found:
        return ""
    pairs = [(found["each"][name]["items"], other["each"][name]["items"]) for name in found["each"]]
    differences = [[int(a) - int(b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    return f"{100 * (found['mean'] - other['mean']):+.2f} ± {100 * _error(differences):.2f}"


main = commands(lambda: STUDY, show, __doc__)


if __name__ == "__main__":
    main()
