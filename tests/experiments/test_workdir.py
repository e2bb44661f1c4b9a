import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import finetune
from ecomjax.errors import UserError
from ecomjax.experiments import workdir as module
from ecomjax.experiments.config import from_config, to_dict
from ecomjax.experiments.files import jsonable, read_json, write_json, write_jsonl, write_text
from ecomjax.experiments.workdir import Workdir, git_revision

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config():
    return from_config(finetune.get_config("esci"))


def with_changes(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


@pytest.mark.parametrize("name", ["run", "with spaces", "Käse-運行", "n" * 255])
def test_f12_a_run_folder_is_made_and_opened_again(tmp_path, config, name):
    for _ in range(2):
        with Workdir(tmp_path / "deep" / name).writing(config) as folder:
            assert read_json(folder.config) == to_dict(config)


def test_f10_another_config_is_refused_with_the_keys_that_differ(tmp_path, config):
    with Workdir(tmp_path).writing(config):
        pass
    before = (tmp_path / "config.json").read_bytes()
    other = with_changes(with_changes(config, "adapter", rank=8), "data", path="x")
    with pytest.raises(UserError) as caught, Workdir(tmp_path).writing(other):
        pass
    assert "config.adapter.rank 16 -> 8" in str(caught.value)
    assert 'config.data.path "" -> "x"' in str(caught.value)
    assert "alpha" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_keys_that_came_after_the_folder_stood_at_their_defaults(tmp_path, config):
    with Workdir(tmp_path).writing(config) as folder:
        pass
    old = read_json(folder.config)
    del old["mesh"], old["tasks"]["esci"]["label_score"], old["evaluation"]["top_p"]
    write_json(folder.config, old)
    with Workdir(tmp_path).writing(config):
        assert read_json(folder.config) == old
    other = with_changes(with_changes(config, "mesh", fsdp=2), "evaluation", top_p=0.5)
    told = r"config\.evaluation\.top_p 1\.0 -> 0\.5.*config\.mesh\.fsdp 1 -> 2"
    with pytest.raises(UserError, match=told), Workdir(tmp_path).writing(other):
        pass
    del old["tasks"]["esci"]["name"]
    write_json(folder.config, old)
    told = r'config\.tasks\.esci\.name \(absent\) -> "esci"; '
    with pytest.raises(UserError, match=told), Workdir(tmp_path).writing(config):
        pass


def test_f10_keys_may_change_where_that_is_asked_for(tmp_path, config):
    other = with_changes(with_changes(config, "adapter", rank=8), "training", seed=9, keep=1)

    def open_again(allow, config=other):
        return Workdir(tmp_path).writing(config, allow=allow)

    with Workdir(tmp_path).writing(config) as folder:
        folder.record_start()
    with (
        pytest.raises(UserError, match=r"rank 16.*--allow_config_change=adapter\.rank$") as caught,
        open_again(["training"]),
    ):
        pass
    assert "seed" not in str(caught.value)
    assert read_json(tmp_path / "config.json") == to_dict(config)
    with open_again(["adapter.rank", "training.seed", "training.keep"]) as folder:
        folder.record_start()
    assert read_json(tmp_path / "config.json") == to_dict(other)
    first, second = read_json(tmp_path / "run.json")["starts"]
    assert "config_changes" not in first
    assert "config.adapter.rank 16 -> 8" in second["config_changes"]
    with open_again([]) as folder:  # It is the config of the run now.
        folder.record_start()
    assert "config_changes" not in read_json(tmp_path / "run.json")["starts"][-1]
    with pytest.raises(UserError, match=r"no key 'adapter\.rnk'"), open_again(["adapter.rnk"]):
        pass


def test_f10_a_change_that_turns_out_a_mistake_is_taken_back(tmp_path, config):
    other = with_changes(config, "adapter", rank=8)
    with Workdir(tmp_path).writing(config):
        (tmp_path / "work").write_text("of a run")
    before = (tmp_path / "config.json").read_bytes()
    for error, kept in ((UserError("a", "b", "c"), True), (KeyboardInterrupt(), False)):
        with pytest.raises(type(error)), Workdir(tmp_path).writing(other, allow=["adapter"]):
            raise error
        assert ((tmp_path / "config.json").read_bytes() == before) == kept


def test_sections_may_be_left_out_of_the_comparison(tmp_path, config):
    with Workdir(tmp_path).writing(config):
        pass
    other = with_changes(config, "evaluation", split="validation")
    with Workdir(tmp_path).writing(other, ignore=["evaluation"]):
        pass
    with pytest.raises(UserError, match=r"config\.evaluation\.split"):
        Workdir(tmp_path).writing(other, ignore=["eval"]).__enter__()


def test_a_config_file_that_is_no_json_is_told(tmp_path, config):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"), Workdir(tmp_path).writing(config):
        pass


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p / ("n" * 256), "name too long"),
        (lambda p: (p / "file").write_text("x") and p / "file", "exists"),
        (lambda p: (p / "file").write_text("x") and p / "file" / "run", "Not a directory"),
    ],
)
def test_f12_a_folder_that_cannot_be_is_one_clear_line(tmp_path, config, make, told):
    with pytest.raises(UserError, match=told), Workdir(make(tmp_path)).writing(config):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_f12_a_read_only_folder_is_one_clear_line(tmp_path, config):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"), Workdir(tmp_path / "x").writing(config):
        pass


def test_f12_a_read_only_disk_is_one_clear_line(tmp_path, config):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        for path in (tmp_path, tmp_path / "run"):
            with pytest.raises(UserError, match="Read-only"), Workdir(path).writing(config):
                pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_f08_a_second_writer_is_refused_and_the_first_goes_on(tmp_path, config):
    with Workdir(tmp_path).writing(config):
        for _ in range(2):
            with (
                pytest.raises(UserError, match=f"process {os.getpid()} on"),
                Workdir(tmp_path).writing(config),
            ):
                pass
    with Workdir(tmp_path).writing(config):
        pass


def test_f08_a_writer_in_another_process_is_refused_until_it_is_killed(tmp_path, config):
    code = (
        "import sys, time\n"
        "from configs import finetune\n"
        "from ecomjax.experiments.config import from_config\n"
        "from ecomjax.experiments.workdir import Workdir\n"
        "with Workdir(sys.argv[1]).writing(from_config(finetune.get_config('esci'))):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=str(other.pid)), Workdir(tmp_path).writing(config):
            pass
        other.kill()
        other.wait()
        with Workdir(tmp_path).writing(config):
            pass


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid(), "born": "another time"}, True),
        ({"host": "elsewhere", "pid": 1, "born": "1"}, False),
        ("torn", True),
    ],
)
def test_f08_a_lock_left_behind(tmp_path, config, owner, free):
    lock = Workdir(tmp_path).lock
    lock.write_text(owner if owner == "torn" else json.dumps(owner), encoding="utf-8")
    if free:
        with Workdir(tmp_path).writing(config):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match="elsewhere"), Workdir(tmp_path).writing(config):
            pass


def test_f08_a_lock_of_a_lost_host_is_taken_over_when_it_shows_no_life(
    tmp_path, config, monkeypatch
):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "1"}))
    with pytest.raises(UserError, match=r"process 1 on elsewhere.*or wait 5 minutes"):
        with Workdir(tmp_path).writing(config):
            pass
    then = time.time() - module.STALE - 60
    os.utime(lock, (then, then))
    with Workdir(tmp_path).writing(config):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.glob(".lock*")] == [".lock"]

    # A writer keeps its own fresh.
    monkeypatch.setattr(module, "STALE", 0.1)
    with Workdir(tmp_path).writing(config):
        os.utime(lock, (then, then))
        deadline = time.monotonic() + 10
        while lock.stat().st_mtime == then and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.stat().st_mtime > then


def test_f08_the_lock_is_given_back_after_an_error(tmp_path, config):
    with pytest.raises(RuntimeError), Workdir(tmp_path).writing(config):
        raise RuntimeError
    with Workdir(tmp_path).writing(config):
        pass


def test_f13_every_start_is_told_and_the_run_keeps_its_id(tmp_path, monkeypatch):
    first, again, other = (Workdir(tmp_path / name) for name in ("a", "a", "b"))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    ids = [w.record_start(seed=np.int64(3), model={"sha256": "ab"}) for w in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    starts = read_json(first.run)["starts"]
    assert len(starts) == 2
    assert starts[0]["seed"] == 3 and starts[0]["model"] == {"sha256": "ab"}
    assert starts[0]["versions"]["jax"] and starts[0]["devices"]["count"] == 8


def test_without_git_there_is_no_revision(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(module.subprocess, "run", missing)
    assert git_revision() is None


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_f04_files_are_replaced_whole(tmp_path, monkeypatch, moment):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, full)
        with pytest.raises(UserError, match=r"No space left on device.*file\.txt"):
            write_text(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_json_holds_what_experiments_hand_over(tmp_path):
    @dataclasses.dataclass
    class Score:
        value: float
        counts: tuple[int, ...]

    value = {
        "score": Score(float("nan"), (1, 2)),
        "array": np.array([[1.5, np.inf]], np.float32),
        "number": np.float32(0.5),
        3: Path("a/b"),
        "word": "Käse",
    }
    plain = {
        "score": {"value": None, "counts": [1, 2]},
        "array": [[1.5, None]],
        "number": 0.5,
        "3": "a/b",
        "word": "Käse",
    }
    assert jsonable(value) == plain
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == plain
    assert "Käse" in (tmp_path / "x.json").read_text(encoding="utf-8")
    write_jsonl(tmp_path / "x.jsonl", [value, value])
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [plain, plain]


@pytest.mark.parametrize("error", [UserError("a", "b", "c"), KeyboardInterrupt(), RuntimeError()])
def test_a_run_that_left_nothing_binds_the_folder_to_no_config(tmp_path, config, error):
    with pytest.raises(type(error)), Workdir(tmp_path).writing(config):
        raise error
    with Workdir(tmp_path).writing(with_changes(config, "training", seed=9)):
        pass


def test_f13_a_clock_set_back_overwrites_nothing(tmp_path, monkeypatch):
    now = 1e9
    for _ in range(2):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        Workdir(tmp_path).record_start()
        now -= 3600
    run = read_json(tmp_path / "run.json")
    assert [x["time"] for x in run["starts"]] == ["20010909T014640Z", "20010909T004640Z"]
    assert run["run_id"].startswith("20010909T014640Z-")
