"""The run folder: where everything of a run stands, who writes to it, and from which config.

config.json                         the resolved config, written once
run.json                            run id, and for every start of the command: time, machine,
                                    versions, devices, what else the experiment tells
checkpoints/                        training state, see `ecomjax.training.checkpoint`
adapter/                            the adapter in PEFT layout
head.safetensors                    the head of an encoder that an adapter was trained with
model/, merge.json, export.json     a model trained in full, or a base with adapters fused in; how
                                    adapters were merged, or which one was exported
metrics.jsonl, tensorboard/         see `ecomjax.training.writers`
skipped.json                        examples of the steps that training could not learn from
eval/<task>/<split>.metrics.json    scores, and .predictions.jsonl the examples behind them;
                                    .partial.jsonl those so far
runs/<name>/                        run folders of a study, beside its results.jsonl, report.md
                                    and figures/; each with done.json once it is, with
                                    failed.json where it ended in an error, and with chosen.json
                                    where it chooses among others
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecomjax import __version__
from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from ecomjax.experiments.config import to_dict, to_json
from ecomjax.experiments.files import (
    cannot_write,
    jsonable,
    read_json,
    write_bytes,
    write_json,
    write_text,
)
from ecomjax.experiments.redaction import redacted

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
    "tokenizers",
)
"""Packages whose versions are written to run.json."""


class Busy(UserError):
    """Another living process writes to the folder."""


STALE = 300.0
"""Seconds without a sign of life after which a writer on another host counts as dead."""


class Workdir:
    """A run folder; only `writing` creates or locks anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.head = self.path / "head.safetensors"
        self.model = self.path / "model"
        self.merge = self.path / "merge.json"
        self.export = self.path / "export.json"
        self.similarity = self.path / "similarity.json"
        self.figures = self.path / "figures"
        self.results = self.path / "results.jsonl"
        self.report = self.path / "report.md"
        self.page = self.path / "report.html"
        self.chosen = self.path / "chosen.json"
        self.done = self.path / "done.json"
        self.failed = self.path / "failed.json"
        self.lock = self.path / ".lock"
        self._changes: list[str] = []

    def scores(self, task: str, split: str) -> Path:
        return self.path / "eval" / task / f"{split}.metrics.json"

    def predictions(self, task: str, split: str) -> Path:
        return self.path / "eval" / task / f"{split}.predictions.jsonl"

    def partial(self, task: str, split: str) -> Path:
        return self.path / "eval" / task / f"{split}.partial.jsonl"

    def subrun(self, name: str) -> Workdir:
        """The folder of one run of a study."""
        return Workdir(self.path / "runs" / name)

    @contextlib.contextmanager
    def writing(
        self, config: Any, ignore: Sequence[str] = (), allow: Sequence[str] | None = None
    ) -> Iterator[Workdir]:
        """Holds the folder as its only writer, made new or made by the same config.

        Of several processes the first holds it for all.

        Args:
            config: the config dataclass of this run.
            ignore: keys such as "evaluation" (with all below them) that may differ from the
                config that made the folder.
            allow: keys likewise, which the user wants to differ from now on: config.json then
                holds the new values, and run.json says so. None: there is no way to ask for it.

        Raises:
            Busy: it has another writer.
            UserError: the folder cannot be written, or holds another config; not all processes
                see it.
        """
        old: bytes | None = b""  # of config.json; what there was, the first process alone knows

        def take() -> None:
            nonlocal old
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                _acquire(self.lock)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            old = self.config.read_bytes() if self.config.exists() else None

        hosts.on_main(take)
        try:
            hosts.check_shared(self.lock)
            hosts.on_main(lambda: self._match_config(config, ignore, allow))
            with _kept_fresh(self.lock) if hosts.is_main() else contextlib.nullcontext():
                yield self
        except BaseException as error:
            # A mistake mended, such as a path, is another config: it may have the same folder.
            if old is None and not self._holds_work():
                self.config.unlink(missing_ok=True)
                self.run.unlink(missing_ok=True)
            if self._changes and old is not None and isinstance(error, UserError):
                write_bytes(self.config, old)
            raise
        finally:
            if hosts.is_main():
                with contextlib.suppress(OSError):
                    os.truncate(self.lock, 0)

    def record_start(self, **facts: Any) -> str:
        """Writes to run.json that the command has started now; returns the id of the run.

        Args:
            **facts: what else describes the run: seed, model identity, data fingerprints, ...
        """
        return hosts.on_main(lambda: self._record(facts))

    def _record(self, facts: Mapping[str, Any]) -> str:
        run = read_json(self.run) if self.run.exists() else {}
        now = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        run.setdefault("run_id", f"{stamp}-{uuid.uuid4().hex[:12]}")
        start = {"time": stamp, "command": redacted(sys.argv)} | machine() | jsonable(facts)
        if self._changes:
            start["config_changes"] = self._changes
        write_json(self.run, run | {"starts": [*run.get("starts", []), start]})
        return run["run_id"]

    def _holds_work(self) -> bool:
        """Whether a run has left more here than the marks of its start."""
        marks = {self.config.name, self.run.name, self.lock.name}
        return any(path.is_file() and path.name not in marks for path in self.path.rglob("*"))

    def _match_config(
        self, config: Any, ignore: Sequence[str], allow: Sequence[str] | None
    ) -> None:
        if not self.config.exists():
            write_text(self.config, to_json(config))
            return
        # A key that came after the folder was made stood at its default all the time.
        old = _flatten(_defaults(config)) | _flatten(read_json(self.config))
        new = _flatten(to_dict(config))
        changes = {
            key: f"config.{key} {_show(old, key)} -> {_show(new, key)}"
            for key in (old | new)
            if _show(old, key) != _show(new, key) and not _below(key, ignore)
        }
        if unknown := [a for a in allow or () if not any(_below(k, [a]) for k in old | new)]:
            raise UserError(
                f"no key {unknown[0]!r}",
                "--allow_config_change",
                f"name keys as in {self.config}, such as training.keep",
            )
        if refused := [key for key in changes if not _below(key, allow or ())]:
            way = "" if allow is None else f", or --allow_config_change={','.join(refused)}"
            raise UserError(
                "the folder holds a run of another config",
                f"{self.path}: {', '.join(changes[key] for key in refused)}",
                f"use the old values, or another --workdir{way}",
            )
        if changes:
            self._changes = list(changes.values())
            write_text(self.config, to_json(config))


def machine() -> dict[str, Any]:
    """Versions, devices and code revision that this process runs with."""
    import jax

    versions = {"ecomjax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    devices = jax.devices()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "versions": versions,
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """Commit of the code, "+changes" added where files differ from it; None without git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie inside a repository that is not its own.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _acquire(path: Path) -> None:
    """Writes this process into the lock file, unless a living one stands there.

    The owner's start time stands beside its pid, since pids are used again. One on another host
    lives as long as the file is kept fresh. The file is emptied rather than deleted on release:
    whoever has it open then still holds the same file.
    """
    with open(path, "a+", encoding="utf-8") as file, _one_at_a_time(file):
        file.seek(0)
        try:
            owner = json.loads(file.read() or "null")
        except ValueError:
            owner = None
        here = socket.gethostname()
        if not isinstance(owner, dict) or not {"host", "pid", "born"} <= owner.keys():
            owner = None
        if owner and (_lives(owner) if owner["host"] == here else _age(path) < STALE):
            raise Busy(
                f"process {owner['pid']} on {owner['host']} is writing to this folder",
                str(path.parent),
                f"wait for it or stop it (if there is no such process, delete {path}, or wait "
                f"{STALE / 60:.0f} minutes)",
            )
        file.truncate(0)
        me = {"host": here, "pid": os.getpid(), "born": _birth(os.getpid())}
        file.write(json.dumps(me))


@contextlib.contextmanager
def _kept_fresh(path: Path) -> Iterator[None]:
    """Inside, the lock file is touched from time to time, as a sign of life to other hosts."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(STALE / 10):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system that it is on."""
    now = path.with_name(f"{path.name}.now")
    try:
        now.touch()
        return now.stat().st_mtime - path.stat().st_mtime
    finally:
        now.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(file: Any) -> Iterator[None]:
    """Keeps two processes from finding the same stale lock at once, where the system can."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    yield


def _lives(owner: Mapping[str, Any]) -> bool:
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _birth(owner["pid"]) == owner["born"]


def _birth(pid: int) -> str:
    """When a process started, in the system's ticks; empty where that cannot be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _defaults(config: Any) -> dict[str, Any]:
    """A config dataclass as `to_dict` gives it, each key at its default; those without left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _defaults(value)
        elif isinstance(value, Mapping):
            sections = {k: v for k, v in value.items() if dataclasses.is_dataclass(v)}
            found[field.name] = {key: _defaults(section) for key, section in sections.items()}
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return json.loads(json.dumps(found))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _below(key: str, sections: Sequence[str]) -> bool:
    return any(key == s or key.startswith(f"{s}.") for s in sections)


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "(absent)"
