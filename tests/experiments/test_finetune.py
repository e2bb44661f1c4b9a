import collections
import contextlib
import copy
import dataclasses
import json
import socket
import sys

import numpy as np
import pytest

from ecomjax import trees
from ecomjax.data import pipeline
from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.experiments import evaluate, finetune
from ecomjax.experiments.assembly import load_base
from ecomjax.experiments.config import to_dict
from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.experiments.learners import loss_of
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.checkpoints import load_pretrained
from ecomjax.hf.files import sha256_of
from ecomjax.hf.peft import read_adapter
from ecomjax.hf.safetensors_io import SafetensorsFile
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.tasks.esci import Esci
from ecomjax.training.checkpoint import Checkpoints
from ecomjax.training.guards import Guard

STEPS = 12
SECRETS = ("of-the-model-hub-7f3a", "of-the-tracker-91bc", "of-the-proxy-55de")


@pytest.fixture(scope="module")
def config(make_config):
    return make_config("finetune", changes={"training.select": "loss"})


@pytest.fixture(scope="module")
def train(as_in_production):
    """Function (config, folder): trains there, as the command does."""

    def run(config, folder):
        with as_in_production():
            finetune.run(config, str(folder))

    return run


@pytest.fixture(scope="module")
def trained(config, train, tmp_path_factory):
    """A finished run; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "esci"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRETS[0])
        patch.setenv("WANDB_API_KEY", SECRETS[1])
        command = ["train", f"--note={SECRETS[0]}", f"--tracker=https://me:{SECRETS[2]}@host"]
        patch.setattr(sys, "argv", command)
        train(config, folder)
    return folder


def test_f44_local_paths_need_no_network(trained, tiny_base, as_in_production):
    """What is run as in production may not even ask for one."""
    assert (trained / "adapter" / "adapter_model.safetensors").exists()
    assert read_json(trained / "run.json")["starts"][0]["base"]["path"] == str(tiny_base)
    with pytest.raises(AssertionError, match=r"asked the network .*huggingface\.co"):
        with as_in_production(), contextlib.suppress(OSError):
            socket.create_connection(("huggingface.co", 443))


def test_f50_no_file_of_a_run_holds_a_secret(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert {"run.json", "metrics.jsonl", "config.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path
    command = read_json(trained / "run.json")["starts"][0]["command"]
    assert command == ["train", "--note=[hidden]", "--tracker=https://[hidden]@host"]


def test_the_run_folder_says_what_was_run(config, trained, tiny_base):
    assert read_json(trained / "config.json") == to_dict(config)
    (start, *_) = read_json(trained / "run.json")["starts"]
    assert start["base"]["sha256"] == sha256_of([tiny_base / "model.safetensors"])
    assert (start["base"]["source"], start["base"]["path"]) == ("local", str(tiny_base))
    found = start["data"]["esci"]
    assert (found["train"], found["validation"]) == (24, 6)
    assert found["train_too_long"]["dropped"] == 0
    assert found["train_rows"]["kept"] == 24
    assert any((trained / "tensorboard").iterdir())


def test_every_step_is_told_once_and_every_epoch_evaluated(trained):
    lines = read_jsonl(trained / "metrics.jsonl")
    steps = [line["step"] for line in lines if "train/loss" in line]
    evaluated = [line for line in lines if "validation/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluated] == [6, 12]
    assert evaluated[1]["validation/loss"] < evaluated[0]["validation/loss"]
    assert {"validation/esci/macro_f1", "validation/esci/invalid_rate"} <= set(evaluated[0])
    assert Checkpoints(trained / "checkpoints").steps() == [10, 12]


def test_the_adapter_is_the_best_one_and_reads_back(trained, tiny_base):
    base = load_pretrained("x", str(tiny_base))
    adapter = trees.flatten(read_adapter(trained / "adapter", base.config, base.identity))
    names = collections.Counter(path.rpartition("/kernel")[0] for path in adapter)
    assert len(names) == 7 and "layers/mlp/gate" in names
    for path, leaf in adapter.items():
        assert leaf.a.shape[-1] == 2 and np.abs(np.asarray(leaf.b)).max() > 0, path
    lines = read_jsonl(trained / "metrics.jsonl")
    losses = {x["step"]: x["validation/loss"] for x in lines if "validation/loss" in x}
    assert Checkpoints(trained / "checkpoints").best() == min(losses, key=lambda s: losses[s])


def test_no_example_is_longer_than_the_model_knows_positions(make_config, tmp_path, monkeypatch):
    """Tables of positions would give the last one for all that follow, in silence."""
    short = load_base(make_config("finetune").model)
    short = dataclasses.replace(short, config=dataclasses.replace(short.config, max_positions=64))
    monkeypatch.setattr(finetune, "load_base", lambda *_, **__: short)
    with pytest.raises(UserError, match="no example fits the window of 64 tokens"):
        finetune.run(make_config("finetune"), str(tmp_path))


def test_f11_a_finished_run_stays_as_it_is(config, train, trained, contents, monkeypatch):
    before, starts = contents(trained), len(read_json(trained / "run.json")["starts"])

    def refuse(*_, **__):
        raise AssertionError("a checkpoint was written")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", refuse)
        patch.setattr(Checkpoints, "save_best", refuse)
        train(config, trained)
    assert contents(trained) == before
    assert len(read_json(trained / "run.json")["starts"]) == starts + 1


VARIANTS = {
    "rslora and LoRA+": {"adapter.rslora": True, "optimizer.loraplus_ratio": 4.0},
    "pissa": {"adapter.pissa": True},
    "dora": {"adapter.dora": True},
    "embedding and ranks by layer": {
        "adapter.targets": ("layers/.*/kernel", "embed/embedding"),
        "adapter.rules": ({"pattern": ".*/q/kernel", "rank": 4, "alpha": 2.0, "layers": (1,)},),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_adapters_are_trained_and_scored(make_config, train, tmp_path, variant):
    """What is written is of the base as it was loaded: it scores what the best evaluation did."""
    changes = VARIANTS[variant] | {"training.select": "loss", "data.test_size": 6}
    changes |= {"evaluation.split": "validation", "training.validation_examples": 0}
    config = make_config("finetune", changes=changes)
    train(config, tmp_path / "run")
    evaluate.run(config, str(tmp_path / "run"))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    best = Checkpoints(tmp_path / "run" / "checkpoints").best()
    (told,) = (x for x in lines if x["step"] == best and "validation/loss" in x)
    scores = read_json(tmp_path / "run" / "eval" / "esci" / "validation.metrics.json")
    assert scores["metrics"]["macro_f1"]["value"] == pytest.approx(told["validation/esci/macro_f1"])


def test_runs_trained_together_end_like_each_alone(
    make_config, config, train, trained, as_in_production, tmp_path
):
    """Of other seeds, learning rates, rows and epochs; one goes on from where it was killed."""
    changes = [
        {},
        {"training.seed": 1, "optimizer.learning_rate": 2e-3},
        {"data.train_size": 17, "training.epochs": 1},
    ]
    common = {"training.select": "loss", "adapter.dropout": 0.0}
    configs = [make_config("finetune", changes=common | change) for change in changes]
    folders = [tmp_path / str(i) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "make_train_step", dying_after(3))
        with pytest.raises(Killed):
            train(configs[0], folders[0])
    with as_in_production():
        assert finetune.run_together(configs, [str(x) for x in folders]) == [None] * 3
    alone = [trained, tmp_path / "alone1", tmp_path / "alone2"]
    for i in (1, 2):
        train(configs[i], alone[i])
    for one, other in zip(folders, alone, strict=True):
        lines, expected = (read_jsonl(folder / "metrics.jsonl") for folder in (one, other))
        assert [line.keys() for line in lines] == [line.keys() for line in expected]
        for line, told in zip(lines, expected, strict=True):
            for name in told:
                assert line[name] == pytest.approx(told[name], rel=1e-4, abs=1e-6), name
        assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
        bests = [Checkpoints(folder / "checkpoints").best() for folder in (one, other)]
        assert bests[0] == bests[1]
        files = [folder / "adapter" / "adapter_model.safetensors" for folder in (one, other)]
        found, exact = (SafetensorsFile(file) for file in files)
        for name in exact:
            assert np.linalg.norm(found[name] - exact[name]) <= 1e-5 * np.linalg.norm(exact[name])


def test_what_goes_wrong_with_one_of_several_ends_it_alone(
    make_config, trained, as_in_production, tmp_path, monkeypatch
):
    """One finds its folder taken, one has no best checkpoint; the third ends as if alone."""
    common = {"training.select": "loss"}
    config = make_config("finetune", changes=common)
    faulty = make_config("finetune", changes=common | {"training.seed": 1})
    other = make_config("finetune", changes=common | {"adapter.rank": 4})
    with Workdir(tmp_path / "taken").writing(other):
        (tmp_path / "taken" / "work").write_text("of another run")
    restore = Checkpoints.restore_best

    def none(checkpoints, abstract):
        if checkpoints.folder.parent.name == "faulty":
            raise UserError("no best checkpoint", "faulty", "train first")
        return restore(checkpoints, abstract)

    monkeypatch.setattr(Checkpoints, "restore_best", none)
    folders = [str(tmp_path / name) for name in ("taken", "faulty", "good")]
    with as_in_production():
        ended = finetune.run_together([config, faulty, config], folders)
    assert "holds a run of another config" in str(ended[0])
    assert "no best checkpoint" in str(ended[1]) and ended[2] is None
    assert not (tmp_path / "faulty" / "adapter").exists()
    for folder in folders:
        assert (Workdir(folder).lock).read_bytes() == b""
    files = [
        folder / "adapter" / "adapter_model.safetensors" for folder in (trained, tmp_path / "good")
    ]
    exact, found = (SafetensorsFile(file) for file in files)
    for name in exact:
        assert np.linalg.norm(found[name] - exact[name]) <= 1e-5 * np.linalg.norm(exact[name])


def test_f10_a_change_in_vain_is_taken_back(
    make_config, config, train, as_in_production, tmp_path, monkeypatch
):
    """A run that gives up while it trains leaves the config that it began with."""
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_train_step", dying_after(3))
        with pytest.raises(Killed):
            train(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def give_up(*_):
        raise UserError("a batch without a token to learn", "here", "leave it out")

    monkeypatch.setattr(Guard, "check", give_up)
    changes = {"training.select": "loss", "optimizer.learning_rate": 1e-2}
    other = make_config("finetune", changes=changes)
    with as_in_production(), pytest.raises(UserError, match="a batch without a token"):
        finetune.run(other, str(tmp_path), ("optimizer.learning_rate",))
    assert (tmp_path / "config.json").read_bytes() == before


def test_which_runs_are_trained_together(make_config):
    one = make_config("finetune")
    for changes in ({"training.seed": 1}, {"optimizer.weight_decay": 0.1}, {"data.train_size": 9}):
        assert finetune.joinable(one, make_config("finetune", changes=changes))
    others = (
        *({"adapter.rank": 4}, {"training.row_length": 256}, {"task.max_new_tokens": 9}),
        *({"model.remat": "full"}, {"training.batch_size": 8}, {"data.validation_size": 4}),
    )
    for changes in others:
        assert not finetune.joinable(one, make_config("finetune", changes=changes))
    for changes in ({"training.tune": "all"}, {"adapter.pissa": True}):
        config = make_config("finetune", changes=changes)
        assert not finetune.joinable(config, config)


class Killed(BaseException):
    """No handler of ours may catch it."""


def dying_after(calls):
    """`make_train_step`, of a step that raises `Killed` after some calls."""
    make_train_step = finetune.make_train_step

    def make(*arguments):
        step, left = make_train_step(*arguments), calls

        def dying(*arguments):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return step(*arguments)

        return dying

    return make


@pytest.mark.parametrize("calls", [2, 6, 10])
def test_an_interrupted_run_ends_like_one_that_was_not(
    config, train, trained, contents, tmp_path, monkeypatch, calls
):
    """Dies before the first checkpoint, after an evaluation, and in the second epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_train_step", dying_after(calls))
        with pytest.raises(Killed):
            train(config, tmp_path)
    assert not (tmp_path / "adapter").exists()
    train(config, tmp_path)
    found, expected = contents(tmp_path), contents(trained)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "config.json"):
        assert found[name] == expected[name], name


def test_only_what_training_does_not_depend_on_may_change(make_config, train, trained):
    shared = {"training.select": "loss"}
    train(make_config("finetune", changes=shared | {"evaluation.split": "validation"}), trained)
    with pytest.raises(UserError, match=r"config\.evaluation\.temperature 0\.0 -> 1\.0"):
        train(make_config("finetune", changes=shared | {"evaluation.temperature": 1.0}), trained)


def test_f10_another_config_is_refused_and_nothing_changes(make_config, train, trained, contents):
    before = contents(trained)
    changes = {"training.select": "loss", "adapter.rank": 3, "data.train_size": 20}
    with pytest.raises(UserError) as caught:
        train(make_config("finetune", changes=changes), trained)
    assert "config.adapter.rank 2 -> 3" in str(caught.value)
    assert "config.data.train_size 24 -> 20" in str(caught.value)
    assert contents(trained) == before


def test_f10_a_change_that_the_state_does_not_survive_is_refused_even_if_it_is_asked_for(
    make_config, as_in_production, trained, contents
):
    before = contents(trained)
    config = make_config("finetune", changes={"training.select": "loss", "adapter.rank": 3})
    with pytest.raises(UserError, match="checkpoint of another state"), as_in_production():
        finetune.run(config, str(trained), ["adapter.rank"])
    assert contents(trained) == before


def test_f10_another_base_or_tokenizer_is_refused(config, train, trained, contents, monkeypatch):
    before, load = contents(trained), finetune.load_base

    class Other(Tokenizer):
        fingerprint = "0" * 64

    def changed(*arguments, **options):
        base = load(*arguments, **options)
        identity = dataclasses.replace(base.identity, sha256="f" * 64)
        tokenizer = copy.copy(base.tokenizer)
        tokenizer.__class__ = Other
        return dataclasses.replace(base, identity=identity, tokenizer=tokenizer)

    monkeypatch.setattr(finetune, "load_base", changed)
    with pytest.raises(UserError, match=r"base \w{64} -> f{64}, tokenizer \w{64} -> 0{64};"):
        train(config, trained)
    assert contents(trained) == before


def test_f33_a_run_without_a_finite_loss_stops_and_names_the_examples(
    make_config, train, tmp_path, monkeypatch
):
    """At the third of its steps; the file names the examples of all three, and they are 4 each."""
    changes = {"training.most_skipped": 3, "training.checkpoint_every": 50}
    config = make_config("finetune", changes=changes)

    def broken(*arguments, **options):
        loss = loss_of(*arguments, **options)

        def of_batch(*arguments):
            total, weight, aux = loss(*arguments)
            return total * np.float32("nan"), weight, aux

        return of_batch

    monkeypatch.setattr(finetune, "loss_of", broken)
    with pytest.raises(UserError, match=r"steps 1 to 3.*skipped\.json"):
        train(config, tmp_path)
    named = read_json(tmp_path / "skipped.json")
    assert list(named) == ["1", "2", "3"]
    ids = [i for step in named.values() for i in step]
    known = {x.id for x in Esci().load(SyntheticSource(0, Sizes(train=24)), "train")}
    assert len(set(ids)) == len(ids) == 12 and set(ids) <= known
    assert [x["train/skipped"] for x in read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]


MESHES = ({"data": 2, "fsdp": 4}, {"data": 2}, {}, {"fsdp": 4})
"""Of 8 devices, 2, 1 and 4."""


@pytest.mark.slow
def test_f09_a_run_goes_on_on_other_devices(make_config, train, tmp_path, monkeypatch):
    """24 steps, a quarter of them on each mesh: the examples of one device, and its losses."""
    plans, shared = [], {"training.epochs": 4, "training.evaluate_every": 100}

    def config(mesh):
        sizes = {"data": 1, "fsdp": 1} | mesh
        return make_config(
            "finetune", changes=shared | {f"mesh.{axis}": size for axis, size in sizes.items()}
        )

    def iterate(plan, *arguments, **options):
        steps = ([e for row in plan.step(n) for e in row] for n in range(len(plan)))
        plans.append([sorted(step) for step in steps])
        return pipeline.iterate(plan, *arguments, **options)

    monkeypatch.setattr(finetune, "iterate", iterate)
    train(config({}), tmp_path / "one")
    for mesh in MESHES[:-1]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(finetune, "make_train_step", dying_after(6))
            train(config(mesh), tmp_path / "many")
    train(config(MESHES[-1]), tmp_path / "many")
    assert len(plans) == 5 and all(plan == plans[0] for plan in plans)
    one, many = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "many"))
    assert [x["step"] for x in many] == [x["step"] for x in one] and len(one) == 25
    for ours, theirs in zip(many, one, strict=True):
        for key in ours.keys() & {"train/loss", "validation/loss", "train/target_tokens"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)


def test_packing_does_not_change_what_is_learnt(make_config, train, trained, tmp_path):
    changes = {"training.select": "loss", "training.packing": "pad"}
    train(make_config("finetune", changes=changes), tmp_path)
    ours, theirs = (read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path, trained))
    for one, other in zip(ours, theirs, strict=True):
        assert one["step"] == other["step"]
        for key in one.keys() & {"train/loss", "validation/loss", "train/target_tokens"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


def test_examples_longer_than_the_window_are_dropped_and_counted(
    make_config, train, tmp_path, capsys
):
    changes = {"training.row_length": 247, "training.epochs": 1}
    train(make_config("finetune", changes=changes), tmp_path)
    data = read_json(tmp_path / "run.json")["starts"][0]["data"]["esci"]
    dropped = data["train_too_long"]["dropped"]
    unseen = data["validation_too_long"]["dropped"]
    assert 0 < dropped < 24 and data["train"] == 24 - dropped
    assert 0 < unseen < 6 and data["validation"] == 6
    told = capsys.readouterr().err
    assert f"{24 - dropped} examples, {dropped} too long and dropped" in told
    assert f"validation loss: {6 - unseen} examples, {unseen} too long and dropped" in told
    steps = [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert max(steps) == -(-data["train"] // 4)


def test_a_mixture_is_told_task_by_task(make_config, train, tmp_path):
    """Realised counts and losses of each task add up; each is evaluated with its own metric."""
    changes = {"training.epochs": 1, "training.row_length": 1024, "mixture.policy": "weights"}
    config = make_config("finetune", "esci+queryner", changes)
    mixture = dataclasses.replace(config.mixture, weights={"esci": 3.0, "queryner": 1.0})
    train(dataclasses.replace(config, mixture=mixture), tmp_path)
    lines = [x for x in read_jsonl(tmp_path / "metrics.jsonl") if "train/loss" in x]
    drawn = {task: sum(line[f"train/examples/{task}"] for line in lines) for task in config.tasks}
    assert drawn == {"esci": 36, "queryner": 12}
    for line in lines:
        assert (line["train/loss/esci"] is None) == (line["train/examples/esci"] == 0)
        told = [x for task in config.tasks if (x := line[f"train/loss/{task}"]) is not None]
        assert min(told) <= line["train/loss"] <= max(told)
    (last,) = [x for x in read_jsonl(tmp_path / "metrics.jsonl") if "validation/loss" in x]
    headlines = [last["validation/esci/macro_f1"], last["validation/queryner/entity_f1"]]
    assert last["validation/headline"] == pytest.approx(np.mean(headlines))
    assert set(read_json(tmp_path / "run.json")["starts"][0]["data"]) == set(config.tasks)


@pytest.fixture
def shop_files(tmp_path):
    """Function (lines of all splits) -> changes of a config that reads them."""

    def write(lines):
        folder = tmp_path / "data" / "esci"
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return {
            "data.source": "local",
            "data.path": str(tmp_path / "data"),
            "training.epochs": 1,
        }

    return write


def shop_rows():
    return [dict(row.values) for row in SyntheticSource(0, Sizes(6, 6, 6)).rows("esci", "train")]


def test_inputs_of_validation_that_are_in_train_are_told(
    make_config, train, tmp_path, shop_files, capsys
):
    """The same file as both splits: a warning with counts, or an error where one is asked for."""
    changes = shop_files(map(json.dumps, shop_rows()))
    train(make_config("finetune", changes=changes), tmp_path / "run")
    assert "6 of 6 inputs of validation are also in train" in capsys.readouterr().err
    strict = make_config("finetune", changes=changes | {"data.on_overlap": "raise"})
    with pytest.raises(UserError, match="6 of 6 inputs of validation are also in train: esci"):
        train(strict, tmp_path / "strict")


def test_bad_rows_are_refused_or_dropped_and_counted(
    make_config, train, tmp_path, shop_files, capsys
):
    rows = shop_rows()
    rows[1]["esci_label"] = "X"
    del rows[2]["query"]
    changes = shop_files([*map(json.dumps, rows), "{not JSON", json.dumps(rows[1])])
    with pytest.raises(UserError, match=r'"X".*esci_label.*:2;'):
        train(make_config("finetune", changes=changes), tmp_path / "run")
    config = make_config("finetune", changes=changes | {"data.on_bad_row": "drop"})
    train(config, tmp_path / "run")
    found = read_json(tmp_path / "run" / "run.json")["starts"][0]["data"]["esci"]
    assert (found["train"], found["validation"]) == (4, 4)
    assert sum(found["train_rows"]["bad"].values()) == 4
    assert "train.jsonl:2" in found["train_rows"]["first_bad"]
    assert "4 rows bad" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_what_becomes_of_long_examples_is_counted(make_config, train, tmp_path, shop_files, policy):
    rows = shop_rows()
    rows[0]["product_title"] = "word " * 400
    changes = shop_files(map(json.dumps, rows)) | {"training.too_long": policy}
    with pytest.raises(UserError, match=r"leaves no room .* 1024: esci, example 0;"):
        train(make_config("finetune", changes=changes), tmp_path / "run")
    changes["evaluation.too_long"] = "truncate"
    train(make_config("finetune", changes=changes), tmp_path / "run")
    found = read_json(tmp_path / "run" / "run.json")["starts"][0]["data"]["esci"]
    kept = policy == "truncate"
    assert found["train"] == 5 + kept
    counts = found["train_too_long"]
    assert (counts["truncated"], counts["dropped"]) == (int(kept), int(not kept))
    assert counts["tokens_lost"] > 300


def test_changed_data_are_read_again(make_config, train, tmp_path, shop_files):
    """What is cached is found by content: a mended label is trained on."""
    rows, losses = shop_rows(), []
    for number, label in enumerate(("Exact", "Irrelevant")):
        rows[0]["esci_label"] = label
        changes = shop_files(map(json.dumps, rows))
        train(make_config("finetune", changes=changes), tmp_path / str(number))
        told = read_jsonl(tmp_path / str(number) / "metrics.jsonl")
        losses.append([line["train/loss"] for line in told if "train/loss" in line])
    assert losses[0] != losses[1]


def test_f10_a_run_does_not_go_on_with_other_data(
    make_config, train, tmp_path, shop_files, contents
):
    rows = shop_rows()
    config = make_config("finetune", changes=shop_files(map(json.dumps, rows)))
    train(config, tmp_path / "run")
    before = contents(tmp_path / "run")
    shop_files(map(json.dumps, rows[1:]))
    with pytest.raises(
        UserError, match=r"training data have changed .*esci train \w{64} -> \w{64}"
    ):
        train(config, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_bad_mixture_is_told_before_a_model_is_loaded(make_config, tmp_path):
    changes = {"mixture.policy": "temperature", "mixture.temperature": 0.0, "model.path": "nowhere"}
    with pytest.raises(UserError, match=r"config\.mixture\.temperature"):
        finetune.run(make_config("finetune", "esci+queryner", changes), str(tmp_path / "run"))


def test_a_quantized_base_is_trained_resumed_and_evaluated(
    make_config, train, trained, as_in_production, contents, tmp_path, monkeypatch, capsys
):
    """Of the same identity as the weights it was made of; its adapter reads back from PEFT."""
    shared = {"training.epochs": 1, "model.quantization": "nf4"}
    config = make_config("finetune", changes=shared)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_train_step", dying_after(3))
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
    assert "nf4: linear layers take 0." in capsys.readouterr().err
    for name in ("killed", "whole"):
        train(config, tmp_path / name)
    found, expected = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "config.json"):
        assert found[name] == expected[name], name
    steps, dense = (
        [line for line in read_jsonl(folder / "metrics.jsonl") if "train/loss" in line]
        for folder in (tmp_path / "whole", trained)
    )
    assert steps[0]["train/loss"] != dense[0]["train/loss"]
    assert steps[0]["train/loss"] == pytest.approx(dense[0]["train/loss"], rel=0.1)
    bases = [read_json(x / "run.json")["starts"][0]["base"] for x in (tmp_path / "whole", trained)]
    assert bases[0] == bases[1]
    with as_in_production():
        evaluate.run(config, str(tmp_path / "whole"))
    assert read_json(tmp_path / "whole" / "eval" / "esci" / "test.metrics.json")["n"] == 12
    other = make_config("finetune", changes=shared | {"model.quantization": "none"})
    with pytest.raises(UserError, match=r'config\.model\.quantization "nf4" -> "none"'):
        evaluate.run(other, str(tmp_path / "whole"))
