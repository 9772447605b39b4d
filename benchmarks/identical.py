"""Whether two commits give the same checkpoints to the last byte: ``python -m benchmarks.identical
OLD NEW [--renamed sparseline best]``.

Each is cloned, its variants are pruned (those that params.yaml has as comments, too), and every
file below build/prune is compared.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent


def pruned(commit: str, directory: Path) -> dict[str, str]:
    """Path below build/prune -> SHA-256, of all variants at a commit."""
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(directory)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=directory, check=True)
    params = directory / "params.yaml"
    params.write_text(
        re.sub(r"^  # ([\w-]+: \{)", r"  \1", params.read_text(encoding="utf-8"), flags=re.MULTILINE),
        encoding="utf-8",
    )
    variants = YAML(typ="safe").load(params)["variants"]
    subprocess.run([sys.executable, "-m", "stages.environment"], cwd=directory, check=True)
    subprocess.run(
        ["dvc", "repro", "--quiet", *(f"prune@{name}" for name in variants)], cwd=directory, check=True
    )
    files = (
        path for name in variants for path in (directory / "build/prune" / name).rglob("*") if path.is_file()
    )
    return {
        str(path.relative_to(directory / "build/prune")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@click.command(help=__doc__)
@click.argument("old")
@click.argument("new")
@click.option("--renamed", nargs=2, multiple=True, help="old and new name of a variant")
def main(old: str, new: str, renamed: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        before, after = (
            pruned(commit, Path(temporary) / name) for name, commit in (("old", old), ("new", new))
        )
    for one, other in renamed:
        before = {re.sub(f"^{re.escape(one)}/", f"{other}/", path): digest for path, digest in before.items()}
    wrong = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    for path in wrong:
        click.echo(f"{path}: {'differs' if path in before and path in after else 'is in one only'}")
    click.echo(
        f"{len(after) - len(wrong)} of {len(after)} files are the same, of"
        f" {len({path.split('/')[0] for path in after})} variants"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
