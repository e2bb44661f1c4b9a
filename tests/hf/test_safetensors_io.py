"""safetensors: what the library writes is read, forged and broken files are refused."""

import json
import os
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ecomjax.errors import UserError
from ecomjax.hf.safetensors_io import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    check_header,
    write_file,
    write_folder,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.arange(8, dtype=ml_dtypes.bfloat16).reshape(2, 2, 2),
    "d": np.array(3.0, np.float32),
}


def write(path, header, data=b"", length=None):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    weights = SafetensorsFolder(tmp_path)
    assert set(weights) == set(TENSORS) and len(weights) == 4
    for name, tensor in TENSORS.items():
        assert weights[name].dtype == tensor.dtype
        np.testing.assert_array_equal(weights[name], tensor)


ORDERS = {"in order": list(TENSORS), "backwards": list(TENSORS)[::-1]}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_one_file_where_it_fits(tmp_path, order):
    """Byte by byte the file of the library, in whatever order tensors come."""
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    (tmp_path / "model").mkdir()
    write_folder(tmp_path / "model", TENSORS, ((name, TENSORS[name]) for name in order))
    assert os.listdir(tmp_path / "model") == [SINGLE]
    assert (tmp_path / "model" / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()
    np.testing.assert_array_equal(load_file(tmp_path / "model" / SINGLE)["c"], TENSORS["c"])


def test_every_dtype_and_strange_names_are_written_as_by_the_library(tmp_path):
    kinds = "bool uint8 int8 int16 uint16 float16 int32 uint32 float32 float64 int64 uint64"
    tensors = {f'{kind} "é"': np.ones((2, 3), kind) for kind in kinds.split()}
    tensors |= {"bfloat16": np.ones(5, ml_dtypes.bfloat16), "none": np.zeros((0, 3), np.float32)}
    tensors["turned"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_file({k: v.copy("C") for k, v in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    write_file(tmp_path / "ours", tensors, tensors.items())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_shards_and_their_index(tmp_path, order):
    write_folder(tmp_path, TENSORS, ((name, TENSORS[name]) for name in order), max_shard_bytes=24)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) == 3
    assert not list(tmp_path.glob(".*"))
    weights = SafetensorsFolder(tmp_path)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(weights[name], tensor)


def test_one_tensor_is_held_at_a_time(tmp_path):
    """Each is let go before the next is made."""
    shapes = {str(i): np.empty((64, 1024), np.float32) for i in range(8)}

    def tensors():
        for name in shapes:
            tracemalloc.reset_peak()
            tensor = np.ones((64, 1024), np.float32)
            yield name, tensor
            del tensor
            assert tracemalloc.get_traced_memory()[1] - before < 1.5 * 64 * 1024 * 4

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        write_folder(tmp_path, shapes, tensors(), max_shard_bytes=2**20)
    finally:
        tracemalloc.stop()


def test_what_was_not_announced_leaves_no_file(tmp_path):
    (tmp_path / "model").mkdir()
    given = {
        "was not written": {"a": TENSORS["a"]},
        "announced": {**TENSORS, "a": TENSORS["b"]},
    }
    for message, tensors in given.items():
        with pytest.raises(ValueError, match=message):
            write_folder(tmp_path / "model", TENSORS, tensors.items())
        assert not os.listdir(tmp_path / "model")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"1234", "truncated"),
        ({"a": entry(0, 8)}, bytes(12), "truncated or padded"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "overlap before tensor 'b'"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "gap or an overlap before tensor 'b'"),
        ({"a": entry(0, 8, dtype="F16")}, bytes(8), "'a' that contradicts itself"),
        ({"a": entry(0, 8, shape=(3,))}, bytes(8), "'a' that contradicts itself"),
        ({"a": entry(0, 8, shape=(-2,))}, bytes(8), "'a' that contradicts itself"),
        ({"a": entry(0, 8, dtype="F33")}, bytes(8), "'a' that contradicts itself"),
        ({"a": {"dtype": "F32"}}, b"", "'a' that contradicts itself"),
        ({"a": 7}, b"", "'a' that contradicts itself"),
        ([1], b"", "no object"),
        (b'{"a": {"dtype": "F32"', b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', b"", "names 'a' twice"),
    ],
)
def test_broken_headers(tmp_path, header, data, message):
    write(tmp_path / SINGLE, header, data)
    with pytest.raises(UserError) as error:
        SafetensorsFolder(tmp_path)
    assert message in str(error.value)
    assert SINGLE in str(error.value)


@pytest.mark.parametrize("length", [2**63, 200 * 2**20, 100])
def test_absurd_header_length(tmp_path, length):
    write(tmp_path / SINGLE, b"{}", length=length)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"its header is {length} bytes"):
        check_header(tmp_path / SINGLE)
    assert time.monotonic() - start < 1.0


def test_huge_header_that_is_there(tmp_path):
    path = tmp_path / SINGLE
    write(path, b"{}", length=200 * 2**20)
    os.truncate(path, 8 + 200 * 2**20)
    start = time.monotonic()
    with pytest.raises(UserError, match="has a header of"):
        check_header(path)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("size", [0, 3, 8])
def test_nearly_empty_files(tmp_path, size):
    (tmp_path / SINGLE).write_bytes(b"\x10\0\0\0\0\0\0\0"[:size])
    with pytest.raises(UserError, match="safetensors file"):
        check_header(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..", "x.bin"]
)
def test_index_stays_in_its_folder(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="outside the folder"):
        SafetensorsFolder(folder)


def test_index_follows_no_link_out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": TENSORS["a"]}, tmp_path / "secret.safetensors")
    (folder / "x.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(UserError, match="outside the folder"):
        SafetensorsFolder(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": TENSORS["a"]}, blobs / "0123")
    (snapshot / "x.safetensors").symlink_to("../../blobs/0123")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    np.testing.assert_array_equal(SafetensorsFolder(snapshot)["a"], TENSORS["a"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.safetensors", "z": "x.safetensors"}, "disagree about tensor 'z'"),
        ({"a": "y.safetensors"}, "missing shard 'y.safetensors'"),
        ([1], "no weight_map"),
        ({"a": 1}, "no weight_map"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, weight_map, message):
    save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as error:
        SafetensorsFolder(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "w.npy"])
def test_f47_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="convert them to safetensors"):
        SafetensorsFolder(tmp_path)
