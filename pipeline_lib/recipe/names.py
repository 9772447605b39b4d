"""Names in params.yaml, and keys of earlier versions."""

from collections.abc import Mapping
from typing import Any

from pipeline_lib.core import params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import DENSE

RENAMED = {  # keys of version 1 -> what takes their place
    "induced": "give the variant a section `induce: {}` (with its changes of the section `induce`)",
    "curved": (
        "error curves are measured if the variant's allocation reads them; `curves: {…}` in the variant"
        " changes how"
    ),
    "exported": "give the variant `export: [dense, bitmask]`",
    "export": "give the variant `export: [dense, bitmask]`, or `prune.export` for all",
    "tasks.presets": "give the variant `tasks: [<preset>]`",
    "tasks.variants": "give the variant `tasks: [<preset>]`",
    "choose.candidates": "give each candidate `candidate: true` (the earlier variant wins a tie)",
    "prune.activation_budget_bytes": "set SPARSELINE_ACTIVATION_BYTES in the environment",
    "calibrate.gram_budget_bytes": "set SPARSELINE_GRAM_BYTES in the environment",
}
PATHS = {  # the same for a variant's keys
    "factors": "`induce: {}` in the variant requests learned factors",
    "sensitivity": "the variant's allocation determines what it reads",
    "activation_budget_bytes": RENAMED["prune.activation_budget_bytes"],
}

# keys of `reconstruction` -> their names now
RECONSTRUCTION = {
    "collect": "`statistics`, with the values per_block and per_site",
    "towards_dense": "`dense_target`",
    "channel": "`finetune_channels`",
    "block": "`finetune`",
}


def check() -> None:
    """Refuse names that DVC, a shell or a file system would misread, and keys of earlier versions.

    Raises:
        SparselineError: the first such name or key, or a section of names that is not a mapping.
    """
    texts, presets, variants = (
        _mapping(section, params.section(section)) for section in ("texts", "presets", "variants")
    )
    for kind, found in (("text", texts), ("variant", variants), ("preset", presets)):
        for name in found:
            params.check_name(kind, name)
    if DENSE in variants:
        raise SparselineError(
            f"{params.FILE}: the variant name {DENSE!r} is taken by the source model; choose another."
        )
    for name, variant in variants.items():
        for key, instead in PATHS.items():
            if isinstance(variant, Mapping) and key in variant:
                raise SparselineError(
                    f"{params.FILE}: variants.{name}.{key} is no longer a key: {instead}; remove it."
                )
    for key, instead in RENAMED.items():
        if _there(key):
            raise SparselineError(f"{params.FILE}: {key} is no longer a key: {instead}; remove it.")
    _check_reconstruction("prune", params.section("prune"))
    for name, variant in variants.items():
        _check_reconstruction(f"variants.{name}", variant)
    calibrating = texts_of("calibrate")
    if len(calibrating) != 1:
        raise SparselineError(
            f"{params.FILE}: texts must hold exactly one text with use: calibrate, not {len(calibrating)}."
        )


def _check_reconstruction(where: str, section: Any) -> None:
    """Refuse earlier names of keys and steps.

    Raises:
        SparselineError: the first such name, with its name now.
    """
    found = section.get("reconstruction") if isinstance(section, Mapping) else None
    if not isinstance(found, Mapping):
        return
    for key, now in RECONSTRUCTION.items():
        if key in found:
            raise SparselineError(
                f"{params.FILE}: {where}.reconstruction.{key} has another name now: {now}; rename it."
            )
    steps = found.get("steps")
    for step in steps if isinstance(steps, list) else ():
        if step in ("channel", "block"):
            raise SparselineError(
                f"{params.FILE}: {where}.reconstruction.steps has the step {step!r}, which has another name"
                f" now: {RECONSTRUCTION[step]}; rename it."
            )


def texts_of(use: str) -> list[str]:
    """The names of the texts with this use (``calibrate``, ``evaluate``), in the order of params.yaml."""
    texts = _mapping("texts", params.section("texts"))
    return [name for name, text in texts.items() if isinstance(text, Mapping) and text.get("use") == use]


def check_evaluated(key: str, text: str) -> None:
    """Refuse ``key`` if it names a text that is not evaluated.

    Raises:
        SparselineError: the text is not evaluated.
    """
    evaluated = texts_of("evaluate")
    if text not in evaluated:
        raise SparselineError(
            f"{params.FILE}: {key} = {text!r} is not a text with use: evaluate; these are:"
            f" {', '.join(evaluated) or 'none'}."
        )


def check_presets(variant: str, presets: list[str]) -> None:
    """Refuse names of presets that do not exist.

    Raises:
        SparselineError: the first unknown name.
    """
    known = _mapping("presets", params.section("presets"))
    for name in presets:
        if name not in known:
            raise SparselineError(
                f"{params.FILE}: variants.{variant}.tasks names {name!r}, which is not a preset; presets:"
                f" {', '.join(known) or 'none'}."
            )


def _there(key: str) -> bool:
    try:
        params.section(key)
    except SparselineError:
        return False
    return True


def _mapping(section: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise SparselineError(
            f"{params.FILE}: {section} = {value!r} is not a mapping of names to values; write `{section}:"
            " {}` or names below it."
        )
    return value or {}
