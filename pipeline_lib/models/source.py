"""The model that params.yaml names: fetch it, and check it against the record of the prepare stage."""

import glob
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

from pipeline_lib.core import files
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.checkpoint import Checkpoint, locate, open_checkpoint
from pipeline_lib.models.files import CONVERT, INDEX, reason_left_out
from pipeline_lib.models.settings import COMMIT, ModelParams
from pipeline_lib.models.written import from_json

HUB = Path("data/hub.json")  # DVC watches this file instead of a model directory
SMALL = 2**26  # bytes; every stage hashes smaller files again, and leaves larger ones to DVC


def fetch(params: ModelParams) -> Path:
    """The local directory of the model. For a hub model, fetch the files to load or copy, at one
    commit. Later stages use ``locate``.

    Raises:
        SparselineError: ``path``, ``id`` and ``revision`` do not match, or the model cannot be
            fetched.
    """
    if params.id is None:
        if params.revision is not None:
            raise SparselineError(
                f"model.revision = {params.revision!r} belongs to a hub model, but model.id is null; set it"
                " to null too."
            )
        return locate(params.path, None, None)
    hub_id, commit = params.id, _commit(params)
    names, reason = _listed(hub_id, commit)
    if names is None:
        try:
            return locate(params.path, hub_id, commit)
        except SparselineError as error:
            raise _unreachable(hub_id, commit, reason) from error
    if not any(name.endswith(".safetensors") and reason_left_out(name) is None for name in names):
        pickled = next((name for name in names if name.endswith(".bin")), None)
        raise SparselineError(
            f"model.id = {hub_id!r}: the repository has no safetensors at"
            f" {commit}{f', but {pickled}' if pickled else ''}; get and convert it with"
            f" `{CONVERT} {hub_id} OUT --revision {commit}`, then give OUT as model.path, and null as id and"
            " revision."
        )
    wanted = [glob.escape(name) for name in names if reason_left_out(name) is None]
    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=wanted))
    except Exception as error:  # from the hub, the network or the disk
        raise _unreachable(hub_id, commit, error) from error


def fetch_pickled(hub_id: str, revision: str | None) -> Path:
    """The local directory of a hub model without safetensors: its .bin files and the files to copy.

    Raises:
        SparselineError: the model cannot be fetched.
    """
    try:
        names = HfApi().list_repo_files(hub_id, revision=revision)
        wanted = [
            name
            for name in names
            if reason_left_out(name) is None
            or re.fullmatch(r"pytorch_model[^/]*\.(bin|bin\.index\.json)", name)
        ]
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=[glob.escape(name) for name in wanted]
            )
        )
    except Exception as error:  # from the hub, the network or the disk
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparselineError(
            f"{hub_id} is not a directory here, and cannot be fetched from the hub: {told}"
        ) from error


def not_fetched(params: ModelParams) -> dict[str, str]:
    """File of the hub's repository -> the reason why it is not fetched. Empty for a local directory, or
    if the repository's files cannot be listed.
    """
    names = None if params.id is None else _listed(params.id, params.revision or "")[0]
    return {name: reason for name in names or [] if (reason := reason_left_out(name)) is not None}


def _commit(params: ModelParams) -> str:
    """``revision``, which must be the full hash of a commit: a branch or tag may move between two stages."""
    hub_id, revision = params.id or "", params.revision
    if hub_id.startswith(("/", ".", "~")) or Path(hub_id).exists():
        raise SparselineError(
            f"model.id = {hub_id!r} is a local directory; give it as model.path, which DVC watches, and set"
            " id to null."
        )
    if params.path != HUB:
        raise SparselineError(
            f"model.path = {str(params.path)!r} would be watched although model.id = {hub_id!r} is used; set"
            f" path to {HUB}, or id to null."
        )
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        now = f"{revision or 'main'} is {HfApi().model_info(hub_id, revision=revision, timeout=10).sha} now"
    except HFValidationError as error:
        raise SparselineError(
            f"model.id = {hub_id!r} is not the name of a model on the hub: {error}"
        ) from error
    except Exception:  # offline, gated or mistyped: the message cannot name the commit
        now = f"`git ls-remote https://huggingface.co/{hub_id}` shows it"
    raise SparselineError(
        f"model.revision = {revision!r} may later refer to other weights of model.id = {hub_id!r}; give the"
        f" full hash of a commit ({now})."
    )


def _listed(hub_id: str, commit: str) -> tuple[list[str] | None, Exception | None]:
    """The names of a repository's files at a commit, from the cache or the hub, or None and the error."""
    try:
        return [file.path for file in get_cached_repo_tree(hub_id, revision=commit)], None
    except CachedRepoTreeNotFoundError:
        pass
    except HFValidationError as error:
        return None, error
    try:
        return sorted(HfApi().list_repo_files(hub_id, revision=commit)), None
    except Exception as error:  # from the hub or the network
        return None, error


def _unreachable(hub_id: str, commit: str, reason: Exception | None) -> SparselineError:
    told = str(reason).strip().splitlines() or [type(reason).__name__]
    return SparselineError(
        f"model.id = {hub_id!r} (revision {commit!r}) cannot be fetched from the hub: {told[0]}"
    )


def identity(sha256: Mapping[str, str]) -> str:
    """A model's digest, computed from the digests of its files."""
    return hashlib.sha256(json.dumps(dict(sha256), sort_keys=True).encode()).hexdigest()[:32]


def recorded_files(checkpoint: Checkpoint) -> list[str]:
    """The files of the model: weights, their index, and files to copy."""
    return sorted({*checkpoint.files.values(), *checkpoint.others, *([INDEX] if checkpoint.indexed else [])})


def open_source(workspace: Workspace, params: ModelParams) -> Checkpoint:
    """Open the checkpoint with the architecture that the prepare stage recorded.

    Raises:
        SparselineError: the record is unusable, or one of the files was changed, added or removed
            since.
    """
    facts = workspace.load(workspace.model)
    try:
        architecture, recorded = from_json(facts["architecture"]), facts["sha256"]
    except (KeyError, TypeError, IndexError) as error:
        raise SparselineError(
            f"{workspace.model} does not say what the model is made of; run `dvc repro` to make it again."
        ) from error
    checkpoint = open_checkpoint(
        locate(params.path, params.id, params.revision), architecture, params.remote_code, params.dequantize
    )
    here = set(recorded_files(checkpoint))
    for name in sorted(here | recorded.keys()):
        path = checkpoint.path / name
        same = name in here and name in recorded
        if not same or (path.stat().st_size < SMALL and files.sha256(path) != recorded[name]):
            raise SparselineError(f"{path} has changed since the prepare stage ran; run `dvc repro` again.")
    return checkpoint
