"""Zero- and few-shot tasks through lm-eval, on a model in memory: local YAML tasks, or any of lm-eval's own by name."""

import copy
import io
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params
from pipeline_lib.core.progress import Progress
from pipeline_lib.models.start import usual

if TYPE_CHECKING:
    from lm_eval.api.task import Task, TaskConfig
    from lm_eval.tasks import TaskManager

FILE_FORMATS = {"csv", "json", "parquet", "text"}  # dataset_path of tasks that read files


class TasksParams(Params):
    """Section ``tasks``: which presets are measured on which models, and how all of them are run."""

    path: Path  # folder of local task definitions (YAML, with the data beside them)
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    batch_rows: int = Field(ge=1)
    presets: list[str]  # of section `presets`
    variants: list[str]  # beside the dense model


class Preset(Params):
    """Section ``presets.<name>``: tasks that are measured together."""

    names: list[str]  # local tasks, or lm-eval's own, which need the network or a filled cache
    limit: int | None = Field(ge=2)  # items of each task; a standard error needs two
    shots: int = Field(ge=0)  # examples before each item; lm-eval keeps 0 for tasks that state it, as the embedded ones do
    seed: int  # choice of the examples


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: TasksParams, preset: Preset, what: str = "tasks"
) -> dict[str, dict[str, float | None]]:
    """Accuracy of each task: ``{name: {"acc", "stderr", "chance"}}``, all in [0, 1], sorted by name; a group or tag gives its members.

    ``stderr`` is the standard error of the mean, ``chance`` what guessing gives (None where it is not known). Nothing that depends
    on date or host is kept. Tasks that read files touch neither the network nor the user's datasets cache. Seeds Python's, numpy's
    and torch's global generators, as lm-eval does. Progress is told under the name ``what``.

    Raises:
        SparselineError: no such task, one that measures no accuracy, or one whose data cannot be read or are not below ``params.path``.
    """
    if not preset.names:
        return {}
    from lm_eval.evaluator import evaluate  # imported here: seconds, needed by no other module
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        """Its own bar is among what is held back; where the family's rows begin with the start token, every request does."""

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            tokens: list[int] = super().tok_encode(string, add_special_tokens, **options)
            bare = begins and add_special_tokens is not False and tokens[:1] != [self.prefix_token_id]
            return [self.prefix_token_id, *tokens] if bare else tokens

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            with Progress(what, len(requests), "requests", stream=stream) as self.progress:
                return super()._loglikelihood_tokens(requests, **options)

        def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
            logits: torch.Tensor = super()._model_call(inps, **options)
            self.progress.advance(len(inps))
            return logits

    stream = sys.stderr
    begins = usual(model.config.model_type) == "row"
    with _quiet():
        _check_includes(params.path)
        manager = _manager(params.path, preset.names)
        random.seed(preset.seed)
        np.random.seed(preset.seed)  # noqa: NPY002 - the generator that tasks' own code draws from
        torch.manual_seed(preset.seed)
        with _datasets(private=all(_reads_files(manager, name) for name in preset.names)):
            tasks = _load(manager, preset, params.path)
            lm = Watched(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
                batch_size=params.batch_rows,
                softmax_dtype="float32",
            )
            # the standard error of a mean has a formula, but with 0 bootstrap_iters lm-eval leaves it out
            results = evaluate(lm, {"tasks": tasks}, limit=preset.limit, bootstrap_iters=100, log_samples=False)
            assert results is not None
            chances = {name: chance(task) for name, task in tasks.items()}
    flat = {}
    for name, metrics in sorted(results["results"].items()):
        key = next(key for key in metrics if key.startswith("acc,"))  # "acc,none", or another filter's name
        flat[name] = {"acc": float(metrics[key]), "stderr": float(metrics[f"acc_stderr,{key[4:]}"]), "chance": chances[name]}
    return flat


def chance(task: "Task") -> float | None:
    """Accuracy of guessing: the task's ``metadata.chance``, else the mean of 1 / number of choices, else None."""
    stated = (task.config.metadata or {}).get("chance")
    if stated is not None:
        return float(stated)
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = [1 / len(task.doc_to_choice(document)) for document in task.eval_docs]
    return sum(shares) / len(shares)


def _manager(path: Path, names: Sequence[str]) -> "TaskManager":
    """The local tasks, and lm-eval's own only where a name asks for them: their index takes seconds."""
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=str(path), include_defaults=False)
    if set(names) <= set(local.all_tasks):
        return local
    manager = TaskManager(include_path=str(path), include_defaults=True)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        here = ", ".join(local.all_tasks) or "none"
        raise SparselineError(f"No task is called {unknown[0]!r}; local tasks in {path} are: {here}; the others are lm-eval's.")
    return manager


def _reads_files(manager: "TaskManager", name: str) -> bool:
    return (manager.task_index[name].cfg or {}).get("dataset_path") in FILE_FORMATS


def _check_includes(folder: Path) -> None:
    """Definitions in the folder include none from outside, which DVC would not watch."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.glob("**/*.yaml")):
        try:
            found = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
        except Exception:  # lm-eval passes over such files, too
            continue
        for name in found if isinstance(found, list) else [found]:
            _check_watched(folder, path.resolve().parent / str(name), f"{path}: include: {name}")


def _check_data(folder: Path, name: str, config: "TaskConfig") -> None:
    """A local task's data are in the folder, or in a dataset of the hub.

    Raises:
        SparselineError: a file, directory or address elsewhere, which DVC would not watch.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS

    dataset, options = str(config.dataset_path or ""), config.dataset_kwargs or {}
    files = options.get("data_files") or []
    named = [
        one for value in (files.values() if isinstance(files, dict) else [files]) for one in ([value] if isinstance(value, str) else value)
    ]
    if dataset in READERS:
        local = [*named, *filter(None, [options.get("data_dir")])]
    else:
        local = [one for one in named if "://" in one or one.startswith("/")]
        local += [dataset] if Path(dataset).exists() else []
    for one in local:
        if "://" in one:
            raise SparselineError(f"The task {name} reads {one}, which may change under cached results; copy the file into {folder}.")
        _check_watched(folder, Path(one), f"The task {name} reads {one}")


def _check_watched(folder: Path, path: Path, what: str) -> None:
    """A link to a file is watched, a link to a directory is not."""
    place = path.parent.resolve() / path.name
    if not place.is_relative_to(folder.resolve()) or (place.is_dir() and place.is_symlink()):
        raise SparselineError(f"{what}, which is outside {folder} (tasks.path), where DVC watches nothing; copy it there.")


def _load(manager: "TaskManager", preset: Preset, folder: Path) -> dict[str, "Task"]:
    from datasets.exceptions import DatasetsError

    try:
        tasks: dict[str, Task] = manager.load(preset.names)["tasks"]
    except (OSError, KeyError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SparselineError(f"The data of tasks {', '.join(preset.names)} cannot be read: {reason}") from error
    for name, task in tasks.items():
        defined = manager.task_index[name].yaml_path if name in manager.task_index else None
        if defined is None or defined.resolve().is_relative_to(folder.resolve()):
            _check_data(folder, name, task.config)
        if "acc" not in task.aggregation():
            known = ", ".join(task.aggregation())
            raise SparselineError(f"The task {name} measures no accuracy, only: {known}; choose tasks that have the metric acc.")
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", preset.shots)
        task.set_fewshot_seed(preset.seed)
    return tasks


@contextmanager
def _datasets(private: bool) -> Iterator[None]:
    """A cache of our own that lasts as long as the run (so it cannot be stale), and no network."""
    if not private:
        yield
        return
    import datasets

    config = datasets.config
    kept = config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE
    with tempfile.TemporaryDirectory(prefix="sparseline-tasks-", ignore_cleanup_errors=True) as folder:
        config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE = Path(folder), True
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE = kept


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log and the progress bars held back; errors are exceptions."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
