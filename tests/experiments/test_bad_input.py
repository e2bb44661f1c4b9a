"""Every mistake a user can make ends in one clear line: in process here, as a command if slow."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.experiments import finetune, study
from ecomjax.experiments.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    """Function (change of the lines of a split) -> flags that name the data folder."""

    def make(task="esci", split="train", change=lambda lines: lines):
        source = SyntheticSource(0, Sizes(4, 4, 4))
        for name in ("train", "validation", "test"):
            lines = [json.dumps(row.values).encode() for row in source.rows(task, name)]
            path = tmp_path / "data" / task / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\n".join(change(lines) if name == split else lines) + b"\n")
        return {"task": task, "data.source": "local", "data.path": str(tmp_path / "data")}

    return make


def columns(number, without="", **values):
    """A change of the given line's columns."""

    def change(lines):
        row = json.loads(lines[number - 1]) | values
        row.pop(without, None)
        return [*lines[: number - 1], json.dumps(row).encode(), *lines[number:]]

    return change


def instead(number, line):
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


@pytest.fixture
def broken_base(tiny_base, tmp_path):
    """Function (change of a copy of the base's folder) -> flags that name it."""

    def make(change):
        folder = tmp_path / "base"
        shutil.copytree(tiny_base, folder)
        change(folder)
        return {"model.path": str(folder)}

    return make


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def add_token(folder):
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    new = {"id": 600, "content": "new", "special": False}
    fields["added_tokens"].append(fields["added_tokens"][0] | new)
    path.write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10, 10))
    return {"model.path": str(path)}


TWO = {"tokens": ["red", "shoe"], "ner_tags": ["B-color"]}
MISTAKES = {
    "no data folder": (
        lambda get: {"data.source": "local", "data.path": "no/such/folder"},
        ["no such folder", "no/such/folder"],
    ),
    "no split": (
        lambda get: get("data")() | {"evaluation.split": "test", "data.path": "configs"},
        ["no such folder", "configs/esci"],
    ),
    "missing column": (
        lambda get: get("data")(change=columns(2, without="esci_label")),
        ["missing column 'esci_label'", "train.jsonl:2"],
    ),
    "unknown label": (
        lambda get: get("data")(split="validation", change=columns(3, esci_label="X")),
        ['"X"', "esci_label", "validation.jsonl:3"],
    ),
    "tags and tokens": (
        lambda get: get("data")("queryner", change=columns(1, **TWO)),
        ["1 tags for 2 tokens", "train.jsonl:1"],
    ),
    "not UTF-8": (
        lambda get: get("data")(change=instead(4, b'{"query": "caf\xe9"}')),
        ["not UTF-8", "0xe9", "train.jsonl:4"],
    ),
    "not JSON": (
        lambda get: get("data")(change=instead(2, b'{"query": ')),
        ["not JSON", "train.jsonl:2"],
    ),
    "an empty file": (
        lambda get: get("data")(split="validation", change=lambda lines: []),
        ["holds no rows", "validation.jsonl"],
    ),
    "unknown key": (
        lambda get: {"adapter.rnk": 4},
        ["unknown key", "config.adapter.rnk", "did you mean config.adapter.rank?"],
    ),
    "rank 0": (lambda get: {"adapter.rank": 0}, ["config.adapter.rank", "1 or more"]),
    "a target that is none": (
        lambda get: {"adapter.targets": (".*/nothing/kernel",)},
        [".*/nothing/kernel"],
    ),
    "too long": (
        lambda get: {"training.row_length": 100, "training.too_long": "raise"},
        ["24 of 24 examples longer than the window of 100 tokens", "esci train"],
    ),
    "all too long": (
        lambda get: {"training.row_length": 100},
        ["no example fits the window of 100 tokens", "esci train"],
    ),
    "truncated safetensors": (
        lambda get: get("broken_base")(cut_weights),
        ["truncated", "model.safetensors"],
    ),
    "truncated GGUF": (lambda get: get("gguf"), ["GGUF", "model.gguf", "fetch the file again"]),
    "another vocabulary": (
        lambda get: get("broken_base")(add_token),
        ["tokenizer has 601 tokens, the embedding 600 rows"],
    ),
    "unknown model": (
        lambda get: {"model.path": "", "model.name": "smollm9"},
        ["unknown model 'smollm9'", "configs/models.py", "smollm3_3b"],
    ),
    "a model of the Hub, offline": (
        lambda get: {"model.path": "", "model.name": "owner/name"},
        ["'owner/name' is neither reachable on the Hub nor in its cache", "local folder as path"],
    ),
    "a model name that leads elsewhere": (
        lambda get: {"model.path": "", "model.name": "../../x"},
        ["model name '../../x' is not allowed", "owner/name on the Hub"],
    ),
    "unknown task": (lambda get: {"task.name": "sentiment"}, ["unknown task 'sentiment'", "esci"]),
}


EACH_STAGE = (
    "unknown model",
    "truncated safetensors",
    "another vocabulary",
    "no data folder",
    "unknown label",
    "all too long",
)
"""Those that end the command at different places; what is told of the rest comes the same way."""


@pytest.fixture(params=MISTAKES)
def mistake(request):
    """Dotted changes of a good config, and what the user must be told of them."""
    make, told = MISTAKES[request.param]
    return make(request.getfixturevalue), told


def test_a_mistake_is_told_in_one_line_and_can_be_mended(make_config, mistake, tmp_path):
    changes, told = mistake
    task = changes.pop("task", "esci")
    with pytest.raises(UserError) as caught:
        finetune.run(make_config("finetune", task, changes), str(tmp_path / "run"))
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in told), line
    assert line.count(";") >= 1, "it names no remedy"
    # Nothing stands in the way of the same folder with a mended config.
    with Workdir(tmp_path / "run").writing(make_config("finetune", task)):
        pass


def test_a_study_on_missing_data_leaves_its_folder_free(make_config, tmp_path):
    missing = {"data.source": "local", "data.path": str(tmp_path / "none")}
    with pytest.raises(UserError, match="no such folder"):
        study.run(make_config("study", "smoke", missing), str(tmp_path / "study"))
    with Workdir(tmp_path / "study").writing(make_config("study", "smoke")):
        pass


def test_a_mistake_does_not_free_a_folder_that_holds_work(make_config, tmp_path):
    with pytest.raises(UserError), Workdir(tmp_path).writing(make_config("finetune")):
        (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        raise UserError("disk full", "x", "make room")
    changed = make_config("finetune", changes={"adapter.rank": 3})
    with pytest.raises(UserError, match="another config"), Workdir(tmp_path).writing(changed):
        pass


def named(key, task):
    """The key of a config of one task; in process, `task.` stands for any."""
    return key.replace("task.", f"tasks.{task}.") if key.startswith("task.") else key


@pytest.mark.slow
@pytest.mark.parametrize("mistake", EACH_STAGE, indirect=True)
def test_the_command_ends_with_status_2_and_the_same_line(mistake, tiny_base, tmp_path):
    changes, told = mistake
    task = changes.pop("task", "esci")
    flags = {"model.path": str(tiny_base), "data.train_size": 24} | changes
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            f"--config=configs/finetune.py:{task},smoke",
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{named(key, task)}={value}" for key, value in flags.items()),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ") and all(part in last for part in told)
    assert all(line.startswith(("base ", f"{task}: ")) for line in before), done.stderr
