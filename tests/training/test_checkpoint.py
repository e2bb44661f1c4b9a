import concurrent.futures
import errno
import logging
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecomjax.errors import UserError
from ecomjax.training import manifest
from ecomjax.training.checkpoint import Checkpoints, better
from ecomjax.training.state import new_state
from ecomjax.typing import LowRank

ROOT = Path(__file__).resolve().parents[2]


def adapter(seed=0):
    a, b = jax.random.normal(jax.random.key(seed), (2, 3, 8, 2))
    leaf = LowRank(a=a, b=jnp.swapaxes(b, 1, 2), scale=jnp.full((3,), 2.0), dropout=0.1)
    return {"layers": {"attn": {"q": {"kernel": leaf}}, "mlp": {"up": {"kernel": leaf}}}}


def everything(seed=0):
    """A state with each kind of leaf that a run may hold, and values that are easily lost."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "train": new_state(adapter(seed), optimizer, jax.random.key(seed)),
        "key": jax.random.key(seed + 1),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "bfloat16": jnp.array([1.0, -0.0, jnp.nan, 1e-40], jnp.bfloat16),
        "odd": jax.lax.bitcast_convert_type(jnp.array([0x7FC12345, 1], jnp.uint32), jnp.float32),
        "numpy": np.arange(4, dtype=np.int64) + 2**40,
        "flag": np.array([True, False]),
        "scalar": np.float32(0.1),
    }


def abstract(tree):
    def shape_of(x):
        return x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(shape_of, tree)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert bits(x) == bits(y)


def save(checkpoints, *arguments):
    """Saves, and waits for it."""
    checkpoints.save(*arguments)
    checkpoints.wait()


def small(step):
    return {"x": jnp.full((4,), step, jnp.float32), "n": jnp.asarray(step)}


@pytest.mark.parametrize("form", [lambda tree: tree, abstract], ids=["arrays", "shapes"])
def test_a_state_comes_back_bit_by_bit(tmp_path, form):
    state = everything()
    data = {"epoch": 1, "iterator": {"next": [3, 4]}, "best": -math.inf, "loss": math.nan}
    save(Checkpoints(tmp_path / "c d"), 7, state, data)
    restored, told, step = Checkpoints(tmp_path / "c d").restore(None, form(state))
    assert_same(restored, state)
    assert step == 7
    assert math.isnan(told.pop("loss"))
    assert told == {"epoch": 1, "iterator": {"next": [3, 4]}, "best": -math.inf}


def test_a_sharded_state_is_restored_onto_other_devices(tmp_path):
    def placed(devices):
        mesh = jax.make_mesh(
            (devices,),
            ("x",),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=jax.devices()[:devices],
        )
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    x = jnp.arange(8.0)
    save(Checkpoints(tmp_path), 1, {"x": jax.device_put(x, placed(8))}, {})
    for devices in (1, 2, 4):
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(devices))}
        restored, _, _ = Checkpoints(tmp_path).restore(1, like)
        assert restored["x"].sharding == placed(devices)
        assert bits(restored["x"]) == bits(x)


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 100_000_000, 20):
        save(checkpoints, step, small(step), {"step": step})
    assert checkpoints.steps() == [20, 100_000_000]
    assert checkpoints.latest() == 100_000_000
    assert Checkpoints(tmp_path).restore(20, small(0))[1] == {"step": 20}


def test_a_step_may_be_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1, 2):
        save(checkpoints, 5, small(value), {})
    assert_same(checkpoints.restore(5, small(0))[0], small(2))


def test_f15_nan_is_never_better():
    assert better(0.5, None) and better(0.6, 0.5) and better(0.0, -math.inf)
    assert not better(0.5, 0.5) and not better(0.4, 0.5)
    assert not better(math.nan, None) and not better(math.nan, 0.1)


def test_f15_the_best_is_kept_for_every_step_a_run_can_resume_from(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)

    def step(number, best):
        if best:
            checkpoints.save_best(number, adapter(number), {"score": number})
        save(checkpoints, number, small(number), {})

    step(10, best=True)
    for number in (20, 30, 40):
        step(number, best=False)
    assert checkpoints.best() == 10 and checkpoints.steps() == [30, 40]
    step(50, best=True)
    assert checkpoints.best() == 50
    # Step 40 is still there to resume from: its best is that of step 10.
    checkpoints.cut_back(40)
    assert checkpoints.best() == 10 and checkpoints.steps() == [40]
    state, data, number = checkpoints.restore_best(abstract(adapter()))
    assert_same(state, adapter(10))
    assert (data, number) == ({"score": 10}, 10)
    for number in (50, 60):
        step(number, best=number == 50)
    assert sorted(os.listdir(tmp_path / "best")) == ["00000050"]


def test_a_best_without_a_checkpoint_after_it_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 15):
        checkpoints.save_best(step, small(step), {})
    save(checkpoints, 12, small(12), {})
    assert sorted(os.listdir(tmp_path / "best")) == ["00000010", "00000015"]


MOMENTS = [
    "checkpoint.ocp.save_async", "checkpoint.manifest.commit", "manifest._digests",
    "manifest._sync", "manifest.os.replace", "manifest._sync_folder",
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_f02_dying_while_saving_leaves_the_step_before(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, small(1), {})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"ecomjax.training.{moment}", die)
        save(checkpoints, 2, small(2), {})
    after = Checkpoints(tmp_path, keep=1)
    assert after.steps() == [1]
    assert_same(after.restore(None, small(0))[0], small(1))
    save(after, 2, small(2), {})
    assert sorted(os.listdir(tmp_path)) == ["00000002"]


def test_f01_a_killed_process_leaves_the_last_step_it_told(tmp_path):
    """Saves at every step, so that the kill hardly misses one."""
    code = (
        "import sys\n"
        "import jax.numpy as jnp\n"
        "from ecomjax.training.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "for step in range((checkpoints.latest() or 0) + 1, 10**6):\n"
        "    state = {'x': jnp.full((4,), step, jnp.float32), 'n': jnp.asarray(step)}\n"
        "    checkpoints.save(step, state, {'step': step})\n"
        "    print(step - 1, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        while int(child.stdout.readline()) < 5:
            pass
        child.kill()
        told = max([5, *map(int, child.stdout.read().split())])
    state, data, step = Checkpoints(tmp_path).restore(None, small(0))
    assert step in (told, told + 1, told + 2)
    assert data == {"step": step}
    assert_same(state, small(step))


def test_a_save_in_flight_is_no_step_until_it_is_committed(tmp_path, monkeypatch):
    go, commit = threading.Event(), manifest.commit

    def slow(*arguments):
        assert go.wait(60)
        commit(*arguments)

    monkeypatch.setattr(manifest, "commit", slow)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.check()
        assert checkpoints.latest() is None and checkpoints.steps() == []
        go.set()
    assert checkpoints.latest() == 1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small(2), {})
        checkpoints.save(3, small(3), {})  # Waits for the one before.
        assert checkpoints.steps()[:2] == [1, 2]


def test_a_state_may_be_given_away_while_it_is_written(tmp_path):
    """The step after takes over its buffers; what is written is what was handed over."""
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    zero = {"x": jnp.zeros(200_000), "y": jnp.zeros((3, 4), jnp.int32)}
    state = next_step(zero)
    assert zero["x"].is_deleted()
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, state, {})
            state = next_step(state)
    for step in range(1, 9):
        restored = checkpoints.restore(step, state)[0]
        assert all((np.asarray(x) == step).all() for x in jax.tree.leaves(restored))


@pytest.mark.parametrize("way", ["check", "save", "wait", "save_best", "leave"])
def test_f04_a_failed_save_is_told_by_whatever_comes_next(tmp_path, monkeypatch, way):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, small(1), {})
    told = pytest.raises(UserError, match=r"No space left on device.*00000002")
    with told, checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "commit", full)
            checkpoints.save(2, small(2), {})
            concurrent.futures.wait([checkpoints._saving])
        assert checkpoints.latest() == 1
        if way in ("save", "save_best"):
            getattr(checkpoints, way)(3, small(3), {})
        elif way != "leave":
            getattr(checkpoints, way)()
    checkpoints.check()  # It is told once.
    assert checkpoints.restore(None, small(0))[2] == 1


def test_f04_a_failed_save_does_not_hide_another_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(manifest, "commit", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        raise KeyboardInterrupt
    assert "No space left" in caplog.text


def damages():
    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    return {
        "a bit flipped": flip,
        "cut to nothing": lambda path: path.write_bytes(b""),
        "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "missing": lambda path: path.unlink(),
        "one more": lambda path: path.with_name("foreign").write_bytes(b"x"),
    }


@pytest.mark.parametrize("damage", damages())
def test_f05_f06_damage_to_any_file_is_found_and_the_step_before_used(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, small(step), {})
    files = [p for p in (tmp_path / "00000002").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        damages()[damage](file)
        caplog.clear()
        state, _, step = Checkpoints(tmp_path).restore(None, small(0))
        assert step == 1, file
        assert_same(state, small(1))
        assert "00000002" in caplog.text
        with pytest.raises(UserError, match="damaged"):
            Checkpoints(tmp_path).restore(2, small(0))
        file.write_bytes(whole)
        file.with_name("foreign").unlink(missing_ok=True)
    assert Checkpoints(tmp_path).restore(None, small(0))[2] == 2


def test_f06_nothing_usable_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoints.restore(None, small(0))
    with pytest.raises(UserError, match="no best checkpoint"):
        checkpoints.restore_best(small(0))
    save(checkpoints, 1, small(1), {})
    (tmp_path / "00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoints.restore(None, small(0))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"x": jnp.zeros((5,)), "n": jnp.asarray(0)}, r"first x: \(\(4,\), 'float32'\) is stored"),
        ({"x": jnp.zeros((4,), jnp.bfloat16), "n": jnp.asarray(0)}, "bfloat16"),
        ({"x": jnp.zeros((4,))}, "first n: .* absent is wanted"),
        (small(0) | {"y": jnp.zeros(())}, "first y: absent is stored"),
    ],
)
def test_f10_a_state_of_another_form_is_refused(tmp_path, other, told):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, small(1), {})
    with pytest.raises(UserError, match=told):
        checkpoints.restore(None, other)


def test_f07_foreign_names_are_told_once_and_left_alone(tmp_path, caplog):
    (tmp_path / "abc").mkdir()
    (tmp_path / "007").mkdir()
    (tmp_path / "00000099").symlink_to(tmp_path / "00000099")
    (tmp_path / "00000098").write_text("a file")
    (tmp_path / ".tmp-00000097").mkdir()
    checkpoints = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        save(checkpoints, 3, small(3), {})
        assert checkpoints.steps() == [3]
        assert checkpoints.latest() == 3
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in ("abc", "007", "00000099", "00000098"))
    assert {p.name for p in tmp_path.iterdir()} == {
        "abc", "007", "00000099", "00000098", "00000003",
    }  # fmt: skip


def full_disk(folder, shrink):
    """What a process tells of a second save after `shrink`, a statement that leaves no room."""
    code = (
        "import resource, sys\n"
        "import jax, jax.numpy as jnp\n"
        "from ecomjax.errors import UserError\n"
        "from ecomjax.training.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "state = {'x': jax.random.normal(jax.random.key(0), (50_000,))}\n"
        "checkpoints.save(1, state, {})\n"
        "checkpoints.wait()\n"
        f"{shrink}\n"
        "try:\n"
        "    checkpoints.save(2, state, {})\n"
        "    checkpoints.wait()\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print(checkpoints.steps(), checkpoints.restore(None, state)[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True
    )
    told, steps = done.stdout.splitlines()
    assert told.startswith("cannot write a checkpoint (") and "00000002" in told
    assert steps == "[1] 1"
    return told


def test_f04_a_file_that_may_not_grow_is_one_clear_line_and_costs_nothing(tmp_path):
    shrink = "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    assert "File too large" in full_disk(tmp_path, shrink)


def test_f04_a_full_disk_is_one_clear_line_and_costs_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        assert "No space left on device" in full_disk(tmp_path / "checkpoints", "pass")
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_f12_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match=r"cannot write a checkpoint \(Not a directory\)"):
        checkpoints.save(1, small(1), {})
    with pytest.raises(UserError, match=r"cannot write a checkpoint \(File name too long\)"):
        Checkpoints(tmp_path / ("n" * 256)).save(1, small(1), {})


def test_f12_any_name_that_the_system_takes_will_do(tmp_path):
    for name in ("with spaces", "Käse-運行 🛒", "n" * 255):
        checkpoints = Checkpoints(tmp_path / name)
        save(checkpoints, 1, small(1), {})
        assert_same(checkpoints.restore(None, small(0))[0], small(1))
