"""The manifest of a sealed checkpoint: what it holds, for which parameter tree, and the hash of every file.

Invariants: a path in a manifest stays inside its directory; two seals of equal weights have equal digests; a manifest is
written last, so a directory that has one was finished. It does not know how the arrays are stored.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import msgspec
from flax import nnx

from novajax.core.errors import WeightsError
from novajax.models.config import ModelConfig
from novajax.quant.profile_file import Rules
from novajax.weights.hashing import FileHashes

MANIFEST = "manifest.json"
ARRAYS = "arrays"
FORMAT = 1


class FileEntry(msgspec.Struct, frozen=True):
    """One file: its path relative to the directory, in posix form."""

    path: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a sealed directory is."""

    format: int = FORMAT
    version: str
    """Of the program that sealed it."""
    source: str
    """Where the weights came from: "org/name@commit" or a directory's name."""
    model: ModelConfig
    dtype: str
    parameters: int
    spec_digest: str
    profile: str = ""
    """Name of the precision profile or format that the weights are quantized by; empty: they are not."""
    rules: Rules = ()
    """The profile itself."""
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """Identifies the weights: the model, the dtype, the profile and every array's bytes, not when or from where they were sealed."""
        arrays = [(entry.path, entry.sha256) for entry in self.files if is_array(entry.path)]
        profile = [self.profile_digest] if self.rules else []
        return hashlib.sha256(msgspec.json.encode((self.model, self.dtype, self.spec_digest, arrays, *profile))).hexdigest()

    @property
    def profile_digest(self) -> str:
        """Identifies the rules."""
        return hashlib.sha256(msgspec.json.encode(self.rules)).hexdigest()


def is_array(path: str) -> bool:
    """Whether the file holds an array's values or form, and not a side file or Orbax's own bookkeeping."""
    parts = PurePosixPath(path).parts
    return len(parts) >= 3 and parts[0] == ARRAYS and parts[1] != "array_metadatas"


def array_name(path: Iterable[object]) -> str:
    """A parameter's path as one name, e.g. "layers.3.attention.q": also the folder of its array."""
    return ".".join(map(str, path))


def spec_digest(state: nnx.State) -> str:
    """The hash of every parameter's path, shape, dtype and logical axes in an (abstract) state."""
    lines = [
        (array_name(path), tuple(variable.get_value().shape), str(variable.get_value().dtype), variable.get_metadata("axes"))
        for path, variable in nnx.to_flat_state(state)
    ]
    return hashlib.sha256(msgspec.json.encode(sorted(lines, key=lambda line: line[0]))).hexdigest()


def list_files(directory: Path, folder: str = "") -> tuple[FileEntry, ...]:
    """An entry for every file under `directory / folder`, hashed."""
    paths = sorted(path for path in (directory / folder).rglob("*") if path.is_file() and path != directory / MANIFEST)
    with FileHashes(paths) as hashes:
        return tuple(FileEntry(path.relative_to(directory).as_posix(), path.stat().st_size, hashes.wait(path)) for path in paths)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a sealed directory; None when the directory is not a sealed one.

    Raises WeightsError when it is cut, of a later format, or names paths outside the directory, and when the arrays of a
    sealed checkpoint lie there without it.
    """
    path = directory / MANIFEST
    if not path.exists():
        if (directory / ARRAYS / "_METADATA").exists():
            raise WeightsError(f"{path}: missing, but {ARRAYS}/ of a sealed checkpoint is there: it was not finished or not copied whole")
        return None
    try:
        data = path.read_bytes()
        format_ = msgspec.json.decode(data, type=_Format).format
        if format_ != FORMAT:
            raise WeightsError(f"{path}: format {format_}; this version reads format {FORMAT}: convert the model again")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightsError(f"{path}: cut or corrupt: {error}") from None
    for entry in manifest.files:
        pure = PurePosixPath(entry.path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise WeightsError(f"{path}: names {entry.path!r}, which is not inside the directory")
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Refuses, by name, files that are missing or have another size, and files among the arrays that nobody sealed."""
    for entry in manifest.files:
        path = directory / entry.path
        try:
            size_bytes = path.stat().st_size
        except OSError:
            raise WeightsError(f"{path}: missing; {MANIFEST} names it") from None
        if size_bytes != entry.size_bytes:
            raise WeightsError(f"{path}: {size_bytes:,} bytes, {MANIFEST} says {entry.size_bytes:,}: cut or replaced")
    known = {entry.path for entry in manifest.files}
    for path in sorted((directory / ARRAYS).rglob("*")):
        if path.is_file() and path.relative_to(directory).as_posix() not in known:
            raise WeightsError(f"{path}: {MANIFEST} does not name it")


def check_hash(directory: Path, entry: FileEntry, hashes: FileHashes) -> None:
    """Refuses the file, by name, when its hash is another."""
    if hashes.wait(directory / entry.path) != entry.sha256:
        raise WeightsError(f"{directory / entry.path}: sha256 differs from {MANIFEST}: corrupt or replaced")


def check_hashes(directory: Path, entries: Iterable[FileEntry]) -> None:
    """`check_hash` of several."""
    entries = tuple(entries)
    with FileHashes(directory / entry.path for entry in entries) as hashes:
        for entry in entries:
            check_hash(directory, entry, hashes)


class _Format(msgspec.Struct):
    format: int
