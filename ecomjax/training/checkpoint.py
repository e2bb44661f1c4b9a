"""Checkpoints: training state by step, and the best adapter; the only user of orbax.

A checkpoint is a folder named by its step, whole or not there at all (see `training.manifest`):

    00000040/state/         the arrays of the state, written by orbax
    00000040/data.json      what is no array: data position and bookkeeping of the loop
    00000040/manifest.json  sha256 of every file above, checked before anything is used

Saving is asynchronous: `save` returns when the arrays are in the memory of the host, so that the
next step may take over their buffers; a thread writes and commits. One save is in flight at a
time. If it fails, the next `check`, `wait` or save raises, and no step of that name is there.

Several processes write one folder on a file system that they share. All of them make the same
calls in the same order, and each writes the arrays it holds. All else is done by process 0, which
also decides which step is read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.training import manifest
from ecomjax.training.manifest import TEMPORARY

logger = logging.getLogger(__name__)

BEST = "best"
REMEDY = "delete this folder to start again, or restore it from a copy"


class Checkpoints:
    """The checkpoints of a run, the newest few and the best one.

    A best checkpoint stands apart, under `best/`, and may hold less than the whole state. It is
    kept as long as a kept step could go back to it: whatever step a run resumes from, the best
    of the steps before it is still there.

    As a context, it waits at its end for the save in flight.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder)
        self.best_folder = self.folder / BEST
        self.keep = keep
        self._told: set[str] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._saving: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)

    def steps(self) -> list[int]:
        """All saved steps, ascending; one in flight is none of them."""
        return self._list(self.folder)

    def latest(self) -> int | None:
        """The newest saved step."""
        newest = _as_first_finds(lambda: max(self.steps(), default=-1))
        return None if newest < 0 else newest

    def best(self) -> int | None:
        """The step of the best checkpoint."""
        return max(self._list(self.best_folder), default=None)

    def check(self) -> None:
        """Raises the error that the save in flight has met, if it has."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight.

        Raises:
            UserError: the last save failed.
        """
        if self._saving is not None:
            # Forgotten only when done: an interrupt in between leaves it to the next to wait for.
            concurrent.futures.wait([self._saving])
            saving, self._saving = self._saving, None
            saving.result()

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Begins to write a step; once written, those beyond `keep` are forgotten.

        Args:
            step: optimizer steps done.
            state: pytree of jax or numpy arrays, PRNG keys included.
            data: what JSON can hold; NaN and infinities survive.

        Raises:
            UserError: this save, or the one before it, failed.
        """
        self._begin(self.folder, step, state, data, self._forget_old)

    def save_best(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Begins to write the best checkpoint so far; `better` says whether there is a new one."""
        self._begin(self.best_folder, step, state, data, lambda: None)

    def cut_back(self, step: int) -> None:
        """Forgets what a killed run has written beyond the step it resumes from."""
        self.wait()
        if jax.process_index() == 0:
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
        self.wait()

        def choose() -> int:
            if step is not None:
                return _verified(self.folder, step)
            for candidate in reversed(self.steps()):
                try:
                    return _verified(self.folder, candidate)
                except UserError as error:
                    logger.warning("%s; going back to the one before", error)
            raise UserError("no usable checkpoint", str(self.folder), REMEDY)

        chosen = _as_first_finds(choose)
        return *_read(self.folder, chosen, abstract), chosen

    def restore_best(self, abstract: Any) -> tuple[Any, dict[str, Any], int]:
        """As `restore`, for the best checkpoint."""
        self.wait()

        def choose() -> int:
            step = self.best()
            if step is None:
                raise UserError(
                    "no best checkpoint",
                    str(self.best_folder),
                    "train first; if that is done, no evaluation gave a number to choose by",
                )
            return _verified(self.best_folder, step)

        step = _as_first_finds(choose)
        return *_read(self.best_folder, step, abstract), step

    def _begin(
        self,
        folder: Path,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        finish: Callable[[], None],
    ) -> None:
        self.wait()
        place, temporary = _place(folder, step), folder / f"{TEMPORARY}{step:08d}"
        arrays, keys = _disassemble(state)
        text = json.dumps({"step": step, "data": data, "keys": keys}, indent=2)
        with _clear_errors(place):
            if jax.process_index() == 0:
                manifest.make_room(temporary)
            writing = ocp.save_async(str(temporary / "state"), trees.unflatten(arrays))

        def complete() -> None:
            with _clear_errors(place):
                writing.result()
                if jax.process_index() == 0:
                    (temporary / "data.json").write_text(text, encoding="utf-8")
                    manifest.commit(temporary, place)
                    finish()

        self._saving = self._thread.submit(complete)

    def _forget_old(self) -> None:
        kept = self.steps()[-self.keep :]
        bests = self._list(self.best_folder)
        needed = {max((b for b in bests if b <= s), default=None) for s in kept}
        self._forget(self.folder, lambda s: s not in kept)
        self._forget(self.best_folder, lambda b: b not in needed and b <= kept[-1])

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
                manifest.remove(_place(folder, step))


def better(score: float, best: float | None) -> bool:
    """Whether a score (the higher the better) is a new best; NaN never is."""
    return not math.isnan(score) and (best is None or score > best)


def _place(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}"


def _as_first_finds(find: Callable[[], int]) -> int:
    """What process 0 finds: where files come and go, others may see them earlier or later."""
    found, error = -1, None
    if jax.process_index() == 0:
        try:
            found = find()
        except UserError as caught:
            error = caught
    found, failed = multihost_utils.broadcast_one_to_all(np.array([found, error is not None]))
    if failed:
        raise error or UserError("no checkpoint to read", "process 0", "see what it tells")
    return int(found)


@contextlib.contextmanager
def _clear_errors(place: Path) -> Iterator[None]:
    """A disk that refuses, as the error of a user."""
    try:
        yield
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


def _verified(folder: Path, step: int) -> int:
    """The step, if all of its files are as they were written.

    Raises:
        UserError: they are not.
    """
    place = _place(folder, step)
    if what := manifest.damage(place):
        raise UserError(f"damaged checkpoint ({what})", str(place), REMEDY)
    return step


def _read(folder: Path, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """State and data of a step that is known to be undamaged."""
    place = _place(folder, step)
    stored = json.loads((place / "data.json").read_bytes())
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
