"""Read a bitmask checkpoint: tensor by tensor, as a transformers model, or converted to an ordinary
checkpoint.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import opened
from pipeline_lib.export import dense, manifest
from pipeline_lib.export.encoding import PARTS, Described, Facts, decode
from pipeline_lib.export.manifest import Manifest
from pipeline_lib.export.tensorfile import Blob, Reader, digest
from pipeline_lib.models.checkpoint import GENERATION, check_sizes, generation, read_config, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its name, bit for bit, one at a time, after a check of its
    checksum.

    Raises:
        SparselineError: a file is missing, truncated, damaged, or of another version; tensors
            yielded before are correct.
    """
    checked = manifest.read(path)
    for name in checked.weights:
        yield from _File(path, checked, name).tensors()


def load_model(path: Path) -> "PreTrainedModel":
    """The model in its stored dtype, in evaluation mode; besides it, one tensor is in memory.

    Raises:
        SparselineError: as ``tensors``, or the config requires other tensors.
    """
    # the model uses these tensors without a copy
    config, found = read_config(path), dict(tensors(path))
    check_sizes(path, config, [tuple(tensor.shape) for tensor in found.values()])
    dtype = Counter(tensor.dtype for tensor in found.values()).most_common(1)[0][0]
    try:
        family = type(skeleton(config, torch.float32))
        model, report = family.from_pretrained(
            None, config=config, state_dict=found, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # transformers checks little, so this may be any error
        raise SparselineError(
            f"{path}: its config.json describes no model that its tensors fit ({error})."
        ) from error
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise SparselineError(f"{path}: its tensors are not those that its config.json requires ({wrong}).")
    if model.can_generate() and (path / GENERATION).exists():
        model.generation_config = generation(path)
    return model.eval()


def unpack(path: Path, out: Path) -> None:
    """Write the ordinary checkpoint for ``from_pretrained``, with the original model's partition into
    files.

    Raises:
        SparselineError: as ``tensors``, or ``out`` is in use; then nothing is written.
    """
    dense.check_unused(out)
    checked = manifest.read(path)
    files = {entry.dense: _File(path, checked, name) for name, entry in checked.weights.items()}
    shards = {name: file.blobs() for name, file in files.items()}
    dense.write(
        out, shards, lambda name: files[name].tensors(), (path, sorted(checked.files)), checked.indexed
    )


class _File:
    """One file of weights."""

    def __init__(self, directory: Path, checked: Manifest, name: str) -> None:
        self._path = directory / name
        self._entry = checked.weights[name]

    @contextmanager
    def _open(self) -> Iterator[tuple[Reader, dict[str, Facts]]]:
        """A reader of the file, after a check of its header, and the header's facts about each
        tensor.
        """
        try:
            with opened(self._path) as file:
                reader = Reader(file, self._path, self._entry.bytes, self._entry.header_sha256)
                yield reader, self._described(reader)
        except OSError as error:
            raise SparselineError(
                f"{self._path} cannot be read ({error.strerror}); copy it again."
            ) from error

    def _described(self, reader: Reader) -> dict[str, Facts]:
        try:
            found = Described.model_validate_json(reader.metadata.get("sparseline", ""), strict=True).tensors
            for name, facts in found.items():
                facts.check(
                    {part: reader.blobs[name + part] for part in PARTS if name + part in reader.blobs}
                )
        except ValueError as error:  # a ValidationError too
            reason = " ".join(str(error).split())[:200]
            raise SparselineError(
                f"{self._path} does not conform to docs/artifacts.md ({reason}); take it from another source."
            ) from error
        return found

    def blobs(self) -> dict[str, Blob]:
        """Descriptions of the dense file's tensors."""
        with self._open() as (reader, tensors):
            return {
                name: reader.blobs[name] if facts.verbatim else facts.blob for name, facts in tensors.items()
            }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self._open() as (reader, tensors):
            for name, facts in tensors.items():
                parts = {part: reader.read(name + part) for part in PARTS if name + part in reader.blobs}
                if digest(parts.values()) != facts.sha256:
                    raise SparselineError(
                        f"{self._path} is damaged (the checksum of {name} differs); copy it again."
                    )
                yield name, decode(parts, facts)
