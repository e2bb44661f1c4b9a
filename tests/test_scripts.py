"""The shell scripts up to the point where they would install, and the lock files."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
LOCKS = ("runtime", "test", "models")


def bash(script: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *args],
        env=os.environ | environment,
        cwd=script.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the scripts and locks alone, and a `python3.11` that only notes its calls."""
    (tmp_path / "launch" / "locks").mkdir(parents=True)
    for source in [*LAUNCH.glob("*.sh"), *(LAUNCH / "locks").glob("*.txt")]:
        (tmp_path / source.relative_to(ROOT)).write_bytes(source.read_bytes())
    python = tmp_path / "bin" / "python3.11"
    python.parent.mkdir()
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" >> {tmp_path}/calls\n'
        "[[ $1 == -c && -n $OLD ]] && exit 1\n"
        '[[ $* == "-m venv"* ]] && { mkdir -p .venv/bin; cp "$0" .venv/bin/python; }\n'
        '[[ $* == "-m launch.study"* ]] && echo "$*"\n'
        "exit 0\n"
    )
    python.chmod(0o755)
    return tmp_path


def run(clone: Path, script: str, *args: str, old: str = "") -> subprocess.CompletedProcess[str]:
    path = f"{clone / 'bin'}:{os.environ['PATH']}"
    return bash(clone / "launch" / script, *args, PATH=path, OLD=old, PYTHON="")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_tells_the_usage(clone, script):
    result = run(clone, script, "--help")
    assert result.returncode == 0
    assert f"usage: bash launch/{script} [--" in result.stdout
    assert "set -" not in result.stdout


@pytest.mark.parametrize(
    ("script", "args", "told"),
    [
        ("quickstart.sh", ["--fast"], "--fast"),
        ("quickstart.sh", ["shop"], "shop"),
        ("quickstart.sh", ["--data"], "--data"),
        ("quickstart.sh", ["--data", "no/such"], "no such folder: no/such"),
        ("quickstart.sh", ["--smoke", "--data=no/such"], "no such folder: no/such"),
        ("test.sh", ["--fast"], "--fast"),
        ("test.sh", ["--all", "--fast"], "--fast"),
    ],
)
def test_a_bad_argument_is_one_line_before_anything_is_installed(clone, script, args, told):
    result = run(clone, script, *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+; [^\n]+\n", result.stderr) and told in result.stderr
    assert not (clone / "calls").exists() and not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("args", "config", "workdir"),
    [
        ([], "quickstart", "runs/quickstart"),
        (["--smoke"], "smoke", "runs/quickstart-smoke"),
        (["--data", "real data"], "real", "runs/quickstart-data"),
        (["--smoke", "--data=real data"], "smoke", "runs/quickstart-smoke-data"),
        (["--workdir", "here"], "quickstart", "here"),
        (["--workdir", "/there"], "quickstart", "/there"),
    ],
)
def test_quickstart_starts_the_study(clone, args, config, workdir):
    (clone / "real data").mkdir()
    result = run(clone, "quickstart.sh", *args)
    assert result.returncode == 0, result.stderr
    study = result.stdout.splitlines()[-1]
    source = f"--config.data.source=local --config.data.path={clone}/real data "
    expected = f"-m launch.study --config=configs/study.py:{config} "
    expected += source if any("data" in arg for arg in args) else ""
    assert study == f"{expected}--workdir={clone / workdir}"


def installed(clone: Path) -> list[str]:
    """The lock files that were installed, in order."""
    calls = (clone / "calls").read_text().splitlines()
    installs = [call for call in calls if call.startswith("-m pip install")]
    assert all("--require-hashes" in call and "--no-deps" in call for call in installs)
    return [Path(call.split()[-1]).stem for call in installs]


def test_setup_installs_a_lock_again_only_when_it_has_changed(clone):
    for _ in range(2):
        assert run(clone, "setup.sh", "runtime", "models").returncode == 0
        assert installed(clone) == ["runtime", "models"]
    with (clone / "launch" / "locks" / "models.txt").open("a") as lock:
        lock.write("# changed\n")
    assert run(clone, "setup.sh", "runtime", "models").returncode == 0
    assert installed(clone) == ["runtime", "models", "models"]


def test_setup_refuses_an_old_python(clone):
    for name in ("python3.12", "python3.13", "python3", "python"):
        (clone / "bin" / name).symlink_to("python3.11")
    result = run(clone, "setup.sh", "runtime", old="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: no Python 3.11 or newer: [^\n]+\n", result.stderr)


def test_ci_runs_the_test_command_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert script.read_text() == "#!/usr/bin/env bash\nexec bash launch/test.sh --all\n"
    assert os.access(script, os.X_OK)


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
