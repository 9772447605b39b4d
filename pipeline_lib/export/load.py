"""Read a bitmask checkpoint: tensor by tensor, as a transformers model, or turned back into an ordinary checkpoint."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import dense, manifest
from pipeline_lib.export.encoding import PARTS, decode
from pipeline_lib.export.tensorfile import DTYPES, Blob, Reader, digest
from pipeline_lib.models.checkpoint import read_config, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its name, bit for bit, one at a time; what is yielded has passed its checksum.

    Raises:
        SparselineError: a file is missing, truncated, damaged, or of another version; tensors yielded before are right.
    """
    checked = manifest.read(path)
    for name in checked["weights"]:
        yield from _File(path, checked, name).tensors()


def load_model(path: Path) -> "PreTrainedModel":
    """The model in its stored dtype, in evaluation mode; besides it, one tensor is in memory.

    Raises:
        SparselineError: as ``tensors``, or the config asks for other tensors than there are.
    """
    found = dict(tensors(path))  # the model takes these over, it does not copy them
    family = type(skeleton(read_config(path), torch.float32))
    dtype = Counter(tensor.dtype for tensor in found.values()).most_common(1)[0][0]
    model, report = family.from_pretrained(None, config=read_config(path), state_dict=found, dtype=dtype, output_loading_info=True)
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise SparselineError(f"{path}: its tensors are not those that its config.json calls for ({wrong}).")
    if model.can_generate() and (path / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(path)
    return model.eval()


def unpack(path: Path, out: Path) -> None:
    """Write the ordinary checkpoint that ``from_pretrained`` loads, in the files of the model that was pruned.

    Raises:
        SparselineError: as ``tensors``, or ``out`` is in use; it is then not written.
    """
    dense.check_unused(out)
    checked = manifest.read(path)
    files = {entry["dense"]: _File(path, checked, name) for name, entry in checked["weights"].items()}
    shards = {name: file.blobs() for name, file in files.items()}
    dense.write(out, shards, lambda name: files[name].tensors(), (path, sorted(checked["files"])), checked["indexed"])


class _File:
    """One file of weights."""

    def __init__(self, directory: Path, checked: dict[str, Any], name: str) -> None:
        self._path = directory / name
        self._entry = checked["weights"][name]

    @contextmanager
    def _open(self) -> Iterator[tuple[Reader, dict[str, Any]]]:
        """The file behind its header, and what it says of each tensor."""
        try:
            file = self._path.open("rb")
        except OSError as error:
            raise SparselineError(f"{self._path} cannot be read ({error.strerror}); copy it again.") from error
        with file:
            reader = Reader(file, self._path, self._entry["bytes"], self._entry["header_sha256"])
            yield reader, json.loads(reader.metadata["sparseline"])["tensors"]

    def blobs(self) -> dict[str, Blob]:
        """What the dense file holds."""
        with self._open() as (reader, tensors):
            return {
                name: Blob(DTYPES[facts["dtype"]], tuple(facts["shape"])) if facts.keys() - {"sha256"} else reader.blobs[name]
                for name, facts in tensors.items()
            }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self._open() as (reader, tensors):
            for name, facts in tensors.items():
                parts = {part: reader.read(name + part) for part in PARTS if name + part in reader.blobs}
                if digest(parts.values()) != facts["sha256"]:
                    raise SparselineError(f"{self._path} is damaged (the checksum of {name} differs); copy it again.")
                yield name, decode(parts, facts)
