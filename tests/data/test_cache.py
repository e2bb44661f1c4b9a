import hashlib
import os
import threading
import time

import pytest

from ecomjax.data import cache
from ecomjax.data.cache import Cache, check_growth
from ecomjax.errors import UserError


@pytest.fixture
def build(tmp_path):
    """A cache, and a function (digests, content) -> content of what was made, and how often."""

    class Build:
        cache = Cache(tmp_path / "cache")
        times = 0

        def __call__(self, *digests, content="made"):
            def make(folder):
                self.times += 1
                (folder / "file").write_text(content, encoding="utf-8")

            self.folder = self.cache.made("test", digests, make)
            return (self.folder / "file").read_text(encoding="utf-8")

    return Build()


def test_the_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "ecomjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "ecomjax"
    assert Cache(tmp_path / "mine").folder == tmp_path / "mine"


def test_files_are_made_once_for_each_content(build):
    assert build("a", "b", content="1") == build("a", "b", content="2") == "1"
    assert build.times == 1
    assert build("a", "c", content="3") == "3" and build.times == 2


def damaged(path):
    path.write_text("mode", encoding="utf-8")


def cut(path):
    path.write_text("mad", encoding="utf-8")


@pytest.mark.parametrize(
    "harm",
    [
        damaged,
        cut,
        lambda path: path.unlink(),
        lambda path: (path.parent / "files.json").unlink(),
        lambda path: (path.parent / "files.json").write_text("[1", encoding="utf-8"),
    ],
)
def test_what_is_damaged_is_made_anew(build, harm):
    build("a")
    harm(build.folder / "file")
    assert build("a") == "made" and build.times == 2
    assert build("a") == "made" and build.times == 2
    assert {path.name for path in build.cache.folder.iterdir()} == {build.folder.name}


def test_nothing_is_left_of_what_failed(build):
    def make(folder):
        (folder / "half").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.cache.made("test", ["a"], make)
    assert list(build.cache.folder.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed(build):
    build.cache.folder.mkdir()
    for name, age in (("old", 2 * cache.ABANDONED), ("new", 0)):
        folder = build.cache.folder / f".making-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    build("a")
    assert [path.name for path in build.cache.folder.glob(".making-*")] == [".making-new"]


def test_processes_that_make_the_same_meet(tmp_path):
    """Both are past the check when the first one renames: each ends with a whole folder."""
    barrier = threading.Barrier(2, timeout=10)
    found = []

    def run(content):
        def make(folder):
            barrier.wait()
            (folder / "file").write_text(content, encoding="utf-8")
            barrier.wait()

        folder = Cache(tmp_path).made("test", ["a"], make)
        found.append((folder / "file").read_text(encoding="utf-8"))

    threads = [threading.Thread(target=run, args=(content,)) for content in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and set(found) <= {"1", "2"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_that_comes_second_takes_what_is_there(build, monkeypatch):
    """The other one renames its folder between the last look and our own rename."""
    rename = cache.Path.rename

    def late(path, target):
        if path.name == "new":
            monkeypatch.undo()
            build("a", content="theirs")
        return rename(path, target)

    monkeypatch.setattr(cache.Path, "rename", late)
    assert build("a", content="ours") == "theirs" and build.times == 2


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write the cache \(Not a directory\): .*file"):
        Cache(tmp_path / "file" / "cache").made("test", ["a"], lambda folder: None)


class TestDigest:
    @pytest.fixture
    def read(self, monkeypatch):
        """Names of the files that were read to the end, in order."""
        names = []
        file_digest = hashlib.file_digest

        def counted(file, kind):
            names.append(os.path.basename(file.name))
            return file_digest(file, kind)

        monkeypatch.setattr(hashlib, "file_digest", counted)
        monkeypatch.setattr(cache, "SMALL", 0)
        return names

    def test_is_that_of_the_content(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        assert Cache(tmp_path / "cache").digest(path) == hashlib.sha256(b"abc").hexdigest()

    def test_is_remembered_while_nothing_shows_a_change(self, tmp_path, read, monkeypatch):
        monkeypatch.setattr(cache, "SETTLED", 0)
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        first = Cache(tmp_path / "cache").digest(path)
        assert Cache(tmp_path / "cache").digest(path) == first and read == ["x"]
        path.rename(tmp_path / "y")  # the same file
        Cache(tmp_path / "cache").digest(tmp_path / "y")
        times = (path := tmp_path / "y").stat()
        path.write_bytes(b"abd")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert Cache(tmp_path / "cache").digest(path) == hashlib.sha256(b"abd").hexdigest()

    def test_of_a_file_just_written_is_not(self, tmp_path, read):
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        for _ in range(2):
            Cache(tmp_path / "cache").digest(path)
        assert read == ["x", "x"]

    def test_of_a_file_that_changes_meanwhile_is_an_error(self, tmp_path, read, monkeypatch):
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        file_digest = hashlib.file_digest

        def slow(file, kind):
            path.write_bytes(b"abcd")
            return file_digest(file, kind)

        monkeypatch.setattr(hashlib, "file_digest", slow)
        with pytest.raises(UserError, match=r"file changes while it is read: .*x; wait"):
            Cache(tmp_path / "cache").digest(path)

    def test_needs_no_cache_that_can_be_written(self, tmp_path, read):
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        assert len(Cache(path / "cache").digest(path)) == 64


def test_growth_is_bounded(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(10**6))
    check_growth(path, cache.MOST_GROWN * 10**6)
    with pytest.raises(UserError, match="file holds more than 100 times its size"):
        check_growth(path, cache.MOST_GROWN * 10**6 + 1)
    path.write_bytes(b"")
    check_growth(path, cache.GROWTH_FREE)
