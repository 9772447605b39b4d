"""The model card. Oracles: the hub's own reader of cards, arithmetic by hand, and the JSON that it
is made of.
"""

import json
import math
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard
from project import ROOT, read_params, recipe

from pipeline_lib.core.params import merge
from pipeline_lib.evaluation.verdict import Finding, Verdict
from pipeline_lib.export.card import Measured, Pruned, card
from pipeline_lib.recipe import words
from pipeline_lib.recipe.settings import Recipe

DENSE, OWN = 2.0, 2.25  # ln ppl
SIZES = {
    "theoretical_bits": 8.964,
    "formats": {
        "dense": {"matrix_bytes": 4_000_000, "file_bytes": 6_450_000, "bits": 16.0},
        "bitmask": {"matrix_bytes": 2_250_000, "file_bytes": 4_330_000, "bits": 9.0},
    },
}


def settings(**changes: Any) -> dict[str, Any]:
    """A recipe as prune writes it into the facts, with ``changes`` laid over it."""
    base = recipe(
        ("obs", "finetune"),
        selection={
            "sparsity": 0.5,
            "pattern": "unstructured",
            "score": "obs",
            "group": "block",
            "block": 128,
        },
        allocation={"method": "predicted", "alpha": 0.2, "weighting": "kronecker"},
        reconstruction={"finetune": {"seed": 7}, "finetune_channels": {"seed": 8}},
        quantization={"bits": None, "group": 128, "symmetric": True},
    )
    return dict(merge(base.model_dump(mode="json"), changes))


def pruned(
    model: dict[str, Any] | None = None, calibration: dict[str, Any] | None = None, **changes: Any
) -> Pruned:
    source = {
        "path": "data/tiny-llama",
        "id": None,
        "revision": None,
        "family": "llama",
        "dtype": "bfloat16",
        "parameters": 3_221_952,
    }
    rows = {
        "text": "calibration",
        "rows": 128,
        "length": 256,
        "documents": 17,
        "seed": 3,
        "file_sha256": "c" * 64,
        "kind": "stdlib",
    }
    facts = {
        "settings": settings(),
        "kept": 1_216_512,
        "prunable": 2_433_024,
        "sparsity": 0.5,
        "zeros": 1_216_512,
        "transform": {},
        "calibration": rows | (calibration or {}),
    }
    return Pruned(
        "mine",
        source
        | {
            "versions": {"torch": "2.13", "python": "3.11"},
            "sha256": {"model.safetensors": "a" * 64, "config.json": "b" * 64},
        }
        | (model or {}),
        facts | changes,
    )


def measured(*findings: Finding) -> Measured:
    divergence = {"test": {"kl": 0.125, "kl_99": 1.5, "agreement": 0.75}}
    return Measured({"test": math.exp(OWN)}, {"test": math.exp(DENSE)}, divergence, Verdict(findings))


def metadata(text: str) -> dict[str, Any]:
    """Oracle: the hub's reader."""
    return ModelCard(text).data.to_dict()


def cells(text: str, head: str) -> list[list[str]]:
    """Rows of the table under this head, the head with them."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_perplexities_stand_beside_the_dense_model() -> None:
    """e^2 and e^2.25, and how far the predictions are from the dense model's."""
    text = card(pruned(), measured(), "dense", SIZES)
    heads = ["text", "dense", "this model", "KL", "KL, 99%", "same token"]
    assert cells(text, "| text |") == [heads, ["test", "7.39", "9.49", "0.1250", "1.5000", "75.0%"]]


def test_the_verdict_and_its_reasons() -> None:
    """Only where there is a threshold."""
    kl, ratio = Finding("KL", "test", 0.125, 0.1), Finding("perplexity ratio", "test", 1.28, 1.3)
    assert "Verdict: **REGRESSION** (KL test 0.125 > 0.1)." in card(pruned(), measured(kl, ratio))
    assert "Verdict: **ACCEPT** (perplexity ratio test 1.28 <= 1.3)." in card(pruned(), measured(ratio))
    assert "Verdict" not in card(pruned(), measured())


def test_before_evaluation_nothing_is_said_of_quality() -> None:
    text = card(pruned())
    assert "## Perplexity" not in text and "## Size" not in text
    assert "## Provenance" in text and 'from_pretrained("path/to/this/directory")' in text


def test_metadata_of_a_model_from_the_hub() -> None:
    source = {"id": "meta-llama/Llama-2-7b-hf", "revision": "abc", "path": "data/hub.json"}
    text = card(
        pruned(
            source,
            {"dataset": {"id": "allenai/c4"}},
            settings=settings(quantization={"bits": 4, "group": "row", "symmetric": True}),
        )
    )
    assert metadata(text) == {
        "base_model": "meta-llama/Llama-2-7b-hf",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparseline", "pruned", "sparse", "quantized", "4-bit", "llama"],
        "datasets": ["allenai/c4"],
    }
    assert "[meta-llama/Llama-2-7b-hf](https://huggingface.co/meta-llama/Llama-2-7b-hf) at `abc`" in text
    assert "# Llama-2-7b-hf: mine" in text


def test_metadata_of_a_local_model() -> None:
    """A path is no model of the hub, and its texts are no dataset."""
    found = metadata(card(pruned(), measured(), "bitmask", SIZES))
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}
    assert found["library_name"] == "sparseline"
    assert "`data/tiny-llama`, a llama model with 3,221,952 parameters (bfloat16)" in card(pruned())


@pytest.mark.parametrize("name", ["a: b", "- x", "ä # 'q' \"z\"", "yes"])
def test_names_cannot_break_the_metadata(name: str) -> None:
    assert metadata(card(pruned({"id": name})))["base_model"] == name


def test_a_variant_that_is_only_quantised_is_not_called_pruned() -> None:
    text = card(
        pruned(
            kept=2_433_024,
            sparsity=0.0,
            zeros=700_000,
            settings=settings(quantization={"bits": 3, "group": 64, "symmetric": True}),
        )
    )
    assert metadata(text)["tags"] == ["sparseline", "quantized", "3-bit", "llama"]
    assert "Of 2,433,024 prunable weights, all are kept, and 700,000 are zero" in text


def test_sizes_are_those_of_the_format() -> None:
    text = " ".join(card(pruned(), measured(), "bitmask", SIZES).split())
    assert (
        "All weights take 4.33 MB (dense: 6.45 MB). The pruned matrices take 2.25 MB of them, 9.000 bits per"
        " weight (theoretical limit: 8.964)." in text
    )


def test_each_format_says_how_it_is_loaded() -> None:
    """Oracle: docs/formats.md, whose code runs in other tests."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    bitmask = card(pruned(), None, "bitmask")
    assert (
        "from pipeline_lib.export.load import load_model" in bitmask
        and "from pipeline_lib.export.load import load_model" in page
    )
    assert "python -m stages.unpack" in bitmask and "python -m stages.unpack" in page
    assert 'gguf_file="model.gguf"' in card(pruned(), None, "gguf") and 'gguf_file="model.gguf"' in page
    assert metadata(card(pruned(), None, "gguf"))["library_name"] == "gguf"
    four = {"bits": 4, "group": 64, "symmetric": True}
    assert "CompressedTensorsConfig" not in card(
        pruned(settings=settings(quantization=four)), None, "compressed-tensors"
    )
    assert "CompressedTensorsConfig(dequantize=True)" in card(
        pruned(settings=settings(quantization=four | {"symmetric": False})), None, "compressed-tensors"
    )


def test_the_recipe() -> None:
    """Every choice in the words of the report's table."""
    assert dict(map(tuple, cells(card(pruned()), "|  |")[1:])) == {  # type: ignore[arg-type]
        "pruned": "50.00% of the prunable weights, unstructured",
        "score": "obs",
        "compared within": "block of 128 columns",
        "allocation": "least predicted loss (kronecker), α = 0.2",
        "reconstruction": "obs + finetune",
        "quantisation": "none",
        "factors": "none",
        "trained afterwards": "none: one-shot",
    }
    other = settings(
        selection={"sparsity": 0.5, "pattern": "2:4", "score": "wanda", "group": "row", "block": 128},
        allocation={"method": "uniform", "alpha": 0.1},
        reconstruction={"steps": []},
        quantization={"bits": 3, "group": "row", "symmetric": False},
        induce=read_params(ROOT)["induce"],
    )
    told = words.rows(Recipe.model_validate(other))
    assert list(told.values()) == ["wanda", "2:4", "uniform", "none", "3 bits, rows, zero points", "learned"]
    assert "50.00% of the prunable weights, 2:4 pattern" in card(pruned(settings=other))


def test_provenance_is_complete() -> None:
    """Hashes, versions, the seeds of the steps that ran, and the exact settings."""
    text = card(pruned(transform={"settings": {"seed": 5}}))
    assert cells(text, "| file |")[1:] == [
        ["`config.json`", f"`{'b' * 64}`"],
        ["`model.safetensors`", f"`{'a' * 64}`"],
    ]
    assert (
        f"128 samples of 256 tokens from 17 documents (`calibration`); SHA-256 of the samples: `{'c' * 64}`"
        in text
    )
    assert "Versions: python 3.11, torch 2.13. Seeds: samples 3, induction 5, finetune 7." in text
    found = re.search(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert found and json.loads(found[1]) == settings()
    assert "samples none (taken in order)" in card(pruned(calibration={"seed": None}))


def test_a_variant_that_read_no_text_says_so() -> None:
    """Magnitude has no calibration rows, hence no data set, no hash and no seed of theirs."""
    made = pruned(
        {"id": "a/b"}, settings=settings(selection={"score": "magnitude"}, reconstruction={"steps": []})
    )
    text = card(Pruned(made.variant, made.model, {**made.facts, "calibration": None}))
    assert "datasets" not in metadata(text)
    assert "It was pruned without calibration text." in text
    assert "Versions: python 3.11, torch 2.13.\n" in text
