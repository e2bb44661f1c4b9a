import errno
import io
import json
import logging
import math
import subprocess
import sys

import pytest

from ecomjax.training import writers
from ecomjax.training.writers import MetricsWriter, Progress


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_step_is_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0 / step, "rate": math.nan})
            assert records(path)[-1] == {"step": step, "loss": 1.0 / step, "rate": None}
    with MetricsWriter(path) as writer:
        writer.write(3, {"loss": 0})
    assert [r["step"] for r in records(path)] == [1, 2, 3]


def test_cutting_back_drops_what_comes_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    with MetricsWriter(path) as writer:
        writer.cut_back(2)
        assert path.read_bytes() == kept
        writer.write(3, {"loss": 9.0})
    assert [(r["step"], r["loss"]) for r in records(path)] == [(1, 1), (2, 2), (2, 2), (3, 9)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3}', b"\xff\xfe", b"[]\n", b"\n"])
def test_a_torn_line_is_dropped_and_told(tmp_path, tail, cut, caplog):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 2.0}\n'
    path.write_bytes(whole + tail)
    with caplog.at_level(logging.WARNING), MetricsWriter(path) as writer:
        if cut:
            writer.cut_back(1)
        assert path.read_bytes() == whole
        writer.write(2, {"loss": 1.0})
    assert [r["step"] for r in records(path)] == [1, 2]
    assert len(caplog.records) == 1


def test_cutting_back_survives_dying_in_the_middle(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 0.0})
        before = path.read_bytes()

        def die(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(writers.os, "replace", die)
            writer.cut_back(1)
    assert path.read_bytes() == before


def test_numbers_reach_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    folder = tmp_path / "tensorboard"
    with MetricsWriter(tmp_path / "metrics.jsonl", folder) as writer:
        writer.cut_back(4)
        writer.write(5, {"loss": 0.25, "loss/absent": math.nan})
    (file,) = folder.iterdir()
    events = [Event.FromString(raw) for raw in framed(file.read_bytes())]
    values = [(v.tag, v.simple_value, e.step) for e in events for v in e.summary.value]
    assert values == [("loss", 0.25, 5)]
    assert any(e.HasField("session_log") and e.step == 5 for e in events)


def test_torch_is_not_imported_for_tensorboard(tmp_path):
    pytest.importorskip("torch")
    program = (
        "import sys; from ecomjax.training.writers import MetricsWriter\n"
        f"with MetricsWriter({str(tmp_path / 'metrics.jsonl')!r}, {str(tmp_path)!r}) as writer:\n"
        "    writer.write(1, {'loss': 1.0})\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().split() == ["False"]
    assert any("tfevents" in path.name for path in tmp_path.iterdir())


def framed(raw):
    """The payloads of a TFRecord file: length, checksum, payload, checksum."""
    while raw:
        size = int.from_bytes(raw[:8], "little")
        yield raw[12 : 12 + size]
        raw = raw[16 + size :]


def test_f13_two_starts_in_a_second_keep_the_events_of_both(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    for step in (1, 2):
        with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as writer:
            writer.write(step, {"loss": 1.0})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_no_event_file_without_numbers(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard"):
        pass
    assert not (tmp_path / "tensorboard").exists()


def a_file_in_its_place(folder, monkeypatch):
    folder.write_text("")


def no_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)


def a_full_disk(folder, monkeypatch):
    from tensorboardX.record_writer import RecordWriter

    flushes = iter([True, True])

    def flush(_):
        if not next(flushes, False):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "flush", flush)


@pytest.mark.parametrize("fail", [a_file_in_its_place, no_package, a_full_disk])
def test_f50_without_tensorboard_the_file_goes_on(tmp_path, monkeypatch, caplog, fail):
    """It is told once, and never waited for: more steps than any queue holds are written."""
    fail(tmp_path / "tensorboard", monkeypatch)
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as writer:
        for step in range(1, 31):
            writer.write(step, {"loss": 1.0})
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == list(range(1, 31))
    (told,) = caplog.records
    assert told.message.startswith("no TensorBoard from here on (")
    assert "metrics.jsonl has all numbers" in told.message


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_without_a_terminal_there_is_a_line_at_times():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, start=10, every=30.0, stream=stream, clock=clock) as progress:
        for step in range(11, 21):
            clock.now += 10.0
            progress.update(step, loss=1.5, tokens=2000)
    assert stream.getvalue().splitlines() == [
        "training: step 13/100, loss 1.5000, 200 tokens/s, 14:30 left",
        "training: step 16/100, loss 1.5000, 200 tokens/s, 14:00 left",
        "training: step 19/100, loss 1.5000, 200 tokens/s, 13:30 left",
    ]


def test_the_last_step_is_always_told():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(3, what="tuning", stream=stream, clock=clock)
    for step in (1, 2, 3):
        clock.now += 0.5
        progress.update(step, loss=1.0, tokens=1)
    assert stream.getvalue() == "tuning: step 3/3, loss 1.0000, 2 tokens/s, 0:00 left\n"


def test_speed_follows_the_last_updates():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, every=1.0, stream=stream, clock=clock)
    clock.now += 500.0
    progress.update(1, 1.0, 10)
    for step in range(2, 61):
        clock.now += 1.0
        progress.update(step, 1.0, 100)
    assert stream.getvalue().splitlines()[-1].endswith("100 tokens/s, 15:40 left")


def test_on_a_terminal_there_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(4, start=1, stream=stream) as progress:
        for step in (2, 3, 4):
            progress.update(step, loss=0.5, tokens=10)
    bar = stream.getvalue()
    assert "4/4" in bar and "loss 0.5000" in bar and "tokens/s" in bar


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3725, "1:02:05")]
)
def test_durations(seconds, told):
    assert writers._duration(seconds) == told
