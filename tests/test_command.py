"""The `sparseline` command: what it lays out, what it writes into params.yaml, and that results
follow the installed library.

`.ci/wheel` tries the same with the wheel. Oracles: this checkout's files, its digests, and what git
and DVC say.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import ROOT, environment, read_params, tree
from ruamel.yaml import YAML
from test_graph import instances

from pipeline_lib.command import choices, layout, main, project
from pipeline_lib.core import code
from pipeline_lib.core import environment as versions
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.jobs.keys import STAGES
from pipeline_lib.recipe.variants import read_all

OPTIONS: dict[str, Any] = {
    "model": "embedded",
    "revision": None,
    "preset": "fast",
    "sparsity": None,
    "pattern": None,
    "calibration": None,
}


def sparseline(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The command in this process: its exit code, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparseline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out + err


def written(**options: Any) -> Any:
    """params.yaml as `prune` writes it for these options."""
    found = choices.chosen(layout.shipped(), choices.Choices(**OPTIONS | options))
    return YAML(typ="safe").load(found["params.yaml"].decode())


# Layout


def test_a_project_has_what_its_graph_reads() -> None:
    """Every dep of dvc.yaml that no stage makes. Oracle: the files that git holds here, but for the
    library.
    """
    found = layout.shipped()
    deps = {
        dep
        for one in instances(read_params(ROOT)).values()
        for dep in one.deps
        if not dep.startswith(("build/", "report/"))
    }
    assert deps - {"pipeline_lib", "env.lock.json"} == {
        dep for dep in deps if any(name == dep or name.startswith(f"{dep}/") for name in found)
    }
    for name, raw in found.items():
        assert name == layout.GRAPH or raw == (ROOT / name).read_bytes(), name
    assert not [
        name for name in found if "__pycache__" in name or name.startswith(("tests", "pipeline_lib", "build"))
    ]


def test_the_graph_differs_in_one_stage() -> None:
    """`keys` watches no directory of the library, and so runs always. Oracle: the two files, parsed."""
    own, checkout = (
        YAML(typ="safe").load(text)
        for text in (layout.shipped()[layout.GRAPH].decode(), (ROOT / "dvc.yaml").read_text())
    )
    keys = checkout["stages"]["keys"]
    keys["deps"].remove("pipeline_lib")
    keys["always_changed"] = True
    assert own == checkout


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """Neither a file with other contents, nor any other file then; lines of an own .gitignore stay."""
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / ".gitignore").write_text("mine\n", encoding="utf-8")
    (directory / "params.yaml").write_text("mine: 1\n", encoding="utf-8")
    before = tree(directory)
    with pytest.raises(SparselineError, match=r"own/params\.yaml already exists"):
        layout.lay_out(directory, layout.shipped())
    assert tree(directory) == before
    (directory / "params.yaml").unlink()
    for _ in range(2):  # the second time everything is there already
        layout.lay_out(directory, layout.shipped())
        lines = (directory / ".gitignore").read_text(encoding="utf-8").splitlines()
        assert lines == ["mine", *(ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    assert tree(directory).keys() == layout.shipped().keys()


def test_an_update_renews_what_belongs_to_the_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "team"
    assert sparseline(capfd, "init", str(directory), "--no-git")[0] == 0
    fresh = tree(directory)
    for name in ("dvc.yaml", "params.yaml", "stages/prune.py", "data/stdlib.json"):
        (directory / name).write_text("old", encoding="utf-8")
    assert sparseline(capfd, "init", str(directory), "--update")[0] == 0
    assert {name for name, digest in tree(directory).items() if digest != fresh[name]} == {
        "params.yaml",
        "data/stdlib.json",
    }


# What `prune` is asked for


def test_the_file_keeps_its_comments() -> None:
    """All but those of the variants that go. Oracle: the lines of the shipped file, above the
    variants and below.
    """
    shipped = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    own = choices.chosen(layout.shipped(), choices.Choices(**OPTIONS))["params.yaml"].decode().splitlines()
    first = next(number for number, line in enumerate(shipped) if line.startswith("variants:"))
    last = next(number for number, line in enumerate(shipped) if line.startswith("evaluate:"))
    changed = [line for line in shipped[: first + 1] + shipped[last:] if line not in own]
    assert [line.split()[0] for line in changed] == ["baseline:"]


@pytest.mark.parametrize("preset", ["fast", "best", "distilled"])
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "4:16"}])
def test_choices_are_a_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, options: Mapping[str, Any]
) -> None:
    """The preset and no other, exported for transformers. Oracle: the variant that the stages read."""
    monkeypatch.chdir(tmp_path)
    layout.lay_out(
        tmp_path, choices.chosen(layout.shipped(), choices.Choices(**OPTIONS | {"preset": preset} | options))
    )
    (found,) = read_all().values()
    selection = found.recipe.selection
    assert found.name == preset and "dense" in found.export
    assert selection.pattern == options.get("pattern", "unstructured")
    assert (
        selection.sparsity
        == {"2:4": 0.5, "4:16": 0.75, None: options.get("sparsity", 0.5)}[options.get("pattern")]
    )
    assert (found.recipe.allocation.method == "uniform") == ("pattern" in options)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """Its full path; the embedded model stays out of the project."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}", encoding="utf-8")
    found = choices.chosen(layout.shipped(), choices.Choices(**OPTIONS | {"model": str(tmp_path / "model")}))
    model = YAML(typ="safe").load(found["params.yaml"].decode())["model"]
    assert (model["path"], model["id"], model["revision"]) == (str(tmp_path / "model"), None, None)
    assert not [name for name in found if name.startswith("data/tiny-llama")]


def test_a_model_of_the_hub() -> None:
    model = written(model="owner/name", revision="0" * 40)["model"]
    assert (model["path"], model["id"], model["revision"]) == ("data/hub.json", "owner/name", "0" * 40)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("a.txt", None),
        ("a.jsonl", "text"),
        ("a.parquet", "text"),
        ("texts/a.txt", None),
        ("texts/a.json.gz", "text"),
    ],
)
def test_calibration_text_of_files(tmp_path: Path, name: str, field: str | None) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": ["some"]}), path)
    else:
        path.write_bytes(gzip.compress(b'{"text": "some"}') if path.suffix == ".gz" else b'{"text": "some"}')
    given = tmp_path / Path(name).parts[0]
    texts = written(calibration=str(given))["texts"]
    found = texts["calibration"]
    assert (found["kind"], found["path"], found["name"], found["field"]) == ("files", str(given), None, field)
    assert texts["test"] == read_params(ROOT)["texts"]["test"]


def test_calibration_text_of_the_hub() -> None:
    """Perplexity is then of WikiText-2, and not of the text that calibrates."""
    texts = written(calibration="c4-train")["texts"]
    assert {text["name"] for text in texts.values()} == {"c4-train", "wikitext2-validation", "wikitext2"}
    assert {(text["kind"], text["path"]) for text in texts.values()} == {("hub", "data/hub.json")}


# Refusals

BAD = {
    "prune nowhere/at/all --out new": "nowhere/at/all is not a directory here, no name on the hub",
    "prune no-such-model --out new": "no-such-model is not a directory here",
    "prune empty --out new": "empty has no config.json; give the directory of a Hugging Face checkpoint.",
    "prune model --revision main --out new": "--revision main is for a model of the hub",
    "prune owner/name --out new": (
        "owner/name is not a directory here, and its newest commit cannot be fetched from the hub"
    ),
    "prune embedded": "Missing option '--out'.",
    "prune --out new": "Missing argument 'MODEL'.",
    "prune embedded --out new --preset slow": "'slow' is not one of 'fast', 'best', 'distilled'.",
    "prune embedded --out new --sparsity 1": "1.0 is not in the range 0<x<1.",
    "prune embedded --out new --sparsity half": "'half' is not a valid float range.",
    "prune embedded --out new --pattern 4:2": "--pattern 4:2 is not N:M with 0 < N < M;",
    "prune embedded --out new --pattern 2:4 --sparsity 0.5": (
        "--pattern 2:4 fixes the sparsity; leave --sparsity out."
    ),
    "prune embedded --out new --calibration nothing": "no name in data/hub.json: ptb, c4, c4-train.",
    "prune embedded --out new --calibration wikitext2": (
        "--calibration wikitext2 is no file or directory here"
    ),
    "prune embedded --out file": "Directory 'file' is a file.",
    "prune embedded --out model": "model is not empty (it has config.json) and is not a project",
    "prune model --out model": "--out model is inside MODEL model, whose files would then include",
    "prune model --out model/new": "--out model/new is inside MODEL model",
    "prune embedded --calibration empty --out empty/new": "is inside --calibration empty",
    "prune embedded --calibration empty --out new": "--calibration empty is empty; give a file or",
    "prune embedded --calibration file --out new": "--calibration file is empty; give a file or",
    "prune embedded --calibration noise.jsonl --out new": "noise.jsonl is not UTF-8 text",
    "prune embedded --calibration noise --out new": "noise is not UTF-8 text",
    "prune embedded --calibration other.jsonl --out new": "text",
    "prune bare --out new": "bare holds no tokenizer files (tokenizer.json or vocabulary);",
    "init file/below": "file/below/.dvc: Not a directory",
    "init": "Missing argument 'DIRECTORY'.",
    "run": ". is not a project, because it has no dvc.yaml or no stages/; `sparseline init .` creates one.",
    "run -C empty": "empty is not a project",
    "plan -C empty": "empty is not a project",
    "submit -C empty": "empty is not a project",
    "report -C empty": "empty is not a project",
    "environment -C empty": "empty is not a project",
    "init --update empty": "empty is not a project",
    "sell": "No such command 'sell'.",
    "init new --fast": "No such option",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str
) -> None:
    """Nothing is laid out then. Oracle: exit code, line count, files."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "model", "bare"):
        Path(name).mkdir()
    for name in ("model/config.json", "model/tokenizer.json", "bare/config.json"):
        Path(name).write_text("{}", encoding="utf-8")
    for name in ("noise", "noise.jsonl"):
        Path(name).write_bytes(bytes(range(128, 256)))
    Path("other.jsonl").write_text('{"content": "no field of that name"}\n', encoding="utf-8")
    Path("file").touch()
    before = tree(tmp_path)
    status, said = sparseline(capfd, *line.split())
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1 and BAD[line] in said, said
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: Sparseline", "title: [", "params.yaml cannot be read as YAML"),
        ("sparsity: 0.5 ", "sparsity: 5 ", "prune.selection.sparsity = 5 cannot be used"),
    ],
)
def test_bad_parameters_are_told_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    old: str,
    new: str,
    said: str,
) -> None:
    """DVC adds no line of its own, since it does not run."""
    files = layout.shipped()
    text = files[layout.PARAMS].decode()
    assert text.count(old) == 1
    layout.lay_out(tmp_path, files | {layout.PARAMS: text.replace(old, new).encode()})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    status, told = sparseline(capfd, "run", "-C", str(tmp_path))
    assert status == 2 and told.startswith("error: ") and told.count("\n") == 1 and said in told, told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--local", "nobody"], "params.yaml has no variant 'nobody'"),
        (["--local", "--at-once", "2", "fast"], "this project is in no git repository"),
    ],
)
def test_jobs_are_submitted_from_a_project(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    """Variants and options are the stage's: it tells what is wrong with them."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    layout.lay_out(tmp_path, layout.shipped())
    status, told = sparseline(capfd, "submit", "-C", str(tmp_path), *arguments)
    assert status == 2 and told.startswith("error: ") and told.count("\n") == 1 and said in told, told


def test_help_needs_no_project(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",), *((command, "--help") for command in main.commands.commands)):
        status, said = sparseline(capfd, *arguments)
        assert status == 0 and said.startswith("Usage: sparseline"), said


# Without git, and with it


def no_scm(directory: Path) -> bool:
    """As DVC reads it."""
    from dvc.config import Config

    return bool(Config(str(directory / ".dvc"))["core"].get("no_scm"))


def test_dvc_knows_whether_there_is_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also if git is initialised later, and if a repository around the project ignores it."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    outer, directory = tmp_path / "outer", tmp_path / "outer/team"
    status, said = sparseline(capfd, "init", str(directory), "--no-git")
    assert status == 0 and "has no git repository" in said and no_scm(directory)
    subprocess.run(["git", "init", "--quiet", str(outer)], check=True)
    project.settle(directory)
    assert not no_scm(directory)
    (outer / ".gitignore").write_text("team\n", encoding="utf-8")
    project.settle(directory)
    assert no_scm(directory)


def test_git_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: git's own list of what is added."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    directory = tmp_path / "team"
    assert sparseline(capfd, "init", str(directory), "--git")[0] == 0
    listed = subprocess.run(
        ["git", "-C", str(directory), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(listed) == {*layout.shipped(), "env.lock.json"}
    assert not no_scm(directory)
    monkeypatch.setenv("PATH", "")
    # without git there is nothing to offer
    assert sparseline(capfd, "init", str(tmp_path / "other"), "--git")[0] == 0
    assert no_scm(tmp_path / "other")


# The installed library


@pytest.fixture
def installed(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A project, and an environment in which the library is installed: this checkout's, to change."""
    site, directory = tmp_path / "site", tmp_path / "team"
    shutil.copytree(
        ROOT / "pipeline_lib", site / "pipeline_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    layout.lay_out(directory, layout.shipped())
    project.settle(directory)
    return directory, environment(directory) | {
        "PYTHONPATH": str(site),
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
    }


def run_in(place: tuple[Path, dict[str, str]], *command: str) -> str:
    done = subprocess.run(command, cwd=place[0], env=place[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def digests(directory: Path) -> dict[str, str]:
    found = YAML(typ="safe")
    return {stage: found.load(directory / f"build/keys/code/{stage}.json")["sha256"] for stage in STAGES}


def test_keys_are_those_of_the_checkout_and_follow_the_library(
    installed: tuple[Path, dict[str, str]],
) -> None:
    """Equal files, equal keys; after a change of an installed file plain `dvc repro` changes those
    of the stages that import it, alone.
    """
    directory, environ = installed
    run_in(installed, "python", "-m", "dvc", "repro", "keys")
    before = digests(directory)
    assert before == {stage: code.digest(stage, ROOT) for stage in STAGES}
    name = Path("pipeline_lib/evaluation/perplexity.py")
    with (Path(environ["PYTHONPATH"]) / name).open("a", encoding="utf-8") as file:
        file.write("# another line\n")
    run_in(installed, "python", "-m", "dvc", "repro", "keys")
    after = digests(directory)
    assert {stage for stage in STAGES if after[stage] != before[stage]} == {
        stage for stage in STAGES if name in code.closure(stage, ROOT)
    }


def test_kept_blocks_belong_to_the_code_that_made_them(installed: tuple[Path, dict[str, str]]) -> None:
    """A resume key changes with the installed library and with the project's own stage. Oracle: the
    checkout's key, and inequality.
    """
    ask = "from pipeline_lib.core import runtime; print(runtime.resume_key('prune', '', []))"

    def key(*, cwd: Path) -> str:
        return run_in((cwd, environ), sys.executable, "-c", ask).strip()

    directory, environ = installed
    found = [key(cwd=directory)]
    assert found == [key(cwd=ROOT)]
    for path in (Path(environ["PYTHONPATH"]) / "pipeline_lib/prune/run.py", directory / "stages/prune.py"):
        with path.open("a", encoding="utf-8") as file:
            file.write("# another line\n")
        found.append(key(cwd=directory))
    assert len(set(found)) == 3


def test_messages_name_the_command_where_there_is_no_makefile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.lay_out(tmp_path, layout.shipped())
    for directory, said in ((tmp_path, "`sparseline plan`"), (ROOT, "`make plan`")):
        monkeypatch.chdir(directory)
        assert versions.command("plan") == said


# Processes


@pytest.mark.parametrize(
    ("body", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 143), ("", 0)]
)
def test_a_command_ends_as_it_ends(tmp_path: Path, body: str, status: int) -> None:
    assert project.call(tmp_path, "python", "-c", body) == status


def test_stages_run_with_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether or not its environment is active, and with what the Makefile sets."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    ask = (
        f"import os, sys; print(sys.executable, os.environ['OMP_WAIT_POLICY'], *map(os.environ.get, {names}))"
    )
    assert project.call(tmp_path, "python", "-c", ask) == 0
    python, policy, *values = capfd.readouterr().out.split()
    assert Path(python).parent == Path(sys.executable).parent and policy == "ACTIVE"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, value in zip(names, values, strict=True):
        assert re.search(rf"^export {name} \?= {value}$", makefile, re.MULTILINE)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(SparselineError, match="There is no `python` beside"):
        project.call(tmp_path, "python", "-c", "")
    assert os.environ["PATH"] == "/usr/bin"
