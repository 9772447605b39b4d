"""Finished blocks of an interrupted stage: files in its scratch directory, each with a checksum."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline_lib.core import artifacts, files
from pipeline_lib.core.errors import SparselineError


class Kept:
    """Blocks in a directory that a stage holds (``scratch.hold``). A block is finished if its list of
    checksums exists and is correct.
    """

    def __init__(self, directory: Path, what: str, folders: Sequence[str] = (), unit: str = "block") -> None:
        """
        Args:
            what: the beginning of messages, such as "prune wanda".
            folders: the folders that the stage writes to. Anything else with such a name is
                removed.
            unit: what messages call a numbered item.
        """
        self.directory, self._what, self._unit = directory, what, unit
        self._right: dict[int, dict[str, str]] = {}  # block -> its files' SHA-256
        for name in (*folders, "."):
            place = directory / name
            if place.is_symlink() or not place.is_dir():
                artifacts.remove(place)
            place.mkdir(parents=True, exist_ok=True)

    def _list(self, block: int) -> Path:
        return self.directory / f"finished-{block:03d}.json"

    def finish(self, block: int, written: Sequence[Path]) -> None:
        """Mark a block as finished, after its files are written."""
        found = {path.relative_to(self.directory).as_posix(): files.sha256(path) for path in written}
        artifacts.write_json(self._list(block), {"files": found, "sha256": _digest(found)})
        self._right[block] = found

    def finished(self, block: int) -> bool:
        """Whether the block is complete. A damaged one counts as unfinished; the log says so."""
        if block in self._right:
            return True
        if not _exists(self._list(block)):
            return False
        try:
            self._right[block] = self._checked(block)
        except (OSError, SparselineError, ValueError, TypeError, KeyError, AttributeError):
            artifacts.remove(self._list(block))
            click.echo(f"{self._what}: the stored {self._unit} {block} is damaged and is computed again")
            return False
        return True

    def _checked(self, block: int) -> dict[str, str]:
        told: Any = json.loads(files.text(self._list(block)))
        found: dict[str, str] = told["files"]
        if told["sha256"] != _digest(found):
            raise ValueError(f"block {block}")
        for name, digest in found.items():
            if files.sha256(self.directory / name) != digest:
                raise ValueError(name)
        return found

    def latest(self) -> int | None:
        """The largest number of a complete block; None if there is none."""
        listed = [
            int(path.stem.removeprefix("finished-"))
            for path in self.directory.glob("finished-*.json")
            if path.stem[9:].isdigit()
        ]
        return next((number for number in sorted(listed, reverse=True) if self.finished(number)), None)

    def forget(self, block: int) -> None:
        """Mark a block as unfinished, then remove its files."""
        artifacts.remove(self._list(block))
        for name in self._right.pop(block, {}):
            artifacts.remove(self.directory / name)

    def digests(self) -> dict[str, str]:
        """SHA-256 of all files of finished blocks, by their paths in the directory."""
        return {name: digest for found in self._right.values() for name, digest in found.items()}


def _digest(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()
