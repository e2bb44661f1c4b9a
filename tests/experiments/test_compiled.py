import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from ecomjax.experiments import compiled
import jax
compiled.keep()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
read = []
jax.monitoring.register_event_listener(
    lambda event, **_: read.append(event) if event.endswith("/cache_hits") else None
)
print(jax.jit(lambda x: x + 1.0)(1.0), len(read))
"""


def start(**environment):
    """The result, and how many programs were read rather than compiled."""
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k} | environment
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, check=True)
    result, read = done.stdout.decode().split()
    return result, int(read)


@pytest.mark.parametrize("named", [False, True])
def test_programs_are_kept_where_the_user_keeps_caches_or_says(tmp_path, named):
    home, other = tmp_path / "home", tmp_path / "other"
    environment = {"XDG_CACHE_HOME": str(home)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(other)} if named else {}
    assert start(**environment) == ("2.0", 0)
    folder = other if named else home / "ecomjax" / "compiled"
    kept = {path: path.read_bytes() for path in folder.rglob("jit_*-cache")}
    assert kept and (named or not other.exists())
    result, read = start(**environment)
    assert result == "2.0" and read == len(kept)
    assert {path: path.read_bytes() for path in folder.rglob("jit_*-cache")} == kept
