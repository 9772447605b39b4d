"""Where the artifacts of a project are: every path of the pipeline, in one place."""

from dataclasses import dataclass
from pathlib import Path

DENSE = "dense"  # the source model, where variants are named


@dataclass(frozen=True)
class Workspace:
    """A project's directory; stages run in it. docs/artifacts.md says what the files hold."""

    root: Path = Path()

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def keys(self) -> Path:
        """What each stage reads of params.yaml: ``<stage>.json``, or ``<stage>/<variant>.json``; of the code: ``code/<stage>.json``."""
        return self.build / "keys"

    @property
    def model(self) -> Path:
        """Facts about the source model."""
        return self.build / "prepare/model.json"

    @property
    def matrices(self) -> Path:
        """Its logical matrices."""
        return self.build / "prepare/matrices.json"

    def texts(self, use: str) -> Path:
        """Directory of the texts of a use (``calibrate``, ``evaluate``): ``<name>.safetensors``."""
        return self.build / "texts" / use

    @property
    def statistics(self) -> Path:
        """Directory of every site's statistics, a file per block."""
        return self.build / "calibrate"

    @property
    def start(self) -> Path:
        """Where factors and shifts start."""
        return self.build / "scale/transform.safetensors"

    @property
    def sensitivity(self) -> Path:
        """Directory of sensitivities and output moments."""
        return self.build / "sensitivity"

    def curves(self, variant: str) -> Path:
        return self.build / "curves" / f"{variant}.json"

    def allocation(self, variant: str) -> Path:
        """How many weights each matrix keeps."""
        return self.build / "allocate" / f"{variant}.json"

    def induced(self, variant: str) -> Path:
        """Directory of learned factors; without any it holds the curve alone, which is empty."""
        return self.build / "induce" / variant

    def pruned(self, variant: str) -> Path:
        """Directory of a variant's checkpoint, masks and grids."""
        return self.build / "prune" / variant

    def facts(self, variant: str) -> Path:
        """What happened to each matrix and block."""
        return self.build / "facts" / f"{variant}.json"

    def evaluation(self, model: str) -> Path:
        """Perplexities of a variant, or of ``dense``."""
        return self.build / "evaluate" / f"{model}.json"

    def completions(self, model: str) -> Path:
        return self.build / "completions" / f"{model}.json"

    def tasks(self, model: str) -> Path:
        """Accuracies by preset and task."""
        return self.build / "tasks" / f"{model}.json"

    def export(self, variant: str) -> Path:
        """Directory of a variant's files to take elsewhere, a directory per format."""
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
        """All that is there of any variant, or of ``dense``."""
        places = (self.curves, self.allocation, self.induced, self.pruned, self.facts, self.evaluation, self.completions, self.tasks)
        folders = {place(DENSE).parent for place in (*places, self.export, self.sizes)}
        return [path for folder in sorted(folders) for path in folder.glob("[!.]*")]
