"""Models of the Hugging Face Hub by their names: which files they need, and getting them.

Loading reads local files alone; whoever takes a name from a user calls `local_model` first. The
Hub's own library does the rest: tokens, the cache, going on where a download ended, and working
without a network (``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..foreign import said
from ..memory import size
from .hub_files import files_of, gguf_files
from .hub_names import HubName, hub_name

_LOGIN = "`hf auth login` or HF_TOKEN"


class Unreachable(ConnectionError):
    """The Hub gives no answer, or may not be asked."""


def local_model(text: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """``text``, or the folder or GGUF file of the Hub's model that it names, downloaded by then.

    What exists here keeps its meaning, and so do "demo" and texts that are no names. Where the Hub
    cannot be asked, what was downloaded before serves.

    Raises FileNotFoundError where neither this machine nor the Hub has such a model,
    PermissionError where the Hub does not give it to this user, ConnectionError where it gives no
    answer, and ValueError for a repository that has no model, or several, or more bytes than the
    disk has free.
    """
    name = hub_name(text)
    return text if name is None else download(name)


def download(name: HubName) -> Path:
    """The model's folder or first GGUF file; errors are those of `local_model`."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        commit, files = ask(name)
    except Unreachable as error:
        return _from_cache(name, error)
    repository = name.repository
    with explained(name):
        chosen = files_of(
            name, files, lambda file: Path(hf_hub_download(repository, file, revision=commit))
        )
        _check_room(name, commit, {file: files[file] for file in chosen})
        patterns = [glob.escape(file) for file in chosen]
        # The revision's own name, so that the cache knows later what it stands for.
        folder = snapshot_download(repository, revision=name.branch, allow_patterns=patterns)
    return _model_in(Path(folder), chosen)


def ask(name: HubName) -> tuple[str, dict[str, int]]:
    """The commit that a name stands for, and the bytes of each of its files.

    Raises Unreachable where the Hub cannot be asked, else as `local_model` does.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, repository = HfApi(), name.repository
    with explained(name):
        commit = str(api.model_info(repository, revision=name.branch).sha)
        tree = api.list_repo_tree(repository, recursive=True, revision=commit)
        return commit, {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def cache_folder() -> Path:
    """Where the Hub's library keeps what it downloads; it need not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def to_download(name: HubName, commit: str, files: Mapping[str, int]) -> int:
    """The bytes among ``files`` that are not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name.repository, file, revision=commit), str)

    return sum(nbytes for file, nbytes in files.items() if not cached(file))


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that a folder is on, or will be on."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Within the block, errors of the Hub's library become those of `local_model`."""
    from huggingface_hub import constants, errors

    where = f"[hub] {name}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{where} is gated: accept its terms at {constants.ENDPOINT}/{name.repository}, and log"
            f" in with {_LOGIN}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} does not exist, neither here nor on {constants.ENDPOINT}; a private"
            f" repository needs {_LOGIN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where}: {name.repository} has no such revision.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(f"{where}: the Hub refuses: {said(error)}") from error
        raise Unreachable(f"{where}: {said(error)}") from error
    except (_http_error(), errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise Unreachable(f"{where}: {said(error)}") from error


def _http_error() -> type[Exception]:
    """What the Hub's library raises where nobody answers: an error of its HTTP library."""
    from huggingface_hub import errors

    kind: type[Exception] = vars(errors)["HTTPError"]
    return kind


def _check_room(name: HubName, commit: str, files: Mapping[str, int]) -> None:
    needed, free = to_download(name, commit, files), free_bytes(cache_folder())
    if needed > free:
        raise ValueError(
            f"[hub] {name} takes {size(needed)} more, but the disk of {cache_folder()} has"
            f" {size(free)} free; HF_HOME may name another."
        )


def _from_cache(name: HubName, why: Unreachable) -> Path:
    """The model as it was downloaded before."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir(cache_folder()).repos
    except CacheNotFound:
        repositories = frozenset()
    found = [
        revision
        for repository in repositories
        if (repository.repo_id, repository.repo_type) == (name.repository, "model")
        for revision in repository.revisions
        if name.branch in revision.refs or revision.commit_hash == name.branch
    ]
    if not found:
        raise FileNotFoundError(
            f"[hub] {name} does not exist here, neither as a path nor in {cache_folder()}, and the"
            f" Hub cannot be asked: {_reason(why)}"
        ) from why
    folder = found[0].snapshot_path
    paths = (path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    try:
        return _model_in(folder, files_of(name, files, lambda file: folder / file))
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{error} So it is in {cache_folder()}, and the Hub cannot be asked: {_reason(why)}"
        ) from why


def _reason(why: Unreachable) -> str:
    return said(why if why.__cause__ is None else why.__cause__)


def _model_in(folder: Path, chosen: Iterable[str]) -> Path:
    models = gguf_files(chosen)
    return folder / next(iter(models.values()))[0] if models else folder
