"""Reads tensors, or slices of them, from a directory of safetensors files.

Invariants: every file's header is checked by the safetensors library before a byte of data is believed; every tensor
has exactly one place; nothing larger than the slice's rows is ever held; every error names the file, and the tensor
where there is one. It does not know models, devices or our names.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from novajax.core.errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""What weights may be stored as."""

Allocate = Callable[[int], np.ndarray]
"""Bytes wanted -> a uint8 array of that size."""


def fresh(size_bytes: int) -> np.ndarray:
    """The plain `Allocate`."""
    return np.empty(size_bytes, np.uint8)


class Tensor(msgspec.Struct, frozen=True):
    """Where a tensor lies. `start` and `stop` are byte offsets in the file."""

    name: str
    file: str
    dtype: str
    """safetensors' own word: F32, BF16, F8_E4M3 ..."""
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsDirectory:
    """An open directory: `tensors` by name, `files` in the order they are named, and `read`. Threads may share it.

    Raises WeightsError when opened over files that are missing, cut, corrupt or not what the index says.
    """

    def __init__(self, directory: Path, dtypes: Mapping[str, np.dtype[Any]] = DTYPES):
        """dtypes: what tensors that are read may be stored as."""
        self.directory = directory
        self._dtypes = dtypes
        self._descriptors: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        wanted = _wanted(directory)
        self.files = tuple(dict.fromkeys(wanted.values())) if wanted else (SINGLE,)
        try:
            for file in self.files:
                self._open(file, wanted)
        except BaseException:
            self.close()
            raise
        for name, file in wanted.items():
            if name not in self.tensors:
                raise WeightsError(f"{directory / file}: the tensor {name!r}, named by {INDEX}, is not in this file")

    def read(self, name: str, index: tuple[slice, ...], allocate: Allocate = fresh) -> np.ndarray:
        """`tensor[index]` (unit steps) in its stored dtype.

        Reads the one run of bytes that spans the slice, into memory from `allocate`: exact when only leading dimensions are cut.
        """
        tensor = self.tensors[name]
        dtype = self.dtype(name)
        bounds = [part.indices(size)[:2] for part, size in zip(index, tensor.shape, strict=True)]
        strides = [1] * len(bounds)  # in elements
        for axis in range(len(bounds) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * tensor.shape[axis + 1]
        offset, axis = 0, 0
        while axis < len(bounds) - 1 and bounds[axis][1] - bounds[axis][0] == 1:
            offset += bounds[axis][0] * strides[axis]
            axis += 1
        start, stop = bounds[axis] if bounds else (0, 1)
        stride = strides[axis] if bounds else 1
        rest = tensor.shape[axis + 1 :]
        raw = allocate((stop - start) * stride * dtype.itemsize)
        self._fill(tensor, memoryview(raw), tensor.start + (offset + start * stride) * dtype.itemsize)
        values = raw.view(dtype)
        values = values.reshape((1,) * axis + (stop - start, *rest)) if bounds else values.reshape(())
        return values[tuple(slice(None) if i <= axis else slice(*bound) for i, bound in enumerate(bounds))]

    def dtype(self, name: str) -> np.dtype[Any]:
        """The numpy dtype of a tensor. Raises WeightsError for a dtype that weights may not have."""
        tensor = self.tensors[name]
        if tensor.dtype not in self._dtypes:
            why = "quantized, and config.json has no quantization_config" if tensor.dtype.startswith("F8") else "not a weight's dtype"
            raise WeightsError(f"{self.directory / tensor.file}: {name!r} is {tensor.dtype}: {why}; supported: {', '.join(self._dtypes)}")
        return self._dtypes[tensor.dtype]

    def close(self) -> None:
        """Closes the files. May be called twice."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "SafetensorsDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, file: str, wanted: dict[str, str]) -> None:
        path = self.directory / file
        try:
            with safe_open(path, "numpy"):
                pass
            descriptor = self._descriptors[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header = msgspec.json.decode(os.pread(descriptor, length, 8), type=dict[str, dict[str, Any]])
        except FileNotFoundError:
            named = f"; {INDEX} names it" if wanted else ""
            raise WeightsError(f"{path}: no such file{named}") from None
        except (SafetensorError, OSError, msgspec.MsgspecError) as error:
            raise WeightsError(f"{path}: cut or corrupt: {error}") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self.tensors:
                raise WeightsError(f"{path}: the tensor {name!r} is also in {self.tensors[name].file}")
            if wanted and name not in wanted:
                raise WeightsError(f"{path}: holds the tensor {name!r}, which {INDEX} does not name")
            if wanted and wanted[name] != file:
                raise WeightsError(f"{path}: holds the tensor {name!r}, which {INDEX} places in {wanted[name]}")
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            self.tensors[name] = Tensor(name, file, entry["dtype"], shape, 8 + length + start, 8 + length + stop)

    def _fill(self, tensor: Tensor, buffer: memoryview, offset: int) -> None:
        while buffer:
            try:
                got = os.preadv(self._descriptors[tensor.file], [buffer], offset)
            except OSError as error:
                raise WeightsError(f"{self.directory / tensor.file}: reading {tensor.name!r} failed: {error.strerror}") from None
            if not got:
                raise WeightsError(f"{self.directory / tensor.file}: ends at byte {offset}, inside {tensor.name!r}: the file was cut")
            buffer, offset = buffer[got:], offset + got


def _wanted(directory: Path) -> dict[str, str]:
    """Tensor name -> file name as the index says; empty when there is one file and no index."""
    if (directory / SINGLE).exists():
        return {}
    index = directory / INDEX
    if not index.exists():
        raise WeightsError(_explain_absence(directory))
    try:
        wanted = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightsError(f"{index}: not a safetensors index: {error}") from None
    for name, file in wanted.items():
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise WeightsError(f"{index}: {name!r} is placed in {file!r}, which is not the plain name of a safetensors file")
    if not wanted:
        raise WeightsError(f"{index}: names no tensors")
    return wanted


def _explain_absence(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and "training_args" not in name]
    if any(name.endswith(".safetensors") for name in names):
        return f"{directory}: has safetensors files but neither {SINGLE} nor {INDEX}"
    if pickles:
        advice = "save it again as safetensors (in transformers: model.save_pretrained(directory), safe_serialization on)"
        return f"{directory}: has only {pickles[0]}, a pickle, which is never loaded because it can run code; {advice}"
    if any(name.endswith(".gguf") for name in names):
        return f"{directory}: has only GGUF files, which are not supported yet; use the safetensors form of the model"
    return f"{directory}: holds no {SINGLE}"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
