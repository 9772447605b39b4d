"""What every record of a benchmark carries, and where finished cells are kept."""

import functools
import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts import sha256

CELLS = Path(__file__).parent / "results" / "cells"


def commit() -> str:
    """The commit that is checked out."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return found.stdout.strip()


_digest = functools.cache(sha256)  # many cells share their inputs


def cell_file(name: str, parameters: Any, inputs: Iterable[Path]) -> Path:
    """Named after the cell and a key over parameters and input files; the code is the records' commit."""
    key = hashlib.sha256("".join([json.dumps(parameters, sort_keys=True), *map(_digest, inputs)]).encode()).hexdigest()
    return CELLS / f"{name.replace(':', 'of')}-{key[:8]}.json"
