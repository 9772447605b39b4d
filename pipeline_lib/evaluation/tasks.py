"""Zero- and few-shot tasks by lm-eval, on a model in memory: local YAML tasks, or any of lm-eval's own
by name.
"""

import copy
import io
import logging
import math
import os
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core import ranks
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Progress
from pipeline_lib.evaluation.metrics import METRICS, ordered
from pipeline_lib.evaluation.settings import Preset, TasksParams
from pipeline_lib.models.start import usual

if TYPE_CHECKING:
    from lm_eval.api.task import Task, TaskConfig
    from lm_eval.tasks import TaskManager

# warnings about truncation, which is counted item by item
CUT = ("Combined length of context", "Left truncation applied")
FILE_FORMATS = {"csv", "json", "parquet", "text"}  # dataset_path of tasks that read files


@dataclass(frozen=True)
class Measured:
    """Results of a run of tasks, and the warnings of lm-eval, datasets and Python."""

    tasks: dict[str, dict[str, Any]]
    warnings: Mapping[str, int]  # message -> how often
    # task -> metric of single items (acc, acc_norm) -> the items' values, in order
    scores: Mapping[str, Mapping[str, list[float]]]


class Unread(SparselineError):
    """The data of tasks cannot be read (here, or now)."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    params: TasksParams,
    preset: Preset,
    what: str = "tasks",
) -> Measured:
    """Results of each task: ``{name: {"metrics", "chance", "items", "of", "truncated"}}``, sorted by
    name; a group or tag gives its members.

    ``metrics`` has the task's metrics that are in ``METRICS``, by name: ``value``, and its standard
    error ``stderr`` (None if lm-eval gives none). ``chance`` is the accuracy by chance, in [0, 1]
    (None if unknown). ``items`` were measured ``of`` those that the task has. lm-eval cuts off the
    beginning of ``truncated`` items, which do not fit into the model's context window. Nothing that
    depends on date or host is kept. Tasks that read files use neither the network nor the user's
    datasets cache. Like lm-eval, it seeds the global generators of Python, numpy and torch.
    ``what`` is the name for progress.

    Raises:
        SparselineError: a task does not exist or has no supported metric. Its data cannot be read,
            or are not below ``params.path``. An item has no answer: its continuation does not fit
            into the window, or its likelihood is NaN or infinite. There are fewer than two items. A
            chat has no template.
    """
    if not preset.names:
        return Measured({}, {}, {})
    chats = _chats(tokenizer, preset)
    from lm_eval.evaluator import evaluate  # imported here: seconds, needed by no other module
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Watched(HFLM):  # type: ignore[misc]
        """lm-eval's model, which counts the requests that lm-eval cuts, and refuses answers that
        are not finite. Its own progress bar is suppressed (``_listening``).

        If the family's rows begin with the start token, so does every request. If several processes
        run the stage, each computes some of lm-eval's batches. So every batch is the one that a
        single process makes.
        """

        def __init__(self) -> None:
            self.cut: set[int] = set()  # id() of requests
            self.calls = 0  # calls of the model for the current requests
            self.asked: Sequence[Any] = ()  # requests that are being answered, if lm-eval may cut them
            own = copy.deepcopy(tokenizer)  # HFLM gives it a padding token
            super().__init__(
                pretrained=model, tokenizer=own, batch_size=params.batch_rows, softmax_dtype="float32"
            )

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            tokens: list[int] = super().tok_encode(string, add_special_tokens, **options)
            bare = begins and add_special_tokens is not False and tokens[:1] != [self.prefix_token_id]
            return [self.prefix_token_id, *tokens] if bare else tokens

        def loglikelihood(self, requests: Any, **options: Any) -> Any:
            self.asked = requests
            found = super().loglikelihood(requests, **options)
            self.asked = ()  # a rolling likelihood is taken window by window, and nothing is cut
            return found

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            for request, (_, context, continuation) in zip(self.asked, requests, strict=bool(self.asked)):
                if len(continuation) > self.max_length:
                    raise SparselineError(
                        f"The task {request.task_name} has a continuation of {len(continuation)} tokens, more"
                        f" than the model's context window of {self.max_length}; leave the task out."
                    )
                if len(context) + len(continuation) > self.max_length + 1:
                    self.cut.add(id(request))
            self.calls = 0
            with Progress(what, len(requests), "requests", stream=stream) as self.progress:
                found = _merged(ranks.gathered(super()._loglikelihood_tokens(requests, **options)))
            if not all(math.isfinite(likelihood) for likelihood, _ in found):
                raise SparselineError(
                    f"The model's log-likelihoods of {what} are NaN or infinite: so are its weights, or"
                    f" it overflows in {model.dtype}; prune less, or set tasks.compute_dtype to float32."
                )
            return found

        def generate_until(self, requests: Any, **options: Any) -> Any:
            for request in requests:
                context, how = request.args
                room = self.max_length - int(normalize_gen_kwargs(how, self.max_gen_toks)["max_gen_toks"])
                if room <= 0:
                    raise SparselineError(
                        f"The task {request.task_name} generates more tokens than the model's window of"
                        f" {self.max_length} holds; leave the task out."
                    )
                if len(self.tok_encode(context)) > room:
                    self.cut.add(id(request))
            with Progress(what, len(requests), "requests", stream=stream) as self.progress:
                return super().generate_until(requests, **options)

        def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
            generated: torch.Tensor = super()._model_generate(context, **options)
            self.progress.advance(len(context))
            return generated

        def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
            self.progress.advance(len(inps))
            self.calls += 1
            if self.calls % ranks.count() != ranks.rank():  # another process computes it, see ``_merged``
                size = model.config.get_text_config().vocab_size
                return torch.full((1, 1, 1), torch.nan, device=inps.device).expand(*inps.shape, size)
            logits: torch.Tensor = super()._model_call(inps, **options)
            return logits

    stream = sys.stderr
    begins = usual(model.config.model_type) == "row"
    _check_includes(params.path)
    with _listening():  # its only message is that it did not load the model itself
        lm = Watched()
    with _listening() as heard:
        manager = _manager(params.path, preset.names)
        random.seed(preset.seed)
        np.random.seed(preset.seed)  # noqa: NPY002 - the generator that tasks' own code draws from
        torch.manual_seed(preset.seed)
        with _one_process(), _datasets(private=all(_reads_files(manager, name) for name in preset.names)):
            tasks = _load(manager, preset, params.path)
            # the standard error of a mean has a formula, but with 0 bootstrap_iters lm-eval leaves it out
            how: dict[str, Any] = {
                "limit": preset.limit,
                "bootstrap_iters": 100,
                "log_samples": True,
                "system_instruction": preset.system,
            }
            results = evaluate(
                lm, {"tasks": tasks}, apply_chat_template=chats, fewshot_as_multiturn=chats, **how
            )
            assert results is not None
            chances = {name: chance(task) for name, task in tasks.items()}
    flat: dict[str, dict[str, Any]] = {}
    for name, found in sorted(results["results"].items()):
        metrics, items = _figures(found), int(found["sample_len"])
        wrong = {
            figure: one["value"] for figure, one in metrics.items() if not math.isfinite(one["value"] or 0)
        }
        if items < 2 or wrong:
            shown = wrong or {figure: one["value"] for figure, one in metrics.items()}
            told = ", ".join(f"{figure} {value}" for figure, value in shown.items())
            raise SparselineError(
                f"The task {name} gives {told} on {items} items; a result needs two, and must be a number."
            )
        flat[name] = {
            "metrics": metrics,
            "chance": chances[name],
            "items": items,
            "of": len(tasks[name].eval_docs),
            "truncated": len({request.doc_id for request in tasks[name].instances if id(request) in lm.cut}),
        }
    return Measured(flat, heard, {name: _scores(items) for name, items in results["samples"].items()})


def _merged(parts: Sequence[Sequence[tuple[float, bool]]]) -> list[tuple[float, bool]]:
    """Each request's likelihood from the process that computed it. The other processes have NaN in
    its place.
    """
    return [
        next((one for one in found if not math.isnan(one[0])), found[0]) for found in zip(*parts, strict=True)
    ]


def _scores(items: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each metric's values of all items, in order. If a task filters answers in several ways, only
    the first filter counts.
    """
    ordered = sorted(
        (item for item in items if item["filter"] == items[0]["filter"]), key=lambda item: item["doc_id"]
    )
    return {
        metric: [float(item[metric]) for item in ordered]
        for metric in ("acc", "acc_norm")
        if all(metric in item for item in ordered)
    }


def _figures(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The supported metrics in lm-eval's results of a task (``{"acc,none": …, "acc_stderr,none":
    …}``), by metric and, if it is not "none", filter.
    """
    figures: dict[str, dict[str, float | None]] = {}
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if name in METRICS:
            error = found.get(f"{name}_stderr,{kind}")
            stderr = (
                float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            )  # lm-eval has "N/A" where it knows none
            figures[name if kind == "none" else f"{name}, {kind}"] = {"value": float(value), "stderr": stderr}
    return {name: figures[name] for name in ordered(figures)}


def _chats(tokenizer: PreTrainedTokenizerBase, preset: Preset) -> bool:
    """Whether prompts are chats.

    Raises:
        SparselineError: the preset asks for chats, and the model has no template.
    """
    if preset.chat_template and not tokenizer.chat_template:
        raise SparselineError(
            f"The preset of {', '.join(preset.names)} has chat_template: true, but the model's tokenizer has"
            " no chat template; set it to false."
        )
    return preset.chat_template


def request_lengths(tokenizer: PreTrainedTokenizerBase, path: Path, preset: Preset) -> list[int]:
    """Tokens of every request of a preset, context and continuation together, the longest first.

    Nothing is fetched.

    Raises:
        SparselineError: as ``run_tasks``, of the tasks.
        Unread: a task's data is not on this machine.
    """
    if not preset.names:
        return []
    with _listening():  # the run itself reports the warnings
        manager = _manager(path, preset.names)
        with _datasets(private=all(_reads_files(manager, name) for name in preset.names), offline=True):
            lengths: list[int] = []
            chats = _chats(tokenizer, preset)
            for task in _load(manager, preset, path).values():
                task.build_all_requests(
                    limit=preset.limit,
                    system_instruction=preset.system,
                    apply_chat_template=chats,
                    fewshot_as_multiturn=chats,
                    chat_template=partial(tokenizer.apply_chat_template, tokenize=False) if chats else None,
                )
                texts = [
                    "".join(part for part in request.args if isinstance(part, str))
                    for request in task.instances
                ]
                # with ``verbose`` it would warn of long texts, which the run counts
                lengths += [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return sorted(lengths, reverse=True)


def chance(task: "Task") -> float | None:
    """Accuracy by chance: the task's ``metadata.chance``, else the mean of 1 / number of choices, else
    None.
    """
    stated = (task.config.metadata or {}).get("chance")
    if stated is not None:
        return float(stated)
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = [1 / len(task.doc_to_choice(document)) for document in task.eval_docs]
    return sum(shares) / len(shares)


def _manager(path: Path, names: Sequence[str]) -> "TaskManager":
    """lm-eval's index of the local tasks. Its own tasks are included only if a name needs them,
    because their index takes seconds.
    """
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=str(path), include_defaults=False)
    if set(names) <= set(local.all_tasks):
        return local
    manager = TaskManager(include_path=str(path), include_defaults=True)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        here = ", ".join(local.all_tasks) or "none"
        raise SparselineError(
            f"No task is called {unknown[0]!r}; local tasks in {path} are: {here}; the others are lm-eval's."
        )
    return manager


def _reads_files(manager: "TaskManager", name: str) -> bool:
    return (manager.task_index[name].cfg or {}).get("dataset_path") in FILE_FORMATS


def _check_includes(folder: Path) -> None:
    """Check that definitions in the folder include no files from outside, which DVC would not watch."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.glob("**/*.yaml")):
        try:
            found = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
        except Exception:  # lm-eval passes over such files, too
            continue
        for name in found if isinstance(found, list) else [found]:
            _check_watched(folder, path.resolve().parent / str(name), f"{path}: include: {name}")


def _check_data(folder: Path, name: str, config: "TaskConfig") -> None:
    """Check that a local task's data are in the folder, or in a dataset of the hub.

    Raises:
        SparselineError: a file, directory or address elsewhere, which DVC would not watch.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS

    dataset, options = str(config.dataset_path or ""), config.dataset_kwargs or {}
    files = options.get("data_files") or []
    named = [
        one
        for value in (files.values() if isinstance(files, dict) else [files])
        for one in ([value] if isinstance(value, str) else value)
    ]
    if dataset in READERS:
        local = [*named, *filter(None, [options.get("data_dir")])]
    else:
        local = [one for one in named if "://" in one or one.startswith("/")]
        local += [dataset] if Path(dataset).exists() else []
    for one in local:
        if "://" in one:
            raise SparselineError(
                f"The task {name} reads {one}, which may change under cached results; copy the file into"
                f" {folder}."
            )
        _check_watched(folder, Path(one), f"The task {name} reads {one}")


def _check_watched(folder: Path, path: Path, what: str) -> None:
    """Check that DVC watches a path: it is in the folder, and is not a link to a directory. A link
    to a file is watched.
    """
    place = path.parent.resolve() / path.name
    if not place.is_relative_to(folder.resolve()) or (place.is_dir() and place.is_symlink()):
        raise SparselineError(
            f"{what}, which is outside {folder} (tasks.path), where DVC does not watch; copy it there."
        )


def _load(manager: "TaskManager", preset: Preset, folder: Path) -> dict[str, "Task"]:
    from datasets.exceptions import DatasetsError

    try:
        tasks: dict[str, Task] = manager.load(preset.names)["tasks"]
    except (OSError, KeyError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unread(f"The data of tasks {', '.join(preset.names)} cannot be read: {reason}") from error
    for name, task in tasks.items():
        defined = manager.task_index[name].yaml_path if name in manager.task_index else None
        if defined is None or defined.resolve().is_relative_to(folder.resolve()):
            _check_data(folder, name, task.config)
        if not (task.has_test_docs() or task.has_validation_docs()) or len(task.eval_docs) < 2:
            raise SparselineError(
                f"The task {name} has fewer than two items to measure; a standard error needs two."
            )
        if not METRICS.keys() & task.aggregation().keys():
            only = ", ".join(task.aggregation())
            raise SparselineError(
                f"The task {name} has no supported metric, only: {only}; supported are: {', '.join(METRICS)}."
            )
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", preset.shots)
        task.set_fewshot_seed(preset.seed)
    return tasks


@contextmanager
def _one_process() -> Iterator[None]:
    """Let lm-eval resample for some standard errors in this process, not in a pool of processes."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _datasets(private: bool, offline: bool = False) -> Iterator[None]:
    """Set the options of ``datasets``. ``private``: a cache of our own that lasts as long as the
    run (so it cannot be stale), and no network. ``offline``: no network.
    """
    import datasets

    config = datasets.config
    kept = config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE
    with tempfile.TemporaryDirectory(prefix="sparseline-tasks-", ignore_cleanup_errors=True) as folder:
        if private:
            config.HF_DATASETS_CACHE = Path(folder)
        config.HF_HUB_OFFLINE = private or offline or kept[1]
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE = kept


class _Heard(logging.Handler):
    """Counts warnings by their text, in which every number counts as the same."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())

    def hear(self, message: str) -> None:
        text = re.sub(r"\d+", "…", " ".join(message.split()))
        if not text.startswith(CUT):
            self.said[text] += 1


@contextmanager
def _listening() -> Iterator[Mapping[str, int]]:
    """Suppress progress bars and lm-eval's output, because ours says the same. Warnings are counted
    instead of printed once per item; errors are exceptions.
    """
    handler = _Heard()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    kept = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.handlers, logger.propagate = [handler], False
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            redirect_stderr(io.StringIO()),
            redirect_stdout(io.StringIO()),
        ):
            yield handler.said
        for warning in caught:
            handler.hear(f"{warning.category.__name__}: {warning.message}")
    finally:
        for logger, (level, handlers, propagate) in zip(loggers, kept, strict=True):
            logger.setLevel(level)
            logger.handlers, logger.propagate = handlers, propagate
