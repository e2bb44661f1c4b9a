"""The scripts with stand-ins for what they would install or start."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.glob("*.sbatch")])
TPU_VM = ("--name=vm", "--zone", "z", "--type=v5litepod-16")
XPK = ("--cluster=c", "--zone=z", "--type=v5litepod-16", "--name=w")
TRAIN = ("train", "--config=configs/finetune.py:esci", "--workdir=runs/esci")
NASTY = "--config.model.path=a b's $(touch bad) `touch bad`"


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
    """The scripts and locks as a repository, and a `python3.11` that only notes its calls."""
    (tmp_path / "launch" / "locks").mkdir(parents=True)
    for source in [*LAUNCH.glob("*.s*"), *LAUNCH.glob("*.py"), *(LAUNCH / "locks").glob("*.txt")]:
        (tmp_path / source.relative_to(ROOT)).write_bytes(source.read_bytes())
    subprocess.run("git init -q && git add launch", shell=True, cwd=tmp_path, check=True)
    (tmp_path / "bin").mkdir()
    stand_in(
        tmp_path,
        "python3.11",
        "[[ $1 == -c && -n $OLD ]] && exit 1\n"
        '[[ $* == "-m venv"* ]] && { mkdir -p .venv/bin; cp "$0" .venv/bin/python; }\n'
        '[[ $* == "-m launch.study"* ]] && echo "$*"\n'
        f'[[ $* == "-m launch.train"* ]] && source {tmp_path}/train\n'
        "exit 0",
        note='"$*"',
    )
    return tmp_path


def stand_in(clone: Path, name: str, does: str = "", note: str = '"${0##*/} $*"') -> None:
    """Puts an executable into the PATH of `run` that notes its calls and does a little."""
    path = clone / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\necho {note} >> {clone}/calls\n{does}\n")
    path.chmod(0o755)


def calls(clone: Path) -> list[str]:
    path = clone / "calls"
    return path.read_text().splitlines() if path.exists() else []


def answer(clone: Path, name: str, lines: list) -> None:
    (clone / name).write_text("".join(f"{line}\n" for line in lines))


def take(clone: Path, name: str) -> str:
    """Shell code that prints the next of the lines that `answer` has laid down."""
    return f"head -n 1 {clone}/{name}; sed -i.old 1d {clone}/{name}"


def trained(clone: Path) -> int:
    return sum(call.startswith("-m launch.train") for call in calls(clone))


def run(
    clone: Path, script: str, *args: str, old: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    path = f"{clone / 'bin'}:{os.environ['PATH']}"
    return bash(clone / "launch" / script, *args, PATH=path, OLD=old, PYTHON="", **environment)


def shown(clone: Path, script: str, *args: str, **environment: str) -> list[list[str]]:
    """The words of the commands that a dry run prints; it must not have run any."""
    result = run(clone, script, *args, **environment)
    assert result.returncode == 0, result.stderr
    assert not calls(clone) and not (clone / ".venv").exists()
    lines = result.stdout.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize(
    "script", ["quickstart.sh", "test.sh", "gpu.sh", "tpu_vm.sh", "xpk.sh", "slurm.sbatch"]
)
def test_help_tells_the_usage(clone, script):
    result = run(clone, script, "--help")
    assert result.returncode == 0
    assert "usage: " in result.stdout and f"bash launch/{script} --" in result.stdout.replace(
        "[", ""
    )
    assert "set -" not in result.stdout and "#" not in result.stdout


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
        ("gpu.sh", [], "(none)"),
        ("gpu.sh", ["--dry", *TRAIN], "--dry"),
        ("gpu.sh", ["tune"], "no such command: tune"),
        ("gpu.sh", ["command"], "no such command: command"),
        ("gpu.sh", ["../launch/train"], "no such command: ../launch/train"),
        ("gpu.sh", TRAIN, "nvidia-smi"),
        ("slurm.sbatch", TRAIN, "SLURM_JOB_ID"),
        ("slurm.sbatch", ["--nodes=2", *TRAIN], "--nodes=2"),
        ("slurm.sbatch", ["tune"], "no such command: tune"),
        ("xpk.sh", TRAIN, "--cluster"),
        ("xpk.sh", [*XPK, "--project", "--dry-run", *TRAIN], "missing value: --project"),
        ("xpk.sh", [*XPK, "--restarts=0", *TRAIN], "--restarts=0"),
        ("xpk.sh", [*XPK, "--slice=2", *TRAIN], "--slice"),
        ("xpk.sh", XPK, "no such command"),
        ("xpk.sh", [*XPK, *TRAIN], "no such program: xpk"),
        ("tpu_vm.sh", TRAIN, "--name"),
        ("tpu_vm.sh", [*TPU_VM, "--attempts=-1", *TRAIN], "--attempts"),
        ("tpu_vm.sh", [*TPU_VM, "--spot", *TRAIN], "--nfs"),
        ("tpu_vm.sh", [*TPU_VM, "--nfs=10.0.0.2:/x;rm", *TRAIN], "--nfs=10.0.0.2:/x;rm"),
        ("tpu_vm.sh", [*TPU_VM, "--type=v9-8", *TRAIN], "--runtime"),
        ("tpu_vm.sh", [*TPU_VM, "train", "--workdir=/tmp/x"], "--workdir=/tmp/x"),
        ("tpu_vm.sh", [*TPU_VM, "train", "--workdir=runs/../x"], "--workdir=runs/../x"),
        ("tpu_vm.sh", [*TPU_VM, "train"], "--workdir="),
    ],
)
def test_a_bad_argument_is_one_line_before_anything_is_installed(clone, script, args, told):
    result = run(clone, script, *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+; [^\n]+\n", result.stderr) and told in result.stderr
    assert not calls(clone) and not (clone / ".venv").exists()


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
    installs = [call for call in calls(clone) if call.startswith("-m pip install")]
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


def test_gpu_shows_what_it_would_run(clone):
    setup, command = shown(clone, "gpu.sh", "--dry-run", *TRAIN, NASTY)
    assert setup == ["bash", "launch/setup.sh", "runtime", "gpu", "models"]
    assert command == [".venv/bin/python", "-m", "launch.train", *TRAIN[1:], NASTY]


@pytest.mark.parametrize("statuses", [[0], [75, 75, 0], [75, 3], [137]])
def test_gpu_starts_a_preempted_command_again(clone, statuses):
    stand_in(clone, "nvidia-smi")
    answer(clone, "statuses", statuses)
    (clone / "train").write_text(f"exit $({take(clone, 'statuses')})")
    result = run(clone, "gpu.sh", *TRAIN, NASTY)
    assert result.returncode == statuses[-1], result.stderr
    assert trained(clone) == len(statuses) == result.stderr.count("preempted") + 1
    assert installed(clone) == ["runtime", "gpu", "models"]
    assert not (clone / "bad").exists()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_gpu_hands_a_signal_to_the_command_and_ends_with_it(clone, sent, status):
    stand_in(clone, "nvidia-smi")
    (clone / "train").write_text(
        f"trap 'exit 75' TERM; trap 'exit 130' INT; touch {clone}/up\n"
        "while true; do sleep 0.05; done"
    )
    environment = os.environ | {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "PYTHON": ""}
    command = ["bash", str(clone / "launch" / "gpu.sh"), *TRAIN]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while not (clone / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait(20) == status
    assert trained(clone) == 1


def test_slurm_asks_for_a_signal_in_time_and_for_the_queue_again():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(options)
    head, _, _ = text.partition("set -euo pipefail")
    assert head.count("#SBATCH") == len(options), "SLURM reads no option below the first command"


def test_slurm_shows_what_the_job_would_run(clone):
    setup, command, requeue = shown(clone, "slurm.sbatch", "--dry-run", *TRAIN, NASTY)
    assert setup == ["bash", "launch/setup.sh", "runtime", "models"]
    python = [".venv/bin/python", "-m", "launch.train", "--hosts=auto"]
    assert command == ["srun", *python, *TRAIN[1:], NASTY]
    assert requeue == ["scontrol", "requeue", "JOB"]


@pytest.mark.parametrize(("status", "queued"), [(0, False), (75, True), (1, False)])
def test_a_preempted_slurm_job_goes_back_into_the_queue(clone, tmp_path, status, queued):
    stand_in(clone, "srun", f'echo "$JAX_LOCAL_DEVICE_IDS" > {clone}/ids; exit {status}')
    stand_in(clone, "scontrol")
    spool = tmp_path / "spool" / "slurm_script"
    spool.parent.mkdir()
    spool.write_bytes((LAUNCH / "slurm.sbatch").read_bytes())
    job = {"SLURM_JOB_ID": "123", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(clone)}
    result = run(clone, str(spool), *TRAIN, **job)
    assert result.returncode == status, result.stderr
    assert ("scontrol requeue 123" in calls(clone)) == queued
    assert installed(clone) == ["runtime", "gpu", "models"]
    assert (clone / "ids").read_text() == "0,1,2,3\n"


def test_slurm_wants_one_process_a_node(clone):
    result = run(clone, "slurm.sbatch", *TRAIN, SLURM_JOB_ID="1", SLURM_NTASKS_PER_NODE="8")
    assert result.returncode == 2 and "--ntasks-per-node" in result.stderr


def option(words: list[str], name: str) -> str:
    (value,) = [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    return value


REMOTE = [".venv/bin/python", "-m", "launch.train", "--hosts=auto", *TRAIN[1:], NASTY]


def test_xpk_shows_the_workload_and_creates_it(clone):
    copy, create = shown(clone, "xpk.sh", "--dry-run", *XPK, *TRAIN, NASTY)
    assert copy[:2] == ["mkdir", "ecomjax-files"] and "ls-files" in copy
    assert create[:3] == ["xpk", "workload", "create"]
    assert option(create, "--restart-on-exit-codes") == "75"
    assert int(option(create, "--max-restarts")) > 0
    command = shlex.split(option(create, "--command"))
    assert command[command.index("exec") + 1 :] == REMOTE

    stand_in(clone, "xpk", f"ls ecomjax-files/launch > {clone}/sent")
    assert run(clone, "xpk.sh", *XPK, *TRAIN, NASTY).returncode == 0
    assert calls(clone) == [" ".join(create)]
    assert "setup.sh" in (clone / "sent").read_text()


def test_tpu_vm_shows_what_it_would_run(clone):
    options = (*TPU_VM, "--nfs=10.0.0.2:/share", "--spot", "--project=p")
    lines = shown(clone, "tpu_vm.sh", "--dry-run", *options, *TRAIN, NASTY)
    describe, create, pack, copy, prepare, train, folder, collect, delete = lines
    assert pack[0] == "git" and folder == ["mkdir", "-p", "runs"]
    gcloud = [describe, create, copy, prepare, train, collect, delete]
    assert all(words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for words in gcloud)
    assert all({"--zone=z", "--project=p"} <= set(words) for words in gcloud)
    verbs = ["describe", "create", "scp", "ssh", "ssh", "scp", "delete"]
    assert [words[4] for words in gcloud] == verbs
    assert "--spot" in create and option(create, "--version") == "v2-alpha-tpuv5-lite"
    assert all("--worker=all" in words for words in (copy, prepare, train))
    assert "mount -t nfs 10.0.0.2:/share runs" in option(prepare, "--command")
    assert shlex.split(option(train, "--command"))[3:] == ["exec", *REMOTE]
    assert collect[5:8] == ["--recurse", "vm:ecomjax/runs/esci", "runs"]
    kept = shown(clone, "tpu_vm.sh", "--dry-run", "--keep", *options, *TRAIN, NASTY)
    assert kept == lines[:-1]


@pytest.mark.parametrize(
    ("states", "statuses", "verbs", "status"),
    [
        # State of the VM before each start and after each failure, status of each start.
        (["", ""], [0], "create scp ssh ssh scp delete", 0),
        (["READY"], [0], "scp ssh ssh scp delete", 0),
        (["READY", "READY"], [75, 0], "scp ssh ssh scp ssh ssh scp delete", 0),
        (
            ["", "PREEMPTED", "PREEMPTED"],
            [255, 0],
            "create scp ssh ssh delete create scp ssh ssh scp delete",
            0,
        ),
        (["READY", "READY"], [75, 75], "scp ssh ssh scp ssh ssh", 75),
        (["READY", "READY"], [1], "scp ssh ssh", 2),
    ],
)
def test_tpu_vm_goes_on_after_a_preemption(clone, states, statuses, verbs, status):
    answer(clone, "states", states)
    answer(clone, "statuses", statuses)
    stand_in(
        clone,
        "gcloud",
        f'case "$*" in *describe*) {take(clone, "states")} ;;\n'
        f"*launch.train*) exit $({take(clone, 'statuses')}) ;; esac",
    )
    result = run(clone, "tpu_vm.sh", *TPU_VM, "--attempts=2", *TRAIN)
    assert result.returncode == status, result.stderr
    done = [call.split()[4] for call in calls(clone)]
    assert " ".join(verb for verb in done if verb != "describe") == verbs
    assert result.stderr.count("starting again") == max(statuses.count(75), statuses.count(255))


def test_tpu_vm_gives_up_where_the_first_vm_cannot_be_created(clone):
    stand_in(clone, "gcloud", "[[ $4 != create ]]")
    result = run(clone, "tpu_vm.sh", *TPU_VM, *TRAIN)
    assert result.returncode == 2 and result.stderr.startswith("error: cannot create the VM: vm;")


def sky() -> dict:
    return yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def test_sky_recovers_from_a_preemption_and_keeps_the_runs():
    task = sky()
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["resources"]["use_spot"] is True
    candidates = [each["accelerators"] for each in task["resources"]["any_of"]]
    assert any(name.startswith("tpu-") for name in candidates)
    assert any(not name.startswith("tpu-") for name in candidates)
    assert task["file_mounts"]["/runs"] == {"name": "${BUCKET}", "mode": "MOUNT_CACHED"}
    # What has no default must be given: SkyPilot refuses null.
    assert task["envs"] == {"RUN": None, "BUCKET": None, "DRY_RUN": ""}


@pytest.mark.parametrize(
    ("gpu", "nodes", "hosts"),
    [
        (False, 1, ["--hosts=auto"]),
        (True, 1, []),
        (True, 2, ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"]),
    ],
)
def test_sky_shows_and_runs_the_command(clone, gpu, nodes, hosts):
    if gpu:
        stand_in(clone, "nvidia-smi")
    stand_in(clone, "uv", f"[[ $2 == find ]] && echo {clone}/bin/python3.11; exit 0")
    environment = os.environ | {
        "PATH": f"{clone / 'bin'}:{os.environ['PATH']}",
        "RUN": " ".join(TRAIN),
        "DRY_RUN": "1",
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
    }

    def part(name: str, **changed: str) -> str:
        return subprocess.run(
            ["bash", "-c", sky()[name]],
            env=environment | changed,
            cwd=clone,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    words = [".venv/bin/python", "-m", "launch.train", *hosts, *TRAIN[1:]]
    assert shlex.split(part("run")) == words and not calls(clone)
    part("setup")
    assert installed(clone) == ["runtime", "gpu" if gpu else "tpu", "models"]
    (clone / "train").write_text("")
    part("run", DRY_RUN="")
    assert calls(clone)[-1] == " ".join(words[1:])


def test_ci_runs_the_test_command_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert script.read_text() == "#!/usr/bin/env bash\nexec bash launch/test.sh --all\n"
    assert os.access(script, os.X_OK)
