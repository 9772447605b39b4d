"""Perplexity, tasks and completions against independent computations, on tiny models with a byte
tokenizer.
"""

import importlib.util
import json
import math
import platform
import socket
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from project import WANDA, build, make_workspace
from tiny import ALL_FAMILIES, VOCABULARY, load_full, make_model, token_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation import divergence
from pipeline_lib.evaluation.choice import choose
from pipeline_lib.evaluation.completions import CompletionsParams, complete
from pipeline_lib.evaluation.divergence import Dense, Divergence
from pipeline_lib.evaluation.perplexity import perplexity, row_logits
from pipeline_lib.evaluation.tasks import Preset, TasksParams, Unread, request_lengths, run_tasks
from pipeline_lib.models.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])
MADE_WITH = "3.11.7"  # as data/tasks/*.yaml say


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """End of text = 0, then one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE(vocab={"<|endoftext|>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    rest = {
        "vocab_size": 257,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | rest | changes))).eval()


def repeater() -> LlamaForCausalLM:
    """Expects every token to repeat: the blocks add nothing, and the head reads the token's own direction."""
    model = tiny_llama(hidden_size=272, num_hidden_layers=1, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(257, 272))
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(1, 257, (7, 24), generator=torch.Generator().manual_seed(1))


# perplexity


def test_perplexity_is_that_of_a_token_by_token_sum(rows: torch.Tensor) -> None:
    model = tiny_llama()
    losses = []
    for row in rows:
        likely = torch.log_softmax(model(input_ids=row[None]).logits[0].detach().double(), dim=-1)
        losses += [-float(likely[i, row[i + 1]]) for i in range(len(row) - 1)]
    assert len(losses) == 7 * 23
    assert perplexity(model, rows, batch_rows=3) == pytest.approx(
        math.exp(sum(losses) / len(losses)), rel=1e-5
    )


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(rows: torch.Tensor) -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, rows, batch_rows=2) == pytest.approx(257, rel=1e-6)


def test_perplexity_does_not_depend_on_the_batch_size(rows: torch.Tensor) -> None:
    model = tiny_llama()
    whole = perplexity(model, rows, batch_rows=7)
    assert [perplexity(model, rows, batch_rows=n) for n in (1, 2, 100)] == pytest.approx(
        [whole] * 3, rel=1e-6
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_row_by_row_are_the_models_own(tmp_path: Path, family: str) -> None:
    """Oracle: one forward pass of the whole batch, bit for bit; afterwards the model runs as before."""
    model = load_full(make_model(tmp_path, family))
    batch = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    whole = model(input_ids=batch, use_cache=False).logits
    assert torch.equal(torch.stack(list(row_logits(model, batch))), whole)
    next(row_logits(model, batch))  # left half-way
    assert torch.equal(model(input_ids=batch, use_cache=False).logits, whole)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])
def test_a_broken_model_is_told_in_one_sentence(rows: torch.Tensor, broken: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = broken
    with pytest.raises(SparselineError, match="loss is"):
        perplexity(model, rows, batch_rows=4)


@pytest.mark.parametrize("shape", [(0, 24), (3, 1)])
def test_perplexity_needs_something_to_predict(shape: tuple[int, int]) -> None:
    with pytest.raises(SparselineError, match="at least one sample"):
        perplexity(tiny_llama(), torch.ones(shape, dtype=torch.long), batch_rows=1)


# divergence from the dense model


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_divergence_is_that_of_both_models_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Oracle: all logits of both models in float64, the definitions written out. In pieces of five
    tokens of 11; all rows at once, and two by two.
    """
    monkeypatch.setattr(divergence, "HEAD_TOKENS", 5)
    paths = [make_model(tmp_path / name, family, seed=seed) for name, seed in (("dense", 0), ("own", 1))]
    rows = token_rows(5, 12)
    dense, own = (
        load_full(path)(input_ids=rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        for path in paths
    )
    forward, reverse = ((p.exp() * (p - q)).sum(-1).flatten() for p, q in ((dense, own), (own, dense)))
    expected = {
        "kl": float(forward.mean()),
        "kl_99": float(forward.sort().values[54]),  # of 55: 54.45 of them are 99%
        "reverse_kl": float(reverse.mean()),
        "reverse_kl_99": float(reverse.sort().values[54]),
        "agreement": float((dense.argmax(-1) == own.argmax(-1)).double().mean()),
    }

    def measure(held: str) -> tuple[dict[str, float], list[int]]:
        """The figures, and the blocks that were read."""
        monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", held)
        read: list[int] = []
        source = Dense(open_checkpoint(paths[0]), torch.float32, torch.device("cpu"))
        logits = source.logits(rows, 2, lambda blocks: read.extend(blocks) or blocks)
        compared = Divergence(logits, reverse=True)
        assert perplexity(load_full(paths[1]), rows, 2, see=compared.add) == perplexity(
            load_full(paths[1]), rows, 2
        )
        assert next(logits, None) is None
        return compared.summary(), read

    (whole, once), (parts, again) = measure("4000000000"), measure("0")
    assert (once, again) == ([0, 1], [0, 1] * 3)
    assert whole == pytest.approx(expected, rel=1e-4)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert expected["kl"] > 0.01 and expected["agreement"] < 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_does_not_diverge_from_itself(tmp_path: Path, family: str, dtype: str) -> None:
    """Block by block, the logits are those of the whole model, within rounding of float32. There is
    no reverse divergence if none is requested.
    """
    path = make_model(tmp_path, family, dtype=getattr(torch, dtype))
    rows = token_rows(3, 12)
    compared = Divergence(
        Dense(open_checkpoint(path), getattr(torch, dtype), torch.device("cpu")).logits(rows, 2),
        reverse=False,
    )
    perplexity(load_full(path, getattr(torch, dtype)), rows, 2, see=compared.add)
    found = compared.summary()
    assert set(found) == {"kl", "kl_99", "agreement"}
    assert 0 <= found["kl"] < 1e-6 and found["agreement"] == 1


def test_a_known_divergence() -> None:
    """Oracle: arithmetic. Half against a quarter and three quarters: ½ ln 2 + ½ ln ⅔; the same
    token where both agree on the second of two.
    """
    dense = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]).log()
    own = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.75, 0.25]]).log()
    compared = Divergence(iter([dense[:2], dense[2:]]), reverse=True)
    compared.add(own)
    found = compared.summary()
    kl = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0, 0.5 * math.log(3)]
    assert found["kl"] == pytest.approx(sum(kl) / 3, rel=1e-5)
    assert found["kl_99"] == pytest.approx(kl[2], rel=1e-5)
    assert found["reverse_kl"] == pytest.approx(
        (0.25 * math.log(0.5) + 0.75 * math.log(1.5) + kl[2]) / 3, rel=1e-5
    )
    assert found["agreement"] == pytest.approx(1 / 3)  # the first of equals is the most likely one


# completions

COMPLETIONS = CompletionsParams(text="test", count=2, prompt_tokens=6, new_tokens=8)


def test_completions_are_greedy_and_repeatable(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    rows = torch.tensor(tokenizer(["def one(x):", "import os, "], add_special_tokens=False)["input_ids"])
    done = complete(model, tokenizer, rows, COMPLETIONS)
    assert done == complete(model, tokenizer, rows, COMPLETIONS)
    assert [item["prompt"] for item in done] == ["def on", "import"]
    for row, item in zip(rows, done, strict=True):  # without a cache, from the whole text so far
        tokens = row[:6]
        for _ in range(8):
            tokens = torch.cat([tokens, model(input_ids=tokens[None]).logits[0, -1:].argmax(-1)])
        assert item["completion"] == tokenizer.decode(tokens[6:], skip_special_tokens=True)


def test_a_completion_stops_at_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ended = torch.tensor([[*tokenizer.encode("abc"), 0]])
    params = CompletionsParams(text="test", count=1, prompt_tokens=4, new_tokens=3)
    assert complete(repeater(), tokenizer, ended, params) == [{"prompt": "abc", "completion": ""}]
    shorter = params.model_copy(update={"prompt_tokens": 3})
    assert complete(repeater(), tokenizer, ended, shorter) == [{"prompt": "abc", "completion": "ccc"}]


@pytest.mark.parametrize(
    ("change", "problem"), [({"count": 8}, "text 'test' has 7"), ({"new_tokens": 2000}, "1024 positions")]
)
def test_completions_that_do_not_fit(
    tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor, change: dict[str, int], problem: str
) -> None:
    with pytest.raises(SparselineError, match=problem):
        complete(tiny_llama(), tokenizer, rows, COMPLETIONS.model_copy(update=change))


def test_no_completions(tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor) -> None:
    assert complete(tiny_llama(), tokenizer, rows, COMPLETIONS.model_copy(update={"count": 0})) == []


# the embedded tasks' files


def items(name: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (ROOT / "data/tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def squeezed(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if line.strip()]


def read(module: str) -> str:
    return (STDLIB / module).read_text(encoding="utf-8")


made_here = pytest.mark.skipif(
    platform.python_version() != MADE_WITH, reason=f"the items are from the library of Python {MADE_WITH}"
)


@pytest.mark.parametrize(
    ("name", "texts", "count"), [("next_line", "choices", 4), ("corrupted", "programs", 2)]
)
def test_items_have_one_gold_among_distinct_texts(name: str, texts: str, count: int) -> None:
    made = items(name)
    assert len(made) == 200
    assert all(
        len(set(item[texts])) == len(item[texts]) == count and item["gold"] in range(count) for item in made
    )
    assert len({item.get("context", "") + item[texts][item["gold"]] for item in made}) == 200
    places = [sum(item["gold"] == place for item in made) for place in range(count)]
    assert min(places) > 200 / count - 3 * math.sqrt(200 / count)  # gold stands anywhere
    assert (ROOT / "data/tasks" / f"{name}.jsonl").stat().st_size < 300_000
    assert f"chance: {1 / count}\n" in (ROOT / "data/tasks" / f"{name}.yaml").read_text(encoding="utf-8")


def test_neither_length_nor_indentation_gives_the_answer_away() -> None:
    for item in items("next_line"):
        assert len({len(c) - len(c.lstrip()) for c in item["choices"]}) == 1
        assert max(map(len, item["choices"])) - min(map(len, item["choices"])) <= 16
        assert not any(choice.strip() in item["context"] for choice in item["choices"])
    assert all(len({len(program) for program in item["programs"]}) == 1 for item in items("corrupted"))


@made_here
def test_every_text_is_from_held_out_test_modules_only() -> None:
    lists = json.loads((ROOT / "data/held_out.json").read_text(encoding="utf-8"))
    seen_elsewhere = "\n".join(
        squeezed("\n".join(read(m) for m in lists["calibration"] + lists["validation"]))
    )
    lines = {module: set(squeezed(read(module))) for module in lists["test"]}
    made = [(item["module"], item["context"], item["choices"]) for item in items("next_line")]
    made += [(item["module"], item["programs"][item["gold"]], []) for item in items("corrupted")]
    for module, text, others in made:
        own = squeezed(text)
        assert set(own) | {line.strip() for line in others} <= lines[module]
        assert "\n".join(own) not in seen_elsewhere
    for item in items("next_line"):  # the true line does follow, but for comments left out
        source = [line for line in squeezed(read(item["module"])) if not line.startswith("#")]
        assert (squeezed(item["context"])[-1], item["choices"][item["gold"]].strip()) in set(pairwise(source))


@made_here
def test_the_committed_items_are_what_the_script_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_tasks", ROOT / "data/tasks/make_tasks.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "make_tasks", script)  # dataclasses look their module up
        spec.loader.exec_module(script)
        script.main.callback(output=tmp_path, count=200, seed=0)
    for name in ("next_line.jsonl", "corrupted.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/tasks" / name).read_bytes()


# running tasks


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stages run, without a network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a local task asked for the network")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def params(
    path: str | Path = "data/tasks", batch_rows: int = 4, **changes: Any
) -> tuple[TasksParams, Preset]:
    preset = {
        "names": ["next_line", "corrupted"],
        "limit": 8,
        "shots": 0,
        "seed": 0,
        "chat_template": False,
        "system": None,
    }
    how = {"path": path, "compute_dtype": "float32", "batch_rows": batch_rows}
    return TasksParams.model_validate(how), Preset.model_validate(preset | changes)


@pytest.mark.usefixtures("at_root")
def test_embedded_tasks_run_offline_and_repeat(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = run_tasks(tiny_llama(), tokenizer, *params())
    tasks = found.tasks
    assert list(tasks) == ["corrupted", "next_line"] and not found.warnings
    assert all(
        0 <= values["metrics"]["acc"][name] <= 1 for values in tasks.values() for name in ("value", "stderr")
    )
    assert (tasks["next_line"]["chance"], tasks["corrupted"]["chance"]) == (0.25, 0.5)
    assert all(
        (values["items"], values["of"], values["truncated"]) == (8, 200, 0) for values in tasks.values()
    )
    assert run_tasks(tiny_llama(), tokenizer, *params()) == found
    assert run_tasks(tiny_llama(), tokenizer, *params(batch_rows=16)) == found
    assert not (tmp_path / "cache").exists() and Path(datasets.config.HF_DATASETS_CACHE).parent == tmp_path
    assert tokenizer.pad_token is None  # the caller's tokenizer is left alone
    assert capfd.readouterr() == ("", "")


def local_task(folder: Path, golds: list[int], **changes: Any) -> None:
    """Which letter comes after a word? The right one in the repeater's eyes is the word's last."""
    texts = ["aab", "xyz", "foo", "bar"]
    choices = [["b", "c"], ["q", "z"], ["o", "f"], ["b", "r"]]
    records = [{"context": t, "choices": c, "gold": g} for t, c, g in zip(texts, choices, golds, strict=True)]
    (folder / "letters.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "letters.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "letters.yaml").write_text(json.dumps(task | changes), encoding="utf-8")  # YAML holds JSON


@pytest.mark.usefixtures("at_root")
def test_a_known_rule_gives_known_answers_and_data_is_never_stale(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    local = params(path=tmp_path, names=["letters"], limit=None)
    local_task(tmp_path, [0, 1, 0, 1])
    counts = {"items": 4, "of": 4, "truncated": 0}
    metrics = {"acc": {"value": 1.0, "stderr": 0.0}}
    assert run_tasks(repeater(), tokenizer, *local).tasks == {
        "letters": {"metrics": metrics, "chance": 0.5} | counts
    }
    local_task(tmp_path, [0, 1, 0, 0])  # same names, same size
    found = run_tasks(repeater(), tokenizer, *local).tasks["letters"]["metrics"]["acc"]
    assert found["value"] == 0.75 and found["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


@pytest.mark.usefixtures("at_root")
def test_chance_may_be_stated(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    local_task(tmp_path, [0, 1, 0, 1], metadata={"version": 1.0, "chance": 0.125})
    assert (
        run_tasks(repeater(), tokenizer, *params(path=tmp_path, names=["letters"])).tasks["letters"]["chance"]
        == 0.125
    )


@pytest.mark.usefixtures("at_root")
def test_an_unknown_task_names_the_local_ones(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    everything = lm_eval.tasks.TaskManager

    def quick(include_path: Any, include_defaults: bool) -> Any:
        """Without lm-eval's own tasks: there are thousands, and their index takes ten seconds."""
        return everything(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    with pytest.raises(SparselineError, match=r"'next_lime'.*corrupted, next_line"):
        run_tasks(tiny_llama(), tokenizer, *params(names=["next_lime"]))


@pytest.mark.usefixtures("at_root")
def test_tasks_that_cannot_be_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    local = params(path=tmp_path, names=["letters"])
    local_task(tmp_path, [0, 1, 0, 1], metric_list=[{"metric": "brier_score"}])
    with pytest.raises(
        SparselineError,
        match="no supported metric, only: brier_score; supported are: acc, exact_match",
    ):
        run_tasks(repeater(), tokenizer, *local)
    local_task(tmp_path, [0, 1, 0, 1])
    (tmp_path / "letters.jsonl").unlink()
    with pytest.raises(SparselineError, match=r"cannot be read: .*letters\.jsonl"):
        run_tasks(repeater(), tokenizer, *local)


@pytest.mark.usefixtures("at_root")
def test_data_outside_the_folder_are_told(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """DVC watches the folder alone: its files, links to files, and nothing behind a link to a directory."""
    folder = tmp_path / "tasks"
    for one in (folder, tmp_path / "else"):
        one.mkdir()
        local_task(one, [0, 1, 0, 1])
    (tmp_path / "else" / "letters.yaml").rename(tmp_path / "else" / "base.yaml")
    (folder / "link").symlink_to(tmp_path / "else")
    (folder / "link.jsonl").symlink_to(tmp_path / "else" / "letters.jsonl")
    local = params(path=folder, names=["letters"], limit=None)
    reads = lambda **options: local_task(folder, [0, 1, 0, 1], dataset_kwargs=options)  # noqa: E731
    for name in (
        tmp_path / "else" / "letters.jsonl",
        folder / ".." / "else" / "letters.jsonl",
        folder / "link" / "letters.jsonl",
    ):
        for files in ({"test": str(name)}, {"test": [str(folder / "letters.jsonl"), str(name)]}):
            reads(data_files=files)
            with pytest.raises(
                SparselineError, match=r"The task letters reads .*, which is outside .*tasks \(tasks\.path\)"
            ):
                run_tasks(repeater(), tokenizer, *local)
    reads(data_files={"test": str(folder / "link.jsonl")})
    assert run_tasks(repeater(), tokenizer, *local).tasks["letters"]["metrics"]["acc"]["value"] == 1.0
    local_task(
        folder,
        [0, 1, 0, 1],
        dataset_path=str(tmp_path / "else"),
        dataset_kwargs={"data_files": {"test": "letters.jsonl"}},
    )
    with pytest.raises(SparselineError, match=r"The task letters reads .*else, which is outside"):
        run_tasks(repeater(), tokenizer, *local)
    local_task(folder, [0, 1, 0, 1], include="../else/base.yaml")
    with pytest.raises(
        SparselineError, match=r"letters\.yaml: include: \.\./else/base\.yaml, which is outside"
    ):
        run_tasks(repeater(), tokenizer, *local)


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(("model_type", "begun"), [("gemma", True), ("llama", False)])
def test_gemmas_requests_begin_with_the_start_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str, begun: bool
) -> None:
    """Requests begin with the start token, as the samples do, although this tokenizer does not add
    one. Oracle: the token ids that the model gets.
    """
    model, seen = repeater(), []
    model.config.model_type = model_type
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("input_ids", args[0] if args else None)),
        with_kwargs=True,
    )
    local_task(tmp_path, [0, 1, 0, 1])
    found = run_tasks(model, tokenizer, *params(path=tmp_path, names=["letters"], limit=None)).tasks[
        "letters"
    ]
    assert found["metrics"]["acc"]["value"] == 1.0
    assert seen and all((batch[:, 0] == 0).all().item() is begun for batch in seen)


def test_what_does_not_fit_the_window_is_counted_item_by_item(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Contexts of 5, 300 and 6 bytes, continuations of one: in a window of 16 one item of three is
    cut. Warnings of it are not told again.

    A local word of lm-eval's, that the metric's direction is not stated, is.
    """
    local_task(tmp_path, [0, 1, 0, 1], metric_list=[{"metric": "acc", "aggregation": "mean"}])
    records = [{"context": "x" * size, "choices": ["a", "b"], "gold": 0} for size in (5, 300, 6)]
    (tmp_path / "letters.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    found = run_tasks(
        tiny_llama(max_position_embeddings=16), tokenizer, *params(path=tmp_path, names=["letters"])
    )
    assert (
        found.tasks["letters"]["items"],
        found.tasks["letters"]["of"],
        found.tasks["letters"]["truncated"],
    ) == (3, 3, 1)
    (warning,) = found.warnings
    assert "higher_is_better is not" in warning
    fits = run_tasks(
        tiny_llama(max_position_embeddings=300), tokenizer, *params(path=tmp_path, names=["letters"])
    )
    assert fits.tasks["letters"]["truncated"] == 0


@pytest.mark.usefixtures("at_root")
def test_answers_that_mean_nothing_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Accuracies can be computed from such values: the first NaN counts as the largest."""
    local = params(path=tmp_path, names=["letters"])
    local_task(tmp_path, [0, 1, 0, 1])
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(SparselineError, match="log-likelihoods of tasks are NaN or infinite"):
        run_tasks(broken, tokenizer, *local)
    record = {"context": "x", "choices": ["a" * 40, "b"], "gold": 0}
    (tmp_path / "letters.jsonl").write_text(2 * (json.dumps(record) + "\n"), encoding="utf-8")
    with pytest.raises(
        SparselineError,
        match="letters has a continuation of 40 tokens, more than the model's context window of 16",
    ):
        run_tasks(tiny_llama(max_position_embeddings=16), tokenizer, *local)
    (tmp_path / "letters.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(SparselineError, match="letters has fewer than two items"):
        run_tasks(tiny_llama(), tokenizer, *local)


@pytest.mark.usefixtures("at_root")
def test_requests_are_as_long_as_their_texts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One token per byte: three letters and one, eight times."""
    local_task(tmp_path, [0, 1, 0, 1])
    assert request_lengths(tokenizer, tmp_path, params(names=["letters"])[1]) == [4] * 8
    (tmp_path / "letters.jsonl").unlink()
    with pytest.raises(Unread):
        request_lengths(tokenizer, tmp_path, params(names=["letters"])[1])


def written_task(folder: Path, records: list[dict[str, Any]], **task: Any) -> None:
    """A task that generates, or that asks how likely a text is."""
    (folder / "written.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "written.jsonl")}},
        "test_split": "test",
    }
    (folder / "written.yaml").write_text(
        json.dumps({"task": "written", "num_fewshot": 0} | data | task), encoding="utf-8"
    )


@pytest.mark.usefixtures("at_root")
def test_accuracy_normalised_by_length_stands_beside_accuracy(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Oracle: likelihoods of the choices from the model's logits: their largest sum, and the
    largest per byte. Chosen so that both differ.
    """
    model, words = tiny_llama(), ["a", "bcdefgh"]
    local_task(
        tmp_path,
        [0, 1, 0, 1],
        metric_list=[
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    )
    records = [
        {"context": context, "choices": words, "gold": gold}
        for context, gold in zip("pqrstuvw", [0, 1] * 4, strict=True)
    ]
    (tmp_path / "letters.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for record in records:
        sums = []
        for word in words:
            ids = torch.tensor(tokenizer.encode(record["context"] + word))
            likely = model(input_ids=ids[None]).logits[0].detach().log_softmax(-1)
            sums.append(sum(float(likely[at - 1, ids[at]]) for at in range(1, len(ids))))
        right["acc"].append(sums.index(max(sums)) == record["gold"])
        each = [total / len(word) for total, word in zip(sums, words, strict=True)]
        right["acc_norm"].append(each.index(max(each)) == record["gold"])
    found = run_tasks(model, tokenizer, *params(path=tmp_path, names=["letters"], limit=None)).tasks[
        "letters"
    ]["metrics"]
    assert right["acc"] != right["acc_norm"]
    for name, answers in right.items():
        share = sum(answers) / 8
        assert found[name] == {"value": share, "stderr": pytest.approx(math.sqrt(share * (1 - share) / 7))}


@pytest.mark.usefixtures("at_root")
def test_exact_match_is_of_what_the_model_writes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The repeater writes the last letter three times: two of three answers are right; by the
    filter of the task's first letter, all.
    """
    records = [
        {"question": "say x", "answer": "xxx"},
        {"question": "say y", "answer": "yyy"},
        {"question": "say z", "answer": "z"},
    ]
    first = [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]
    same = [{"function": "take_first"}]
    options = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    written = {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": options,
    }
    written_task(tmp_path, records, **written, metric_list=metrics)
    asked = params(path=tmp_path, names=["written"], limit=None)
    found = run_tasks(repeater(), tokenizer, *asked).tasks["written"]
    assert found["metrics"] == {
        "exact_match": {"value": pytest.approx(2 / 3), "stderr": pytest.approx(1 / 3)}
    }
    assert (found["chance"], found["items"], found["truncated"]) == (None, 3, 0)
    filters = [{"name": "whole", "filter": same}, {"name": "first", "filter": first}]
    written_task(tmp_path, records, **written, metric_list=metrics, filter_list=filters)
    found = run_tasks(repeater(), tokenizer, *asked).tasks["written"]["metrics"]
    assert {name: one["value"] for name, one in found.items()} == {
        "exact_match, first": pytest.approx(1 / 3),
        "exact_match, whole": pytest.approx(2 / 3),
    }
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("at_root")
def test_perplexity_of_texts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Oracle: the model's own logits after the start token, by words and by bytes; nothing is cut,
    but read in windows.
    """
    texts, model = ["one two three", "four five"], tiny_llama()
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    written_task(
        tmp_path,
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": name} for name in names],
    )
    found = run_tasks(model, tokenizer, *params(path=tmp_path, names=["written"], limit=None)).tasks[
        "written"
    ]
    total = 0.0
    for text in texts:
        ids = torch.tensor([0, *tokenizer.encode(text)])
        likely = model(input_ids=ids[None]).logits[0].detach().log_softmax(-1)
        total += sum(float(likely[at - 1, ids[at]]) for at in range(1, len(ids)))
    expected = {
        "word_perplexity": math.exp(-total / 5),
        "byte_perplexity": math.exp(-total / 22),
        "bits_per_byte": -total / 22 / math.log(2),
    }
    assert {name: one["value"] for name, one in found["metrics"].items()} == pytest.approx(expected, rel=1e-4)
    assert list(found["metrics"]) == list(names)
    assert all(one["stderr"] is None for one in found["metrics"].values()) and found["truncated"] == 0
    short = run_tasks(
        tiny_llama(max_position_embeddings=6),
        tokenizer,
        *params(path=tmp_path, names=["written"], limit=None),
    ).tasks["written"]
    assert short["truncated"] == 0 and short["metrics"]["word_perplexity"]["value"] > 1


@pytest.mark.usefixtures("at_root")
def test_the_perplexity_of_targets_has_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As LAMBADA: oracle: the targets' likelihoods from the model's logits. Its error is resampled
    in this process, without a word.
    """
    model, records = tiny_llama(), [{"text": text} for text in ("ab", "cd", "ef", "gh")]
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity"},
        {"metric": "acc", "aggregation": "mean"},
    ]
    written_task(
        tmp_path,
        records,
        output_type="loglikelihood",
        doc_to_text="{{text[0]}}",
        doc_to_target="{{text[1]}}",
        target_delimiter="",
        metric_list=[one | {"higher_is_better": one["metric"] == "acc"} for one in metrics],
    )
    found = run_tasks(model, tokenizer, *params(path=tmp_path, names=["written"], limit=None)).tasks[
        "written"
    ]["metrics"]
    likely = []
    for record in records:
        before, after = tokenizer.encode(record["text"])
        likely.append(
            float(model(input_ids=torch.tensor([[before]])).logits[0, -1].detach().log_softmax(-1)[after])
        )
    assert list(found) == ["acc", "perplexity"]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-sum(likely) / 4), rel=1e-4)
    assert found["perplexity"]["stderr"] > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("at_root")
def test_prompts_as_chats(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the template, rendered by hand. Examples are turns of their own; what comes before
    every prompt is the system's message.
    """
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt"
        " %}<assistant>{% endif %}"
    )
    local_task(tmp_path, [0, 1, 0, 1])
    seen: list[str] = []
    encode = tokenizer.__class__.encode
    monkeypatch.setattr(
        tokenizer.__class__,
        "encode",
        lambda self, text, **how: [seen.append(text), encode(self, text, **how)][1],
    )

    def asked(**changes: Any) -> set[str]:
        """Prompts, choices aside."""
        seen.clear()
        run_tasks(repeater(), tokenizer, *params(path=tmp_path, names=["letters"], limit=None, **changes))
        return {text for text in seen if len(text) > 1 and text[:-1] not in seen}

    with pytest.raises(
        SparselineError,
        match="letters has chat_template: true, but the model's tokenizer has no chat template",
    ):
        asked(chat_template=True)
    assert any(text.startswith("Say.aab") for text in asked(system="Say."))
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert any(text.startswith("<user>aab<assistant>") for text in asked(chat_template=True))
    assert any(
        text.startswith("<system>Say.<user>aab<assistant>")
        for text in asked(chat_template=True, system="Say.")
    )
    lengths = request_lengths(
        tokenizer, tmp_path, params(names=["letters"], chat_template=True, system="Say.")[1]
    )
    assert lengths == [len("<system>Say.<user>aab<assistant>b")] * 8


def test_no_tasks(tokenizer: PreTrainedTokenizerFast) -> None:
    assert run_tasks(tiny_llama(), tokenizer, *params(names=[])).tasks == {}


# The model-level gate

FOUND = {"even": 20.0, "mixed": 18.0, "same": 20.0}


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        (["even", "mixed"], "mixed"),
        (["even", "same"], "even"),
        (["same", "even"], "same"),
        (["even"], "even"),
        ([], None),
    ],
)
def test_the_gate_takes_the_lowest_perplexity(candidates: list[str], chosen: str | None) -> None:
    """Oracle: by hand; ties go to the earlier."""
    assert choose({name: FOUND[name] for name in candidates}) == chosen


def test_the_gate_reads_the_text_that_choose_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test text, which would choose otherwise, has no say, and neither has a variant that is no
    candidate. Oracle: by hand.
    """
    wanda: dict[str, Any] = WANDA | {"candidate": True}
    monkeypatch.chdir(
        make_workspace(tmp_path / "project", variants={"wanda": wanda, "mixed": wanda, "other": WANDA})
    )
    perplexities = {"wanda": (20.0, 9.0), "mixed": (18.0, 10.0), "other": (1.0, 1.0)}
    for name, (validation, test) in perplexities.items():
        Workspace().save(
            Path(f"build/evaluate/{name}.json"), {"perplexity": {"validation": validation, "test": test}}
        )
    build("choose")
    expected = {"text": "validation", "chosen": "mixed", "perplexity": {"wanda": 20.0, "mixed": 18.0}}
    assert Workspace().load(Path("build/choice.json")) == expected
