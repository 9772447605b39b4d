"""The artifacts of a project: every path of the pipeline in one place, and their reading and writing."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.core import artifacts, files, seals
from pipeline_lib.core.errors import SparselineError

if TYPE_CHECKING:
    import torch

DENSE = "dense"  # the source model, in the place of a variant's name


@dataclass(frozen=True)
class Workspace:
    """A project's directory; stages run in it. docs/artifacts.md describes the files."""

    root: Path = Path()
    # at most one: see ``made_for``
    _models: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def keys(self) -> Path:
        """Directory of the stages' keys: the parameters that each stage reads (``<stage>.json``, or
        ``<stage>/<variant>.json``), and the digest of its code (``code/<stage>.json``).
        """
        return self.build / "keys"

    @property
    def model(self) -> Path:
        """Facts about the source model."""
        return self.build / "prepare/model.json"

    @property
    def matrices(self) -> Path:
        """The source model's logical matrices."""
        return self.build / "prepare/matrices.json"

    def texts(self, use: str) -> Path:
        """Directory of the texts of a use (``calibrate``, ``evaluate``): ``<name>.safetensors``."""
        return self.build / "texts" / use

    def generated(self, text: str) -> Path:
        """A text that the source model wrote."""
        return self.build / "generated" / f"{text}.json"

    @property
    def statistics(self) -> Path:
        """Directory of every site's statistics, one file per block."""
        return self.build / "calibrate"

    @property
    def start(self) -> Path:
        """Initial factors and shifts."""
        return self.build / "scale/transform.safetensors"

    @property
    def sensitivity(self) -> Path:
        """Directory of sensitivities and output moments."""
        return self.build / "sensitivity"

    def curves(self, variant: str) -> Path:
        return self.build / "curves" / f"{variant}.json"

    def allocation(self, variant: str) -> Path:
        """Number of weights that each matrix keeps."""
        return self.build / "allocate" / f"{variant}.json"

    def induced(self, variant: str) -> Path:
        """Directory of learned factors; without any it contains only an empty curve."""
        return self.build / "induce" / variant

    def pruned(self, variant: str) -> Path:
        """Directory of a variant's checkpoint, masks and grids."""
        return self.build / "prune" / variant

    def distilled(self, variant: str) -> Path:
        """Directory of the checkpoint after training of the whole model. It contains only a seal
        without training, or if the result was not kept.
        """
        return self.build / "distil" / variant

    def training(self, variant: str) -> Path:
        """Facts about this training; an empty object without any."""
        return self.build / "training" / f"{variant}.json"

    def checkpoint(self, variant: str) -> Path:
        """Directory of the checkpoint that is measured and exported: the trained one if it exists,
        else the pruned one.

        Raises:
            SparselineError: as ``opened``.
        """
        return self.trained(variant) or self.opened(self.pruned(variant)) / "checkpoint"

    def trained(self, variant: str) -> Path | None:
        """The trained checkpoint, or None."""
        found = self.opened(self.distilled(variant)) / "checkpoint"
        return found if found.is_dir() else None

    def facts(self, variant: str) -> Path:
        """Facts about each pruned matrix and block."""
        return self.build / "facts" / f"{variant}.json"

    def evaluation(self, model: str) -> Path:
        """Perplexities of a variant, or of ``dense``."""
        return self.build / "evaluate" / f"{model}.json"

    def completions(self, model: str) -> Path:
        return self.build / "completions" / f"{model}.json"

    def tasks(self, model: str) -> Path:
        """Results by preset and task."""
        return self.build / "tasks" / f"{model}.json"

    def export(self, variant: str) -> Path:
        """Directory of a variant's exported files, with a directory per format."""
        return self.build / "export" / variant

    def sizes(self, model: str) -> Path:
        return self.build / "sizes" / f"{model}.json"

    @property
    def choice(self) -> Path:
        return self.build / "choice.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def of_models(self) -> list[Path]:
        """All existing artifacts of variants and of ``dense``."""
        places = (
            self.curves,
            self.allocation,
            self.induced,
            self.pruned,
            self.facts,
            self.distilled,
            self.training,
        )
        measured = (self.evaluation, self.completions, self.tasks, self.export, self.sizes)
        folders = {place(DENSE).parent for place in (*places, *measured)}
        return [path for folder in sorted(folders) for path in folder.glob("[!.]*")]

    # Reading and writing

    def made_for(self, model: str | None, path: Path) -> None:
        """Record the model of an artifact, by its digest. All artifacts that a stage reads and writes
        must have the same model.

        Raises:
            SparselineError: an artifact of another model was read before.
        """
        if model is not None and not self._models:
            self._models.append(model)
        if model not in (None, *self._models):
            raise SparselineError(
                f"{path} was made for another model than the other artifacts in build/; run `dvc repro` to"
                " make it again."
            )

    def save(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write a JSON object with its seal; an empty one means that the stage had nothing to do."""
        artifacts.write_bytes(path, seals.sealed_json(value, self._seal(path)))

    def load(self, path: Path) -> dict[str, Any]:
        """A JSON object, without its seal.

        Raises:
            SparselineError: it is missing, damaged, another artifact, or of another model.
        """
        return self._checked(path, seals.parse_json)[0]

    def save_tensors(
        self, path: Path, tensors: Mapping[str, "torch.Tensor"], facts: Mapping[str, Any]
    ) -> None:
        """Write a safetensors file with its seal; it is composed in memory."""
        artifacts.write_bytes(path, seals.sealed_tensors(tensors, facts, self._seal(path)))

    def load_tensors(self, path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
        """Tensors and facts.

        Raises:
            SparselineError: as ``load``.
        """
        from safetensors.torch import load

        facts, raw = self._checked(path, seals.parse_facts)
        return load(raw), facts

    def load_facts(self, path: Path) -> dict[str, Any]:
        """The facts alone, without torch; the tensors are checked, too.

        Raises:
            SparselineError: as ``load``.
        """
        return self._checked(path, seals.parse_facts)[0]

    @contextmanager
    def directory(self, path: Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Yield a directory for an artifact's files. It gets a seal, and replaces the old one if
        the body succeeds.

        Args:
            known: SHA-256 of files that need not be read again, by their paths in the directory.
        """
        with artifacts.replacing(path) as temporary:
            temporary.mkdir()
            yield temporary
            self.save(temporary / seals.FILE, {"files": seals.digests(temporary, known or {})})

    def leave_empty(self, path: Path) -> None:
        """Write the directory of a stage that had nothing to do: it contains only its seal."""
        with self.directory(path):
            pass

    def opened(self, path: Path) -> Path:
        """A directory, after a check that its files are those that its stage wrote.

        Raises:
            SparselineError: as ``load``; or a file is missing, damaged or superfluous.
        """
        recorded = self.load(path / seals.FILE)["files"]
        try:
            seals.compare(recorded, seals.digests(path))
        except seals.BrokenSealError as error:
            raise SparselineError(f"{path} {error}; run `dvc repro` to make it again.") from error
        return path

    def included(self) -> list[dict[str, Any]]:
        """The logical matrices to prune, as listed by prepare: name, block, label, kind, shape.

        Raises:
            SparselineError: as ``opened``.
        """
        self.load(self.model)  # records the model that they belong to
        return [
            matrix
            for matrix in artifacts.read_json(self.opened(self.matrices.parent) / self.matrices.name)
            if matrix["included"]
        ]

    def _seal(self, path: Path) -> seals.Seal:
        return seals.Seal(self._file(path), next(iter(self._models), None))

    def _file(self, path: Path) -> str:
        """An artifact's path in the project, with its final name while it is written under a
        temporary one.
        """
        parts = path.relative_to(self.root).parts
        return "/".join(artifacts.final_name(part) for part in parts)

    def _checked(
        self, path: Path, parse: Callable[[bytes, str], tuple[dict[str, Any], seals.Seal]]
    ) -> tuple[dict[str, Any], bytes]:
        try:
            raw = files.read(path)
            value, seal = parse(raw, self._file(path))
        except FileNotFoundError as error:
            raise SparselineError(f"{path} is missing; run `dvc repro` to make it.") from error
        except OSError as error:
            raise SparselineError(
                f"{path} cannot be read ({error.strerror}); run `dvc repro` to make it again."
            ) from error
        except seals.BrokenSealError as error:
            raise SparselineError(f"{path} {error}; run `dvc repro` to make it again.") from error
        self.made_for(seal.model, path)
        return value, raw
