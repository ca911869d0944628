"""Turns what a user names, a directory or a hub id, into a local directory.

Invariants: a hub id is pinned to the commit that was found, which is part of the answer; only data is fetched
(safetensors, JSON, templates), never code or pickles; what is complete in the cache needs no network. Where the cache
and the hub are is huggingface_hub's own business (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN).
"""

import re
from pathlib import Path

import msgspec

from novajax.core.errors import WeightsError

PATTERNS = ("*.safetensors", "*.json", "*.jinja")
IGNORED = ("*/*", "consolidated*.safetensors")
"""Sub-folders hold other forms of a model; consolidated files are a second copy of the weights."""
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


class Source(msgspec.Struct, frozen=True):
    """A model's files on this machine."""

    directory: Path
    hub_id: str | None = None
    commit: str | None = None
    """Of a hub id: the 40 hex digits that were resolved; asking for `hub_id@commit` gives the same bytes for ever."""

    @property
    def name(self) -> str:
        """For people and clients: "org/name", or the directory's own name."""
        return self.hub_id or self.directory.name

    @property
    def pinned(self) -> str:
        """ "org/name@commit", or the directory's own name: what a record keeps."""
        return f"{self.hub_id}@{self.commit}" if self.hub_id else self.directory.name


def resolve(spec: str, *, cache_dir: Path | None = None, endpoint: str | None = None) -> Source:
    """The local directory of `spec`: a directory, or "org/name" or "org/name@revision" on the hub, fetched if need be.

    Raises WeightsError naming the directory, or the id and revision.
    """
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return Source(path.resolve())
    if spec and path.is_file():
        raise WeightsError(f"{spec} is a file; name the directory that holds the model", param="model")
    found = HUB_ID.fullmatch(spec)
    if not found:
        raise WeightsError(f"{spec!r} is neither a directory here nor a hub id like org/name or org/name@revision", param="model")
    hub_id, revision = found["id"], found["revision"] or "main"
    directory = Path(_fetch(hub_id, revision, cache_dir, endpoint))
    commit = directory.name
    if not COMMIT.fullmatch(commit):
        raise WeightsError(f"{hub_id}@{revision}: the cache names no commit for it: {directory}", param="model")
    return Source(directory, hub_id, commit)


def _fetch(hub_id: str, revision: str, cache_dir: Path | None, endpoint: str | None) -> str:
    from huggingface_hub import errors, snapshot_download

    asked, no_directory = f"{hub_id}@{revision}", "there is no local directory of that name either"
    try:
        return snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(IGNORED),
        )
    except errors.GatedRepoError:
        why = "access to it is gated: accept its terms on the hub and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = f"the hub has no such model, or it is private and HF_TOKEN is not set; {no_directory}"
    except errors.RevisionNotFoundError:
        why = "the model exists, this revision does not"
    except errors.IncompleteSnapshotError:
        why = "the hub cannot be reached and the copy in the local cache is incomplete"
    except errors.LocalEntryNotFoundError:
        why = f"the hub cannot be reached (or HF_HUB_OFFLINE is set) and it is not in the local cache; {no_directory}"
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        why = f"fetching it failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    raise WeightsError(f"{asked}: {why}", param="model")
