"""Which room may import which: the table of the architecture, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "errors": set(),
    "preemption": set(),
    "typing": {"errors"},
    "trees": {"errors", "typing"},
    "sharding": {"errors", "typing", "trees"},
    "placement": {"errors", "typing", "trees", "sharding"},
    "models": {"errors", "typing", "trees", "sharding"},
    "adapters": {"errors", "typing", "trees"},
    "hf": {"errors", "typing", "trees", "sharding", "placement", "models", "adapters"},
    "data": {"errors", "typing"},
    "metrics": {"errors"},
    "tasks": {"errors", "typing", "data", "metrics"},
    "decoding": {"errors", "typing", "trees", "sharding", "models", "adapters", "data"},
    "training": {
        *("errors", "preemption", "typing", "trees", "sharding", "models", "adapters", "data"),
    },
    "evaluation": {"errors", "typing", "data", "models", "decoding", "tasks", "metrics"},
    "launch": {"errors", "preemption", "experiments", "configs"},
    "configs": {"tasks"},
}
ROOMS = {*MAY_IMPORT, "experiments"}
MAY_IMPORT["experiments"] = ROOMS - {"launch", "configs"}

OUTSIDE_ONLY_IN = {
    "ml_collections": ("configs/", "launch/", "ecomjax/experiments/config.py"),
    "orbax": ("ecomjax/training/checkpoint.py",),
    # Formats that can hold programs; of YAML, what a library raises where it meets one.
    "yaml": ("ecomjax/data/hub.py",),
    **dict.fromkeys(("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"), ()),
    "jax._src": (),
    "flax.core.scope": (),
}
OUTSIDE_NEVER_IN = {
    "ecomjax/metrics/": ("jax", "flax"),
    "configs/": ("jax", "flax"),
}
NEVER_CALLED = (
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "pickle.load"),
    *("torch.load", "runpy.run_path", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
)
"""What would run text as a program, or as a command of a shell."""
LAZY = (
    *("datasets", "gguf", "matplotlib", "outlines_core", "pyarrow", "rouge_score", "sacrebleu"),
    *("scipy", "sentencepiece", "seqeval", "sklearn", "tensorboardX", "torch", "transformers"),
)


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Every dotted name that the code imports, those of functions too, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(name: str) -> str | None:
    """The room that a dotted name is in; None outside this repository or at its front door."""
    parts = name.split(".")
    rest = parts[1:] if parts[0] == "ecomjax" else parts
    ours = parts[0] in ("ecomjax", "launch", "configs")
    return rest[0] if ours and rest and rest[0] in ROOMS else None


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the module is imported, or that a type checker alone reads."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import_time(node)


def faults(path: str, source: str) -> list[str]:
    """What the imports of the module at `path` (from the repository root) break."""
    tree = ast.parse(source)
    package = path.rpartition("/")[0].replace("/", ".")
    here = room_of(path.removesuffix(".py").replace("/", "."))
    found = []
    for name, line in imported(tree, package):
        there = room_of(name)
        if there not in (None, here) and here and there not in MAY_IMPORT[here]:
            found.append(f"{path}:{line}: {here} must not import {there}")
        if here is None and name != "ecomjax" and is_in(name, "ecomjax"):
            found.append(f"{path}:{line}: the front door imports no room ({name})")
        for outside, homes in OUTSIDE_ONLY_IN.items():
            if is_in(name, outside) and not any(path.startswith(home) for home in homes):
                found.append(f"{path}:{line}: {outside} is only for {', '.join(homes) or 'nobody'}")
        for place, outsiders in OUTSIDE_NEVER_IN.items():
            if path.startswith(place) and any(is_in(name, outside) for outside in outsiders):
                found.append(f"{path}:{line}: {place} must not import {name}")
    for node in at_import_time(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, line in imported(node, package):
                if any(is_in(name, heavy) for heavy in LAZY):
                    found.append(f"{path}:{line}: import {name} inside the function that needs it")
    return found


def programs_from_text(path: str, source: str) -> list[str]:
    """Where code runs text that it was given: as Python, in a shell, or as a model's own code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            named = {word.arg: word.value for word in node.keywords}
            trusting = ("shell", "trust_remote_code", "allow_pickle")
            asked = [w for w in trusting if w in named and ast.unparse(named[w]) != "False"]
            called = ast.unparse(node.func)
            if called in NEVER_CALLED or asked:
                found.append(f"{path}:{node.lineno}: {called}({', '.join(asked)})")
    return found


def modules() -> list[Path]:
    folders = ("ecomjax", "configs", "launch")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_import_goes_in_the_allowed_direction():
    found = [
        fault
        for path in modules()
        for fault in faults(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_f45_no_text_is_run_as_a_program_or_in_a_shell():
    found = [
        fault
        for path in modules()
        for fault in programs_from_text(
            path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "os.system(f'ls {name}')",
        "subprocess.run(line, shell=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=trust)",
        "np.load(file, allow_pickle=True)",
        "torch.load(file, weights_only=True)",
    ],
)
def test_a_program_from_text_is_caught(source):
    assert programs_from_text("x.py", source)
    assert not programs_from_text("x.py", "subprocess.run(['ls', name]); re.compile(name)")


def test_every_room_is_in_the_table():
    entries = (path for path in (ROOT / "ecomjax").iterdir() if not path.name.startswith("__"))
    assert {path.stem for path in entries if path.is_dir() or path.suffix == ".py"} <= ROOMS


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ecomjax/models/llama.py", "from ecomjax.adapters import lora"),
        ("ecomjax/models/llama.py", "from ..adapters.lora import fuse"),
        ("ecomjax/models/llama.py", "from ecomjax import adapters"),
        ("ecomjax/training/loop.py", "def run():\n    import ecomjax.tasks.esci"),
        ("ecomjax/trees.py", "from . import models"),
        ("ecomjax/__init__.py", "from ecomjax.typing import Batch"),
        ("ecomjax/metrics/ner.py", "import jax.numpy as jnp"),
        ("ecomjax/data/packing.py", "from ecomjax.trees import select"),
        ("ecomjax/experiments/study.py", "import ml_collections"),
        ("ecomjax/experiments/study.py", "import launch.study"),
        ("ecomjax/training/loop.py", "import orbax.checkpoint as ocp"),
        ("ecomjax/sharding.py", "from jax._src import mesh"),
        ("ecomjax/models/layers.py", "from flax.core import scope"),
        ("ecomjax/hf/tokenizer.py", "try:\n    import transformers\nexcept ImportError: ..."),
        ("configs/study.py", "from ecomjax.errors import UserError"),
        ("launch/train.py", "from ecomjax.training.loop import train"),
    ],
)
def test_a_bad_import_is_caught(path, source):
    assert len(faults(path, source)) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ecomjax/hf/peft.py", "from ecomjax.adapters.lora import fuse\nimport jax"),
        ("ecomjax/models/llama.py", "from ecomjax.models import layers\nfrom . import rope"),
        ("ecomjax/hf/tokenizer.py", "def load():\n    from transformers import AutoTokenizer"),
        ("ecomjax/training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("ecomjax/experiments/config.py", "import ml_collections"),
        ("launch/train.py", "from ecomjax.experiments import finetune\nimport ml_collections"),
        ("configs/study.py", "from configs import common\nfrom ml_collections import config_dict"),
        ("configs/common.py", "from ecomjax.tasks import registry"),
    ],
)
def test_a_good_import_passes(path, source):
    assert faults(path, source) == []
