"""Checkpoints: training state by step, and the best adapter; the only user of orbax.

A checkpoint is a folder named by its step, made under a temporary name and renamed when all of
it is on disk, so a killed process leaves the step before usable:

    00000040/state/         the arrays of the state, written by orbax
    00000040/data.json      what is no array: data position and bookkeeping of the loop
    00000040/manifest.json  sha256 of every file above, checked before anything is used

Saving is synchronous: `save` returns when the step is on disk. The state of an adapter is small,
and a failure shows at the step where it happens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from ecomjax import trees
from ecomjax.errors import UserError

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
BEST = "best"
REMEDY = "delete this folder to start again, or restore it from a copy"


class Damaged(Exception):
    """A checkpoint that is not as it was written."""


class Checkpoints:
    """The checkpoints of a run, the newest few and the best one.

    A best checkpoint stands apart, under `best/`, and may hold less than the whole state. It is
    kept as long as a kept step could go back to it: whatever step a run resumes from, the best
    of the steps before it is still there.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder)
        self.best_folder = self.folder / BEST
        self.keep = keep
        self._told: set[str] = set()

    def steps(self) -> list[int]:
        """All saved steps, ascending."""
        return self._list(self.folder)

    def latest(self) -> int | None:
        """The newest saved step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the best checkpoint."""
        return max(self._list(self.best_folder), default=None)

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Writes a step and forgets those beyond `keep`.

        Args:
            step: optimizer steps done.
            state: pytree of jax or numpy arrays, PRNG keys included.
            data: what JSON can hold; NaN and infinities survive.
        """
        _write(self.folder, step, state, data)
        kept = self.steps()[-self.keep :]
        bests = self._list(self.best_folder)
        needed = {max((b for b in bests if b <= s), default=None) for s in kept}
        self._forget(self.folder, lambda s: s not in kept)
        self._forget(self.best_folder, lambda b: b not in needed and b <= kept[-1])

    def save_best(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Writes the best checkpoint so far; `better` says whether there is a new one."""
        _write(self.best_folder, step, state, data)

    def cut_back(self, step: int) -> None:
        """Forgets what a killed run has written beyond the step it resumes from."""
        self._forget(self.folder, lambda s: s > step)
        self._forget(self.best_folder, lambda b: b > step)

    def restore(self, step: int | None, abstract: Any) -> tuple[Any, dict[str, Any], int]:
        """Reads a step back, bit by bit; None: the newest that is undamaged.

        Args:
            step: one of `steps()`, or None.
            abstract: pytree of arrays or `ShapeDtypeStruct`s, for structure, types and sharding.

        Returns:
            State, data and step.

        Raises:
            UserError: no usable checkpoint, or one of another structure.
        """
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                return *_read(self.folder, candidate, abstract), candidate
            except Damaged as error:
                what = f"damaged checkpoint ({error})"
                where = str(_place(self.folder, candidate))
                if step is not None:
                    raise UserError(what, where, REMEDY) from error
                logger.warning("%s: %s; going back to the one before", what, where)
        raise UserError("no usable checkpoint", str(self.folder), REMEDY)

    def restore_best(self, abstract: Any) -> tuple[Any, dict[str, Any], int]:
        """As `restore`, for the best checkpoint."""
        step = self.best()
        if step is None:
            raise UserError("no best checkpoint", str(self.best_folder), "train first")
        try:
            return *_read(self.best_folder, step, abstract), step
        except Damaged as error:
            where = str(_place(self.best_folder, step))
            raise UserError(f"damaged checkpoint ({error})", where, REMEDY) from error

    def _list(self, folder: Path) -> list[int]:
        """Steps of a folder; what else lies there is told once and left alone."""
        if not folder.is_dir():
            return []
        steps, foreign = [], []
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False) and re.fullmatch(r"\d{8,}", entry.name):
                steps.append(int(entry.name))
            elif entry.name != BEST and not entry.name.startswith(TEMPORARY):
                foreign.append(str(folder / entry.name))
        if new := sorted(set(foreign) - self._told):
            logger.warning("ignored, as no checkpoint of ours: %s", ", ".join(new))
            self._told.update(new)
        return sorted(steps)

    def _forget(self, folder: Path, condition: Callable[[int], bool]) -> None:
        for step in self._list(folder):
            if condition(step):
                _remove(_place(folder, step))


def better(score: float, best: float | None) -> bool:
    """Whether a score (the higher the better) is a new best; NaN never is."""
    return not math.isnan(score) and (best is None or score > best)


def _place(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}"


def _write(folder: Path, step: int, state: Any, data: Mapping[str, Any]) -> None:
    arrays, keys = _disassemble(state)
    place, temporary = _place(folder, step), folder / f"{TEMPORARY}{step:08d}"
    text = json.dumps({"step": step, "data": data, "keys": keys}, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        ocp.save(str(temporary / "state"), trees.unflatten(arrays))
        (temporary / "data.json").write_text(text, encoding="utf-8")
        manifest = json.dumps(_digests(temporary), indent=2)
        (temporary / "manifest.json").write_text(manifest, encoding="utf-8")
        _sync(temporary)
        _remove(place)
        os.replace(temporary, place)
        _sync_folder(folder)
    except (OSError, ValueError) as error:
        # Orbax's storage layer tells a full disk as a ValueError.
        told = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(told[1]) if told else getattr(error, "errno", None)
        if code is None:
            raise
        raise UserError(
            f"cannot write a checkpoint ({os.strerror(code)})",
            str(place),
            "make room or mend the rights; the steps before are intact and training resumes there",
        ) from error


def _read(folder: Path, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    place = _place(folder, step)
    try:
        manifest = json.loads((place / "manifest.json").read_bytes())
        if manifest != _digests(place):
            raise Damaged("its files are not those of manifest.json")
        stored = json.loads((place / "data.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(str(error)) from error
    wanted, _ = _disassemble(abstract)
    found = {
        path: (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
        for path, leaf in trees.flatten(ocp.metadata(str(place / "state")).metadata).items()
    }
    forms = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in wanted.items()}
    differing = sorted(p for p in found.keys() | forms if found.get(p) != forms.get(p))
    if differing:
        first = differing[0]
        raise UserError(
            f"checkpoint of another state: {len(differing)} arrays differ, first {first}: "
            f"{found.get(first, 'absent')} is stored, {forms.get(first, 'absent')} is wanted",
            str(place),
            "resume with the config that made it",
        )
    arrays = trees.flatten(ocp.load(str(place / "state"), trees.unflatten(wanted)))
    return _assemble(abstract, arrays, stored["keys"]), stored["data"]


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _paths(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of any pytree: structs and named tuples by their field names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


def _disassemble(tree: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Leaves by path as orbax takes them, and the kinds of the PRNG keys among them.

    Concrete leaves stay as they are; abstract ones get a sharding, by default on one device.
    """
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays, keys = {}, {}
    for path, leaf in _paths(tree):
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        if _is_key(leaf):
            if abstract:
                leaf = jax.eval_shape(jax.random.key_data, leaf)
            else:
                keys[path] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
        if abstract:
            sharding = leaf.sharding or one_device
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        arrays[path] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    return arrays, keys


def _assemble(abstract: Any, arrays: Mapping[str, Any], keys: Mapping[str, str]) -> Any:
    """The tree of `abstract` with the leaves of `arrays`."""
    leaves = [
        jax.random.wrap_key_data(arrays[path], impl=keys[path]) if path in keys else arrays[path]
        for path, _ in _paths(abstract)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, the manifest itself aside."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path != folder / "manifest.json":
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _sync(folder: Path) -> None:
    """Has everything below a folder on disk before it gets its name."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(place: Path) -> None:
    """Deletes a step; it loses its name first, so it is never met half deleted."""
    if place.exists():
        doomed = place.with_name(f"{TEMPORARY}old-{place.name}")
        os.replace(place, doomed)
        shutil.rmtree(doomed)
