"""Fixtures: one tiny checkpoint per family, made once per run when first asked for; tests that
change files copy it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as in ``stages``
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU
# Before transformers and datasets are imported: no network, no writes to the user's caches.
_CACHE = tempfile.mkdtemp(prefix="sparseline-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import ALL_FAMILIES, FAMILIES, make_model  # noqa: E402

from pipeline_lib.core.products import rounding  # noqa: E402
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint  # noqa: E402

# The files that take longest, first: at the end of the run one of them would keep one process busy alone.
SLOW = (
    "test_pipeline",
    "test_experiments",
    "test_resume",
    "test_sharing",
    "test_memory",
    "test_bad_input",
    "test_plan",
    "test_report",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[None]:
    """One thread (the models are tiny), and the datasets cache removed at the end."""
    torch.set_num_threads(1)
    yield
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def onednn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether oneDNN computes products, by an indirect parameter: no, whatever a stage chose that an
    earlier test ran in this process.
    """
    with rounding(getattr(request, "param", False)):
        yield


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> directory of its tiny checkpoint (float32), made when first asked for. Read only."""
    root = tmp_path_factory.mktemp("models")

    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            return self.setdefault(family, make_model(root / family, family, seed=ALL_FAMILIES.index(family)))

    return Models()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn; modules that must hold for all of them have a fixture of their own."""
    return str(request.param)


@pytest.fixture
def model_path(family: str, model_paths: dict[str, Path]) -> Path:
    return model_paths[family]


@pytest.fixture
def checkpoint(model_path: Path) -> Checkpoint:
    return open_checkpoint(model_path)


@pytest.fixture
def llama(model_paths: dict[str, Path]) -> Checkpoint:
    return open_checkpoint(model_paths["llama"])


@pytest.fixture
def copy_of(tmp_path: Path, model_paths: dict[str, Path]) -> Callable[[str], Path]:
    """A private copy of a family's checkpoint, to be damaged."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(model_paths[family], tmp_path / f"copy-{family}"))

    return copy
