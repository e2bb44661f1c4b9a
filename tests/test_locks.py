"""The lock files: whole, hashed, and what the project and jax ask for."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
LOCKS = ("runtime", "test", "models")


def pins(lock: str, python: str) -> dict[str, str]:
    """Package -> version for a machine with Linux and this Python; every line has hashes."""
    text = (LAUNCH / "locks" / f"{lock}.txt").read_text()
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found = {}
    for entry in text.replace("\\\n", " ").strip().splitlines():
        line, *hashes = entry.split("--hash=")
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", each) for each in hashes)
        requirement = Requirement(line.strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = requirement.specifier
            assert version.operator == "==" and requirement.name not in found
            found[requirement.name.lower().replace("_", "-")] = version.version
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_locks_hold_what_the_project_asks_for(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime, test = pins("runtime", python), pins("test", python)
    assert runtime.items() <= test.items()
    for lock, requirements in (
        (runtime, project["dependencies"]),
        (test, [*extras["test"], *extras["dev"]]),
    ):
        for requirement in map(Requirement, requirements):
            environment = {"python_version": python}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert lock[requirement.name.lower()] in requirement.specifier


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_name_no_index_no_torch_and_no_cuda(lock):
    names = set(pins(lock, "3.11"))
    assert not {name for name in names if re.match("torch|triton|nvidia|cuda", name)}
    assert "://" not in (LAUNCH / "locks" / f"{lock}.txt").read_text()


@pytest.mark.parametrize(("lock", "extra"), [("gpu", "cuda13"), ("tpu", "tpu")])
def test_locks_of_accelerators_hold_what_jax_asks_for_and_no_more(lock, extra):
    python = ".".join(importlib.metadata.version("jax").split(".")[:2])
    python = "3.11" if python == "0.10" else "3.12"
    found, runtime = pins(lock, python), pins("runtime", python)
    assert found and not found.keys() & runtime.keys()
    if importlib.metadata.version("jax") != runtime["jax"]:
        pytest.skip("the jax installed is not the locked one")
    for line in importlib.metadata.requires("jax") or ():
        requirement = Requirement(line)
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            assert (found | runtime)[requirement.name] in requirement.specifier
