"""Reading and writing safetensors, whole or sharded, one tensor at a time.

A header is read once and checked against its file, so that a truncated or forged file ends
in one clear line; tensors are then read from where it says they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ecomjax.errors import UserError
from ecomjax.hf.files import read_json, replace_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER = 16 * 2**20
"""Bytes; a model of a million tensors needs less."""

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
    }.items()
}

_WRITTEN = {
    np.dtype(dtype): name
    for dtype, name in (
        (np.bool_, "BOOL"),
        (np.uint8, "U8"),
        (np.int8, "I8"),
        (np.int16, "I16"),
        (np.uint16, "U16"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.int32, "I32"),
        (np.uint32, "U32"),
        (np.float32, "F32"),
        (np.float64, "F64"),
        (np.int64, "I64"),
        (np.uint64, "U64"),
    )
}
"""What is written; the library puts the last of them first, so that all are aligned."""

_RANK = {dtype: rank for rank, dtype in enumerate(_WRITTEN)}

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy", ".npz", ".h5", ".msgpack")


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file as {name: array}, read on demand."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path, self._entries = path, check_header(path)
        with open(path, "rb") as file:
            self._start = 8 + int.from_bytes(file.read(8), "little")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype, offset = _DTYPES[entry["dtype"]], self._start + entry["data_offsets"][0]
        count = math.prod(entry["shape"])
        return np.fromfile(self._path, dtype, count, offset=offset).reshape(entry["shape"])


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """The weights of a Hugging Face folder as {name: array}, read on demand.

    Attributes:
        files: the weight files, in the order of their names.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = Path(folder)
        if (folder / INDEX).is_file():
            opened, self._file_of = _read_index(folder)
        elif (folder / SINGLE).is_file():
            opened = {SINGLE: SafetensorsFile(folder / SINGLE)}
            self._file_of = dict.fromkeys(opened[SINGLE], opened[SINGLE])
        else:
            raise _no_weights(folder)
        self.files = [folder / file for file in sorted(opened)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name][name]


def _read_index(folder: Path) -> tuple[dict[str, SafetensorsFile], dict[str, SafetensorsFile]]:
    """{name: file} and {tensor: file} of a sharded folder; all files lie in the folder itself."""
    where = str(folder / INDEX)
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
        raise UserError("no weight_map of names to files", where, "fetch the file again")
    held: dict[str, SafetensorsFile] = {}
    for file in sorted(set(named.values())):
        path = folder / file
        inside = Path(file).name == file and file.endswith(".safetensors") and "\\" not in file
        if not inside or not _stays_inside(path, folder):
            raise UserError(
                f"index names a file outside the folder: {file!r}", where, "do not trust this model"
            )
        if not path.is_file():
            raise UserError(f"missing shard {file!r}", where, "fetch the model again")
        held[file] = SafetensorsFile(path)
    stray = sorted({(name, file) for file in held for name in held[file]} ^ set(named.items()))
    if stray:
        raise UserError(
            "index and shard {1!r} disagree about tensor {0!r}".format(*stray[0]),
            where,
            "fetch the model again",
        )
    return held, {name: held[file] for name, file in named.items()}


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a shard is in its folder, or where the Hub's cache puts it (../../blobs)."""
    real = path.resolve()
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    return real.parent in roots


def _no_weights(folder: Path) -> UserError:
    names = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if names:
        return UserError(
            f"weights in the format of {names[0]!r} are not read",
            str(folder),
            "convert them to safetensors with save_pretrained(..., safe_serialization=True)",
        )
    return UserError(
        "no model.safetensors or model.safetensors.index.json", str(folder), "check the path"
    )


def check_header(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """{tensor: header entry} of a safetensors file, every extent held against the file."""
    fault = "unreadable"
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _Broken(f"is truncated: its header is {length} bytes, the file {size}")
            if length > MAX_HEADER:
                raise _Broken(f"has a header of {length} bytes")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        return _check_extents(header, size - 8 - length)
    except _Broken as error:
        fault = str(error)
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        fault = "has a header that is not JSON in UTF-8"
    raise UserError(f"safetensors file {fault}", str(path), "fetch the file again")


class _Broken(Exception):
    """What is wrong with a header."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Broken(f"names {key!r} twice")
        found[key] = value
    return found


def _check_extents(header: Any, data_bytes: int) -> dict[str, dict[str, Any]]:
    if not isinstance(header, dict):
        raise _Broken("has a header that is no object")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    extents = []
    for name, entry in tensors.items():
        try:
            width, shape = _DTYPES[entry["dtype"]].itemsize, entry["shape"]
            start, end = entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            width, shape, start, end, sound = 0, [], 0, 0, False
        if not sound or end - start != width * math.prod(shape):
            raise _Broken(f"has a header entry of tensor {name!r} that contradicts itself")
        extents.append((start, end, name))
    reached = 0
    for start, end, name in sorted(extents):
        if start != reached:
            raise _Broken(f"has a gap or an overlap before tensor {name!r}")
        reached = end
    if reached != data_bytes:
        raise _Broken(
            f"is truncated or padded: {data_bytes} bytes of data, its header says {reached}"
        )
    return tensors


def write_folder(
    folder: str | os.PathLike[str],
    shapes: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `model.safetensors`, or shards and their index if it would be larger.

    Args:
        folder: exists.
        shapes: what has a shape and a dtype, by the names of all tensors.
        tensors: these tensors in any order; none is held longer than it takes to write it.
        max_shard_bytes: a tensor that is larger has a shard of its own.
    """
    folder = Path(folder)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if shards[-1] and held + _size(shape) > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += _size(shape)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with contextlib.ExitStack() as stack:
        writers = {}
        for file, names in zip(files, shards, strict=True):
            write = stack.enter_context(_writing(folder / file, {n: shapes[n] for n in names}))
            writers |= dict.fromkeys(names, write)
        for name, tensor in tensors:
            writers[name](name, tensor)
            del tensor  # before the next one is made
    if len(shards) > 1:
        total = sum(map(_size, shapes.values()))
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        replace_file(folder / INDEX, json.dumps(index, indent=2))


def write_file(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes one file under a temporary name, then renames; see `write_folder`."""
    with _writing(Path(path), shapes) as write:
        for name, tensor in tensors:
            write(name, tensor)
            del tensor  # before the next one is made


@contextlib.contextmanager
def _writing(path: Path, shapes: Mapping[str, Any]) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yields what writes a tensor to its place in a file, whose header stands already.

    The file is byte by byte the one that the library writes.
    """
    names = sorted(shapes, key=lambda name: (-_RANK[np.dtype(shapes[name].dtype)], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in names:
        places[name], end = end, end + _size(shapes[name])
        header[name] = {
            "dtype": _WRITTEN[np.dtype(shapes[name].dtype)],
            "shape": list(shapes[name].shape),
            "data_offsets": [places[name], end],
        }
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    told += b" " * (-len(told) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    missing = set(names)

    def write(name: str, tensor: np.ndarray) -> None:
        expected = shapes[name]
        if (tensor.shape, tensor.dtype) != (tuple(expected.shape), expected.dtype):
            raise ValueError(f"{name}: {tensor.shape} {tensor.dtype}, announced was {expected}")
        missing.remove(name)
        file.seek(8 + len(told) + places[name])
        file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    try:
        with open(temporary, "wb") as file:
            file.write(len(told).to_bytes(8, "little") + told)
            yield write
            if missing:
                raise ValueError(f"{path}: tensor {min(missing)!r} was not written")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _size(shape: Any) -> int:
    """Bytes of what has a shape and a dtype."""
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize
