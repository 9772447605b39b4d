"""Text that the source model writes. Oracles: sampling written out token by token, transformers'
own greedy decoding, and texts known beforehand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from project import build, change_params, invoke, load_artifact, make_workspace
from safetensors.torch import load_file
from tiny import load_full, make_model, make_tokenizer
from transformers import GenerationConfig

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import parse
from pipeline_lib.core.random import generator
from pipeline_lib.models.sample import Drawing, continued, ends
from pipeline_lib.texts.chat import ask
from pipeline_lib.texts.prompts import prompts
from pipeline_lib.texts.texts import GeneratedParams, TextParams, Texts

HOW = {
    "prompts": "files",
    "prompt_tokens": 6,
    "new_tokens": 20,
    "temperature": 1.0,
    "batch_rows": 4,
    "seed": 0,
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt"
    " %}<assistant>{% endif %}"
)


def how(**changes: Any) -> GeneratedParams:
    return GeneratedParams.model_validate(HOW | changes)


def text(**changes: Any) -> TextParams:
    values = {
        "use": "calibrate",
        "kind": "generated",
        "path": "t.txt",
        "name": None,
        "glob": None,
        "field": None,
        "hub": None,
    }
    values |= {
        "revision": None,
        "generated": HOW,
        "chat_template": False,
        "start": None,
        "packing": "concatenate",
        "rows": 2,
        "length": 8,
    }
    return parse(
        TextParams, values | {"distinct": 1, "held_out": 0, "training": 0, "seed": None} | changes, "texts.x"
    )


@pytest.mark.parametrize(
    ("family", "temperature"), [("llama", 0.7), ("gpt2", 0.7), ("bloom", 0.7), ("opt", 0.7), ("gemma", 20.0)]
)
def test_tokens_are_drawn_from_the_models_distribution(
    tmp_path: Path, family: str, temperature: float
) -> None:
    """Oracle: the largest of logits / temperature − ln E, E the prompt's own exponential noise,
    whole texts read again for every token, one by one.
    """
    model = load_full(make_model(tmp_path, family))
    given, drawing = (
        [[5, 6, 7, 8], [9, 10], [11, 12, 13]],
        Drawing(new_tokens=6, temperature=temperature, seed=3),
    )
    expected = []
    for number, prompt in zip((0, 5, 1), given, strict=True):
        tokens, random = list(prompt), generator(3, f"prompt {number}")
        for _ in range(6):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].detach()
            tokens.append(
                int(
                    (
                        logits / temperature - torch.empty(len(logits)).exponential_(generator=random).log()
                    ).argmax()
                )
            )
        expected.append(tokens[len(prompt) :])
    assert continued(model, given, (0, 5, 1), drawing, []) == expected
    assert [
        continued(model, [one], (number,), drawing, [])[0]
        for one, number in zip(given, (0, 5, 1), strict=True)
    ] == expected
    assert continued(model, given, (0, 5, 1), Drawing(6, temperature, 4), []) != expected


def test_without_temperature_the_most_likely_token_is_taken(tmp_path: Path) -> None:
    """Oracle: transformers' greedy decoding. What the checkpoint's generation config asks for is
    left aside, and is there again afterwards.
    """
    model = load_full(make_model(tmp_path, "llama"))
    plain = model.generate(
        torch.tensor([[5, 6, 7]]),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0),
    )
    model.generation_config.repetition_penalty = 50.0
    kept = model.generation_config
    assert continued(model, [[5, 6, 7]], (0,), Drawing(8, 0.0, 0), []) == [plain[0, 3:].tolist()]
    assert model.generation_config is kept


def test_frequencies_are_the_models_probabilities(tmp_path: Path) -> None:
    """Oracle: softmax of the logits over 4000 draws of the next token, within five standard errors
    for the eight most likely.
    """
    model, count = load_full(make_model(tmp_path, "llama")), 4000
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # a few tokens have most of the probability
    likely = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].detach().softmax(-1)
    drawn = continued(model, [[5, 6, 7]] * count, range(count), Drawing(1, 1.0, 0), [])
    shares = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(likely)) / count
    top = likely.topk(8).indices
    assert ((shares[top] - likely[top]).abs() < 5 * (likely[top] * (1 - likely[top]) / count).sqrt()).all()


def test_a_text_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    """The end is part of what is written. Which tokens end a text: the generation config's, else
    the tokenizer's.
    """
    model = load_full(make_model(tmp_path, "llama"))
    (whole,) = continued(model, [[5, 6, 7]], (0,), Drawing(8, 1.0, 0), [])
    end = whole[3]
    assert continued(model, [[5, 6, 7]], (0,), Drawing(8, 1.0, 0), [end]) == [whole[: whole.index(end) + 1]]
    tokenizer = make_tokenizer(tmp_path)
    for asked, expected in (([3, 4], [3, 4]), (5, [5]), (None, [tokenizer.eos_token_id])):
        model.generation_config.eos_token_id = asked
        assert ends(model, tokenizer) == expected


def test_prompts_are_openings_of_documents(tmp_path: Path) -> None:
    """Oracle: bytes. Documents that are shorter are left out, and without any that is long enough
    there is one sentence.
    """
    tokenizer = make_tokenizer(tmp_path)
    texts = Texts(["abcdefgh", "xy", "uvwxyz"], [], ["a", "b", "c"], {})
    found = prompts(tokenizer, texts, text(), how(), 100)
    assert [tokenizer.decode(ids) for ids in found] == ["abcdef", "uvwxyz"]
    with pytest.raises(SparselineError, match="has no document of 9 tokens; lower prompt_tokens"):
        prompts(tokenizer, texts, text(), how(prompt_tokens=9), 100)


def test_prompts_of_chats_end_before_the_last_answer(tmp_path: Path) -> None:
    """Oracle: the template by hand. A chat that begins with its only answer has no prompt; one that
    is too long is left out.
    """
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = TEMPLATE

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    chats = [
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")],
        [turn("assistant", "b")],
        [turn("user", "e")],
        [turn("user", "f" * 200), turn("assistant", "g")],
    ]
    asked = ask(tokenizer, chats, ["x"] * 4)
    assert asked[:2] == ["<user>a<assistant>b<user>c<assistant>", "<user>e<assistant>"] and len(asked) == 3
    texts = Texts([], chats, ["x"] * 4, {})
    found = prompts(tokenizer, texts, text(chat_template=True), how(), 100)
    assert [tokenizer.decode(ids) for ids in found] == asked[:2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose calibration text is generated from three openings."""
    monkeypatch.chdir(make_workspace(tmp_path / "project"))
    (Path() / "data/texts/calibration.jsonl").write_text(
        '{"text": "one two"}\n{"text": "three four"}\n{"text": "five six"}\n'
    )
    for key, value in {
        "path": "data/texts/calibration.jsonl",
        "field": "text",
        "kind": "generated",
        "generated": HOW,
    }.items():
        change_params(Path(), f"texts.calibration.{key}", value)
    build("prepare")
    return Path()


@pytest.mark.parametrize("packing", ["concatenate", "document"])
def test_rows_are_cut_from_what_the_model_wrote(project: Path, packing: str) -> None:
    """Oracle: prompts in turn, continued after the start token by ``continued``; the rows hold
    these documents and nothing else.
    """
    change_params(project, "texts.calibration.packing", packing)
    change_params(project, "texts.calibration.length", 16)
    build("generate calibration", "text calibration")
    found = load_artifact(project / "build/generated/calibration.json")
    documents = found["documents"]
    model, tokenizer = load_full(project / "data/model"), make_tokenizer(project / "other")
    openings = [tokenizer.encode(one)[:6] for one in ("one two", "three four", "five six")]
    for number, document in enumerate(documents):
        opening = openings[number % 3]
        (new,) = continued(model, [[0, *opening]], (number,), Drawing(20, 1.0, 0), [0])
        assert document == opening + [token for token in new if token != 0]
    # the same prompt is continued otherwise
    assert len({tuple(document) for document in documents}) == len(documents) > 3
    tensors = load_file(project / "build/texts/calibrate/calibration.safetensors")
    rows = torch.cat([tensors["fit"], tensors["held_out"]])
    assert rows.shape == (8, 16)
    if packing == "concatenate":
        stream = [token for document in documents for token in (0, *document)]
        cut = [stream[at : at + 16] for at in range(0, len(stream) - 15, 16)]
        assert sorted(rows.tolist()) == sorted(row for row in cut if row in rows.tolist()) and len(cut) >= 8
        assert sum(map(len, documents[:-1])) < 8 * 16
    else:
        long = [document for document in documents if len(document) >= 16]
        assert len(long) == 8
        pieces = [begun[at : at + 16] for begun in ([0, *one] for one in long) for at in range(len(begun))]
        assert all(row in pieces for row in rows.tolist())
    assert found["facts"]["generated"] == HOW and found["facts"]["prompts"] == 3
    assert list(found["facts"]["sha256"]) == ["calibration.jsonl"]


def test_a_generated_text_does_not_depend_on_the_batch(project: Path) -> None:
    build("generate calibration")
    first = load_artifact(project / "build/generated/calibration.json")["documents"]
    change_params(project, "texts.calibration.generated.batch_rows", 3)
    build("generate calibration")
    assert load_artifact(project / "build/generated/calibration.json")["documents"] == first
    change_params(project, "texts.calibration.generated.seed", 1)
    build("generate calibration")
    assert load_artifact(project / "build/generated/calibration.json")["documents"] != first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"generated": None},
            (
                "kind = 'generated' with texts.calibration.generated = None cannot be used: kind: generated"
                " and the section"
            ),
        ),
        ({"kind": "files"}, "give both, or another kind and null"),
        ({"use": "evaluate", "rows": None}, "a generated text has no fixed length; give the number of rows"),
        (
            {"generated": HOW | {"temperature": -1}},
            "texts.calibration.generated.temperature = -1 cannot be used",
        ),
        (
            {"generated": HOW | {"new_tokens": 5000}},
            "5000 new tokens do not fit into the model's 4096 positions; lower new_tokens",
        ),
        ({"generated": HOW | {"prompt_tokens": 11}}, "has no document of 11 tokens; lower prompt_tokens"),
        (
            {"packing": "document", "length": 64},
            "The model ends its texts early: 0 of 128 documents of the text at",
        ),
    ],
)
def test_what_cannot_be_generated_is_told(project: Path, changes: dict[str, Any], said: str) -> None:
    for key, value in changes.items():
        change_params(project, f"texts.calibration.{key}", value)
    stage = "text" if changes.get("kind") == "files" else "generate"
    result = invoke(stage, "calibration")
    assert result.exit_code == 2 and said in result.output, result.output


def test_another_text_is_not_the_models_own(project: Path) -> None:
    """Its stage ends at once, and a text that is gone from params.yaml leaves nothing."""
    build("generate test", "generate calibration")
    assert load_artifact(project / "build/generated/test.json") == {}
    (project / "build/generated/gone.json").write_text("{}")
    build("keys")
    assert {path.name for path in (project / "build/generated").iterdir()} == {
        "test.json",
        "calibration.json",
    }


def test_a_missing_text_of_the_model_is_told(project: Path) -> None:
    result = invoke("text", "calibration")
    assert (
        result.exit_code == 2
        and "build/generated/calibration.json is missing; run `dvc repro`" in result.output
    )


def test_generating_is_planned(project: Path) -> None:
    output = invoke("plan").output
    assert "generate calibration" in output and "generate test" not in output
