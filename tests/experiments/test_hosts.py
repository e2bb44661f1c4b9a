"""Several processes as one run: real ones, on this machine, with two devices each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from ecomjax.experiments.files import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT = 12
"""Seconds; on a machine with more to do than cores, a living process may be silent for some."""


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ((True, "a:1", None, None), "two ways to find the other processes: --hosts=auto;"),
        ((True, None, None, 0), "two ways to find the other processes: --hosts=auto;"),
        ((False, "a:1", None, None), "missing flag: --processes; give all of --coordinator,"),
        ((False, "a:1", 2, None), "missing flag: --process;"),
        ((False, None, 2, 0), "missing flag: --coordinator;"),
        ((False, "a", 2, 0), "no address: --coordinator=a; give HOST:PORT"),
        ((False, ":1", 2, 0), "no address: --coordinator=:1;"),
        ((False, "a:b", 2, 0), "no address: --coordinator=a:b;"),
        ((False, "a:70000", 2, 0), "no address: --coordinator=a:70000;"),
        ((False, "a:1", 0, 0), "no count: --processes=0;"),
        ((False, "a:1", 2, 2), "there is no such process of 2: --process=2; number them from 0"),
        ((False, "a:1", 2, -1), "there is no such process of 2: --process=-1;"),
    ],
)
def test_a_wrong_description_of_the_processes_is_refused(described, told):
    with pytest.raises(UserError, match=f"^{re.escape(told)}"):
        hosts.initialize(*described)


def test_one_process_does_all_itself(tmp_path, capsys):
    hosts.initialize(False, None, None, None)
    assert not hosts.several() and hosts.is_main()
    assert hosts.on_main(lambda: (1, 2)) == (1, 2)
    hosts.check_shared(tmp_path / "none")
    with hosts.one_voice():
        print("told")
    assert capsys.readouterr().out == "told\n"
    with pytest.raises(ZeroDivisionError), hosts.ending_together():
        print(1 / 0)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def initialized(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A process that does nothing but to look for the others."""
    code = (
        "from launch.command import errors_in_one_line\n"
        "from ecomjax.experiments import hosts\n"
        f"with errors_in_one_line(): hosts.initialize{arguments}"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180
    )


@pytest.mark.slow
def test_processes_that_find_no_others_say_so():
    done = initialized(True, None, None, None)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no cluster found: --hosts=auto; start the command by ")
    for process in (0, 1):
        where = f"127.0.0.1:{free_port()}"
        done = initialized(False, where, 2, process, 2)
        assert done.returncode == 2, done.stderr
        (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert told.startswith("error: not all processes were there after 2 s: --coordinator=")
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        done = initialized(False, f"127.0.0.1:{server.getsockname()[1]}", 2, 0, 60)
    assert done.returncode == 2
    assert "error: cannot join the other processes (" in done.stderr


SEEN = """
import json, sys
import jax
from ecomjax import placement, sharding
from ecomjax.data.encoded import Encoded
from ecomjax.data.packing import make_plan
from ecomjax.data.pipeline import iterate
from ecomjax.experiments import hosts
if sys.argv[1:]:
    hosts.initialize(False, sys.argv[1], 2, int(sys.argv[2]), 60, 20)
mesh = sharding.make_mesh(**json.loads(sys.stdin.read()))
placement.meet(mesh)
examples = [Encoded(str(i), (i,) * (3 + i % 5), 1, i) for i in range(1, 41)]
plan = make_plan(
    [len(e.tokens) for e in examples], [[*range(7, 40), *range(7)]], prefixes=[0],
    packing="packed", row_length=12, batch_size=10, rows_multiple=sharding.row_parts(mesh),
)
place = lambda batch: placement.shard_rows(batch, mesh, axis=1, share=True)
steps = iterate(plan, examples, sharding.row_parts(mesh), *placement.row_share(mesh), place=place)
for step, batch in enumerate(steps):
    for shard in batch.tokens.addressable_shards:
        for micro, rows in enumerate(shard.data):
            first = shard.index[1].start or 0
            for row, tokens in enumerate(rows):
                ids = sorted({int(i) for i in tokens} - {0})
                print("SEEN", json.dumps([step, micro, first + row, ids]))
"""
"""Prints which examples are in each row that a process holds on its devices, step by step."""


def start(program: list[str], devices: int, given: str = "") -> subprocess.Popen[str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        [sys.executable, *program],
        env=os.environ | cache | {"JAX_NUM_CPU_DEVICES": str(devices)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(given)
    process.stdin.close()
    process.stdin = None
    return process


def ended(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[tuple]:
    """(status, stdout, stderr) of each."""
    told = []
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, told, strict=True)]


def finished(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    found = ended(processes)
    assert [status for status, *_ in found] == [0] * len(found), found
    return [(out, err) for _, out, err in found]


def seen(outputs: list[tuple[str, str]]) -> set[str]:
    return {line for out, _ in outputs for line in out.splitlines() if line.startswith("SEEN")}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2}, {"data": 1, "tensor": 4}])
def test_two_processes_hold_the_rows_of_one(mesh):
    given = json.dumps(mesh)
    one = seen(finished([start(["-c", SEEN], 4, given)]))
    where = f"127.0.0.1:{free_port()}"
    two = seen(finished([start(["-c", SEEN, where, str(i)], 2, given) for i in (0, 1)]))
    assert two == one and len(one) > 10


AGREE = """
import sys
from pathlib import Path
from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from launch.command import errors_in_one_line
where, process, folder = sys.argv[1:]
hosts.initialize(False, where, 2, int(process), 60, 12)
hosts.SEEN_WITHIN = 0.0
lock = Path(folder) / process / "lock"
lock.parent.mkdir()
lock.write_text(process)

def refuse(*_):
    raise UserError("what", "where", "remedy")

def tell(do, *given):
    try:
        print("TOLD", do(*given), flush=True)
    except UserError as error:
        print("TOLD", error, flush=True)

tell(hosts.on_main, lambda: [process, float("inf"), None])
tell(hosts.on_main, refuse)
tell(hosts.check_same, "data", {"a": (1, 2)})
tell(hosts.check_same, "data", process)
tell(hosts.check_shared, lock)
with hosts.ending_together(), errors_in_one_line(), hosts.one_voice():
    print("VOICE", flush=True)
    if hosts.is_main():
        hosts.check_same("end", 0)
    refuse()
"""
"""What processes tell each other, and then a mistake that one finds while the other waits."""


@pytest.mark.slow
def test_processes_agree_and_end_together(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    processes = [start(["-c", AGREE, where, str(i), str(tmp_path)], 2) for i in (0, 1)]
    (first, main, _), (second, other, mistake) = ended(processes, 120)
    told = [line for line in main.splitlines() if line.startswith("TOLD")]
    assert told == [line for line in other.splitlines() if line.startswith("TOLD")]
    assert told == [
        "TOLD ['0', inf, None]",
        "TOLD what: where; remedy",
        "TOLD None",
        "TOLD processes have another data than the first one: 1: --process; "
        "give all hosts the same files",
        f"TOLD processes do not see it: 1: {tmp_path / '0'}; "
        "give a --workdir on a file system that all hosts share",
    ]
    assert second == 2 and "error: what: where; remedy\n" in mistake
    assert first not in (0, 2)
    assert "VOICE" in main and "VOICE" not in other


def launched(
    main: str,
    base: Path,
    workdir: Path,
    processes: int,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> list[subprocess.Popen[str]]:
    """A command on four devices, of one process or two, with more changes to its config."""
    command = ["-m", f"launch.{main}", "--config=configs/finetune.py:esci,smoke"]
    command += [f"--workdir={workdir}", f"--config.model.path={base}"]
    changes = {"data.train_size": 24, "training.epochs": 2, "training.batch_size": 8}
    changes |= {"training.checkpoint_every": 2, "adapter.dropout": 0.1, **more}
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    if processes == 1:
        return [start(command, 4)]
    command += [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    command += [f"--heartbeat_seconds={HEARTBEAT}"]
    return [start([*command, f"--process={i}"], 4 // processes) for i in range(processes)]


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """The same training and evaluation by one process and by two: folders, and what was told.

    The evaluation by two is killed once, behind the first predictions that are kept.
    """
    folder = tmp_path_factory.mktemp("runs")
    told = []
    for processes in (1, 2):
        run = folder / str(processes)
        for main in ("train", "evaluate"):
            more = {"data.test_size": 96, "evaluation.batch_size": 2}
            given = main, tiny_base, run, processes, more
            if (processes, main) == (2, "evaluate"):
                killed = launched(*given)
                wait_for(run / "eval" / "esci" / "test.partial.jsonl", killed, lines=2)
                for process in killed:
                    process.kill()
                ended(killed)
            told.append([err for _, err in finished(launched(*given))])
    return folder / "1", folder / "2", told


def steps_of(workdir: Path) -> list[dict]:
    return read_jsonl(workdir / "metrics.jsonl")


@pytest.mark.slow
def test_two_processes_that_split_the_model_train_and_evaluate_like_one(tiny_base, tmp_path):
    """Neither holds a kernel whole, nor what stands for one."""
    split = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "model.quantization": "int8"}
    for processes in (1, 2):
        for main in ("train", "evaluate"):
            run = launched(main, tiny_base, tmp_path / str(processes), processes, split)
            finished(run)
    alone, together = (steps_of(tmp_path / n) for n in ("1", "2"))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)
    one, two = (read_json(tmp_path / n / "eval/esci/test.metrics.json") for n in ("1", "2"))
    assert one["metrics"]["accuracy"] == two["metrics"]["accuracy"]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(runs):
    one, two, told = runs
    alone, together = steps_of(one), steps_of(two)
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    assert len(alone) == 8, "six steps and two evaluations"
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)
    for name in ("test.metrics.json", "test.predictions.jsonl"):
        ours, theirs = ((run / "eval" / "esci" / name).read_bytes() for run in (two, one))
        assert ours == theirs

    files = [[p.relative_to(run).as_posix() for p in run.rglob("*")] for run in (one, two)]
    tidy = [[n for n in names if "/state" not in n and "events" not in n] for names in files]
    assert sorted(tidy[1]) == sorted(tidy[0])
    assert sum("events" in name for name in files[1]) == 1
    starts = read_json(two / "run.json")["starts"]
    assert [start["processes"] for start in starts] == [2]
    assert "examples are there already" in told[3][0]
    for main in (2, 3):
        first, second = told[main]
        assert "esci" in first and "esci" not in second and "error" not in first + second


def wait_for(path: Path, processes: list[subprocess.Popen[str]], lines: int = 0) -> None:
    """Until there is such a path, or a file of more lines."""

    def there() -> bool:
        return path.exists() and (not lines or path.read_bytes().count(b"\n") > lines)

    deadline = time.monotonic() + 240
    while not there() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.01)
    assert there()


@pytest.mark.slow
def test_f51_a_process_that_dies_ends_the_other_and_the_same_command_resumes(
    runs, tiny_base, tmp_path
):
    run, (_, whole, _) = tmp_path / "run", runs
    for victim, step in ((1, 2), (0, 4)):
        processes = launched("train", tiny_base, run, 2)
        wait_for(run / "checkpoints" / f"{step:08d}", processes)
        processes[victim].kill()
        (status, _, told) = ended(processes, HEARTBEAT + 30)[1 - victim]
        assert status not in (0, 75), told
        assert not (run / "adapter").exists()
    finished(launched("train", tiny_base, run, 2))
    assert steps_of(run) == steps_of(whole)
    assert len(read_json(run / "run.json")["starts"]) == 3


@pytest.mark.slow
def test_f03_a_preemption_of_all_processes_saves_and_ends_with_75(runs, tiny_base, tmp_path):
    processes = launched("train", tiny_base, tmp_path / "run", 2)
    wait_for(tmp_path / "run" / "checkpoints" / "00000002", processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert [status for status, *_ in ended(processes)] == [75, 75]
    told = steps_of(tmp_path / "run")
    _, whole, _ = runs
    assert told == steps_of(whole)[: len(told)] and len(told) < len(steps_of(whole))
    assert (tmp_path / "run" / "checkpoints" / f"{told[-1]['step']:08d}").is_dir()
