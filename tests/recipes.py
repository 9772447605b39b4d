"""Recipes for tests: the shipped parameters of section ``prune`` with what a test changes."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline_lib.core.params import merge
from pipeline_lib.recipe.settings import Recipe

PARAMS = Path(__file__).parent.parent / "params.yaml"
OWN: dict[str, Any] = {"export": [], "tasks": [], "candidate": False, "induce": None}  # unless the section says so itself


@cache
def _shipped() -> Any:
    return YAML(typ="safe").load(PARAMS)


def recipe(steps: Sequence[str] = (), **changes: Any) -> Recipe:
    """The shipped section ``prune`` with these steps, and with ``changes`` laid over it."""
    section = {key: value for key, value in _shipped()["prune"].items() if key != "activation_budget_bytes"}
    shipped = {**OWN, "curves": _shipped()["curves"], **section}
    return Recipe.model_validate(merge(merge(shipped, {"reconstruction": {"steps": list(steps)}}), changes))
