"""The notebooks run from top to bottom, on a model so small that their numbers mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    # A task without classes: encoders of the study are no tiny ones.
    "01_quickstart": {"TASKS": ("description_generation",)},
    "02_your_own_task": {"TRAIN": 16, "REST": 6},
    "03_merge_adapters": {"METHODS": ("linear",)},
}


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def program(path, changes):
    """The code of a notebook, with changes to its parameters behind them."""
    parts = []
    for cell in cells_of(path):
        if cell["cell_type"] == "code":
            parts.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", ()):
            assert all(f"{name} = " in parts[-1] for name in changes), changes
            parts += [f"{name} = {value!r}" for name, value in changes.items()]
    return "\n\n".join(parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in cells_of(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_they_run(tiny_base, tmp_path):
    # What one has compiled serves the next.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for path in NOTEBOOKS:
        # The last one reads what the first has left.
        model = {} if path.stem == "04_read_a_study" else {"MODEL_PATH": str(tiny_base)}
        code = program(path, model | SMALL.get(path.stem, {}))
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | compiled | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{path.stem}: {done.stderr[-2000:]}"
        assert done.stdout.strip(), f"{path.stem} shows nothing"
