"""The model card of a pruned checkpoint: README.md with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline_lib.evaluation.verdict import Verdict
from pipeline_lib.export import wording
from pipeline_lib.recipe import words
from pipeline_lib.recipe.settings import Recipe

FILE = "README.md"
DENSE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""
LOADING = {
    "dense": f"An ordinary checkpoint; zeros take as much space as other weights.\n\n{DENSE}",
    "bitmask": (
        """This format stores a bit per weight and the weights that are not zero. Sparseline reads it, and
its `docs/artifacts.md` specifies it.

```python
from pathlib import Path
from pipeline_lib.export.load import load_model

model = load_model(Path("path/to/this/directory"))
```

`python -m stages.unpack <this directory> <out>` converts it to an ordinary checkpoint for
`AutoModelForCausalLM.from_pretrained`."""
    ),
    "gguf": (
        """For llama.cpp and tools that use it, with tokenizer and chat template. Zeros take as much space
as other weights.

```sh
llama-cli -m path/to/this/directory/model.gguf -p "Once upon a time"
```

transformers reads it too, after `pip install gguf`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", gguf_file="model.gguf")
```"""
    ),
    "compressed-tensors": (
        f"For vLLM, and for transformers after `pip install compressed-tensors`.\n\n{DENSE}"
    ),
}
LIBRARIES = {"bitmask": "sparseline", "gguf": "gguf"}
ZERO_POINTS = (
    "Because of its zero points, transformers 5.23 with compressed-tensors up to 0.20 must dequantise when it"
    " loads the model: `from_pretrained(path,"
    " quantization_config=CompressedTensorsConfig(dequantize=True))`."
)


@dataclass(frozen=True)
class Pruned:
    """Facts about a pruned variant."""

    variant: str
    model: Mapping[str, Any]  # build/prepare/model.json
    facts: Mapping[str, Any]  # build/facts/<variant>.json
    training: Mapping[str, Any] = field(default_factory=dict)  # build/training/<variant>.json


@dataclass(frozen=True)
class Measured:
    """Results per text."""

    own: Mapping[str, float]  # perplexities
    dense: Mapping[str, float]
    divergence: Mapping[str, Mapping[str, float]]
    verdict: Verdict


def card(
    pruned: Pruned,
    measured: Measured | None = None,
    form: str = "dense",
    sizes: Mapping[str, Any] | None = None,
) -> str:
    """The text of the model card.

    Args:
        pruned: facts about the variant.
        measured: results of the evaluation (build/evaluate), if it has run.
        form: the format of the files beside the card.
        sizes: sizes of the export (build/sizes), if it has run.
    """
    parts = [
        _metadata(pruned, form),
        f"# {_name(pruned.model)}: {pruned.variant}",
        _what(pruned),
        "## Recipe",
        _table(("", ""), _recipe(pruned)),
        *(["## Perplexity", *_perplexity(measured)] if measured else []),
        *(["## Size", _size(form, sizes)] if sizes else []),
        "## Loading",
        LOADING[form],
        *(
            [ZERO_POINTS]
            if form == "compressed-tensors" and not pruned.facts["settings"]["quantization"]["symmetric"]
            else []
        ),
        "## Provenance",
        *_provenance(pruned),
    ]
    return "\n\n".join(parts) + "\n"


def _recipe(pruned: Pruned) -> list[tuple[str, str]]:
    rows = words.rows(Recipe.model_validate(pruned.facts["settings"]))
    return [
        ("pruned", _sparsity(pruned.facts)),
        *rows.items(),
        ("trained afterwards", words.training(pruned.training)),
    ]


def _name(model: Mapping[str, Any]) -> str:
    return str(model.get("id") or model["path"]).rstrip("/").rpartition("/")[2]


def _metadata(pruned: Pruned, form: str) -> str:
    """YAML front matter (JSON's strings and lists are valid YAML). Unknown keys are left out: a local
    directory is not a ``base_model``.
    """
    bits = pruned.facts["settings"]["quantization"]["bits"]
    sparse = ["pruned", "sparse"] if pruned.facts["sparsity"] else []
    dataset = (pruned.facts["calibration"] or {}).get("dataset")
    known = {
        "base_model": pruned.model.get("id"),
        "base_model_relation": "quantized" if pruned.model.get("id") and bits else None,
        "library_name": LIBRARIES.get(form, "transformers"),
        "pipeline_tag": "text-generation",
        "tags": [
            "sparseline",
            *sparse,
            *(["quantized", f"{bits}-bit"] if bits else []),
            pruned.model["family"],
        ],
        "datasets": [dataset["id"]] if dataset else None,
    }
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items() if value is not None
    ]
    return "\n".join(["---", *lines, "---"])


def _what(pruned: Pruned) -> str:
    model, facts = pruned.model, pruned.facts
    zeros = (pruned.training if pruned.training.get("kept") else facts)["zeros"]
    source = f"`{model['path']}`"
    if model.get("id"):
        commit = f" at `{model['revision']}`" if model.get("revision") else ""
        source = f"[{model['id']}](https://huggingface.co/{model['id']}){commit}"
    return (
        f"Sparseline pruned {source}, a {model['family']} model with {model['parameters']:,} parameters"
        f" ({model['dtype']}). Of {facts['prunable']:,} prunable weights,"
        f" {'all' if not facts['sparsity'] else format(facts['kept'], ',')} are kept, and {zeros:,} are zero."
        " Tokenizer, chat template and configuration are those of the base model. Its licence, intended uses"
        " and limitations apply."
    )


def _sparsity(facts: Mapping[str, Any]) -> str:
    pattern = facts["settings"]["selection"]["pattern"]
    return (
        f"{wording.sparsity(facts['sparsity'])} of the prunable weights,"
        f" {pattern if pattern == 'unstructured' else f'{pattern} pattern'}"
    )


def _perplexity(measured: Measured) -> Sequence[str]:
    said = (
        "Perplexity is exp of the mean negative log-likelihood per token, over samples without shared"
        " context; lower is better."
    )
    figures = [
        name for name in wording.DIVERGENCE if all(name in found for found in measured.divergence.values())
    ]
    rows = []
    for text, value in measured.own.items():
        found = measured.divergence[text]
        far = [
            wording.share(found[name]) if name == "agreement" else wording.kl(found[name]) for name in figures
        ]
        rows.append((text, wording.perplexity(measured.dense[text]), wording.perplexity(value), *far))
    judged = (
        [f"Verdict: **{measured.verdict.word}** ({measured.verdict.reasons})."]
        if measured.verdict.findings
        else []
    )
    return [
        *judged,
        f"{said} {wording.DIVERGES}",
        _table(("text", "dense", "this model", *map(wording.DIVERGENCE.__getitem__, figures)), rows),
    ]


def _size(form: str, sizes: Mapping[str, Any]) -> str:
    own, dense = sizes["formats"][form], sizes["formats"]["dense"]
    return (
        f"All weights take {wording.size(own['file_bytes'])} (dense: {wording.size(dense['file_bytes'])})."
        f" The pruned matrices take {wording.size(own['matrix_bytes'])} of them, {own['bits']:.3f} bits per"
        f" weight (theoretical limit: {sizes['theoretical_bits']:.3f})."
    )


def _provenance(pruned: Pruned) -> Sequence[str]:
    hashes = [(f"`{name}`", f"`{digest}`") for name, digest in sorted(pruned.model["sha256"].items())]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(pruned.model["versions"].items()))
    seeds = _seeds(pruned)
    return [
        _calibration(pruned.facts["calibration"]),
        f"Versions: {versions}.{f' Seeds: {seeds}.' if seeds else ''}",
        "Files of the base model:",
        _table(("file", "SHA-256"), hashes),
        *_settings("Settings", pruned.facts["settings"]),
        *(_settings("Settings of the distillation", pruned.training["settings"]) if pruned.training else []),
    ]


def _settings(title: str, values: Mapping[str, Any]) -> list[str]:
    told = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    return [f"<details><summary>{title}</summary>", f"```json\n{told}\n```", "</details>"]


def _calibration(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return "It was pruned without calibration text."
    return (
        f"Calibrated on {text['rows']} samples of {text['length']} tokens from {text['documents']} documents"
        f" (`{text['text']}`); SHA-256 of the samples: `{text['file_sha256']}`."
    )


def _seeds(pruned: Pruned) -> str:
    """Seeds of the samples, of induction, of the steps that ran, and of distillation."""
    facts = pruned.facts
    steps = facts["settings"]["reconstruction"]
    named = {"samples": facts["calibration"]["seed"]} if facts["calibration"] else {}
    named |= {"induction": facts["transform"]["settings"]["seed"]} if facts["transform"] else {}
    named |= {step: steps[step]["seed"] for step in steps["steps"] if "seed" in steps.get(step, {})}
    named |= {"distillation": pruned.training["settings"]["seed"]} if pruned.training else {}
    return ", ".join(
        f"{name} {'none (taken in order)' if seed is None else seed}" for name, seed in named.items()
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
