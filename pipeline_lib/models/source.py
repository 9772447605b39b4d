"""The model that the parameters name, as the prepare stage recorded it."""

from pathlib import Path
from typing import Literal

from pipeline_lib.core import artifacts
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params
from pipeline_lib.models.checkpoint import Checkpoint, locate, open_checkpoint

MODEL = Path("build/prepare/model.json")
SMALL = 2**26  # bytes; larger files are compared by DVC, not hashed again by every stage


class ModelParams(Params):
    """Section ``model``."""

    path: Path
    id: str | None
    revision: str | None
    include: list[str]
    exclude: list[str]
    compute_dtype: Literal["float32", "bfloat16", "float16"]


def open_source(params: ModelParams) -> Checkpoint:
    """The checkpoint as prepare saw it.

    Raises:
        SparselineError: one of its files has changed since.
    """
    checkpoint = open_checkpoint(locate(params.path, params.id, params.revision))
    for name, digest in artifacts.read_json(MODEL)["sha256"].items():
        path = checkpoint.path / name
        if not path.exists() or (path.stat().st_size < SMALL and artifacts.sha256(path) != digest):
            raise SparselineError(f"{path} has changed since the prepare stage ran; run `dvc repro` again.")
    return checkpoint
