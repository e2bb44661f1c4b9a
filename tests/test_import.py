"""`import ecomjax` is free: no device, no network, nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROBE = """
import socket, sys, time

def refuse(*args, **kwargs):
    raise AssertionError("ecomjax opened a socket")

socket.socket = refuse
start = time.process_time()
import ecomjax
seconds = time.process_time() - start
heavy = {"jax", "flax", "numpy", "transformers", "datasets", "torch"} & set(sys.modules)
assert not heavy, f"import ecomjax brings {sorted(heavy)}"
assert seconds < 0.5, f"import ecomjax takes {seconds:.2f} s of processor time"
"""


def probe(source: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_import_is_light():
    result = probe(PROBE, ROOT)
    assert result.returncode == 0, result.stderr


def test_the_probe_notices_a_heavy_import(tmp_path):
    (tmp_path / "ecomjax.py").write_text("import numpy\n")
    assert "brings ['numpy']" in probe(PROBE, tmp_path).stderr
    (tmp_path / "ecomjax.py").write_text("import socket\nsocket.socket()\n")
    assert "opened a socket" in probe(PROBE, tmp_path).stderr
