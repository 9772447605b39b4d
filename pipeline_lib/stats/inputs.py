"""The inputs of stages that read a text: the model, ready to stream, and the samples."""

from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core import files, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import TrainingUse, Workspace
from pipeline_lib.models.places import allowed_storage
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source
from pipeline_lib.models.stream import BlockModel


def open_model(workspace: Workspace, params: ModelParams) -> BlockModel:
    """The model as prepare recorded it, on the device of the settings."""
    device = runtime.compute()
    return BlockModel(
        open_source(workspace, params),
        getattr(torch, params.compute_dtype),
        device,
        params.products,
        allowed_storage(device),
    )


def samples(workspace: Workspace, use: TrainingUse = "calibrate") -> dict[str, torch.Tensor]:
    """``fit`` and ``held_out`` samples [N, T] of the one text with this use.

    Raises:
        SparselineError: there is no such text, or more than one.
    """
    return workspace.load_tensors(samples_file(workspace, use))[0]


def calibration_facts(workspace: Workspace) -> dict[str, Any]:
    """Provenance of the calibration samples: the text's name, its facts, and the SHA-256 of the file.

    Raises:
        SparselineError: as ``samples``.
    """
    path = samples_file(workspace)
    return workspace.load_facts(path) | {"text": path.stem, "file_sha256": files.sha256(path)}


def samples_file(workspace: Workspace, use: TrainingUse = "calibrate") -> Path:
    """Path of the samples.

    Raises:
        SparselineError: as ``samples``.
    """
    folder = workspace.texts(use)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SparselineError(f"{folder}/<text>.safetensors is missing; run `dvc repro` to make it.")
    if len(files) != 1:
        raise SparselineError(
            f"params.yaml: texts must hold exactly one text with use: {use}, not {len(files)}; change one's"
            " `use`."
        )
    return files[0]
