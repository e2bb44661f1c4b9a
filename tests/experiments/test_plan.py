"""Plans: what is told of a program that fits or does not, and of mistakes."""

import dataclasses
import importlib.util
import json
import math

import jax
import pytest

from configs import finetune, plans
from ecomjax.errors import UserError
from ecomjax.experiments import plan
from ecomjax.experiments.chips import GIB, chip_of
from ecomjax.experiments.config import from_config
from ecomjax.experiments.costs import Costs
from ecomjax.experiments.plan import Plan, Wish
from ecomjax.hf import families
from ecomjax.models.llama import LlamaConfig

V5E = chip_of("TPU v5 lite")
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no libtpu, the compiler for TPUs; bash launch/setup.sh tpu installs it",
)


def config(**mesh):
    found = finetune.get_config("queryner")
    found.mesh.update(mesh)
    return from_config(found)


def made(name="tiny", devices=8, gib=2.0, seconds=0.5):
    """A plan of a program with these needs."""
    costs = Costs(1e13, 2e11, {"all-gather": 3 * GIB, "all-reduce": 10.0}, seconds, 0.4)
    return Plan(
        wish=Wish(name, config(), f"v5e:2x{devices // 2}"),
        slice=f"v5e-{devices}",
        devices=devices,
        mesh="fsdp 8",
        step="training step, 8 x 64 tokens",
        bytes_per_device=int(gib * GIB),
        memory_per_device=V5E.memory,
        costs=costs,
        chip=V5E,
        useful_flops=devices * 197e12 / 8,
        fallbacks=(),
        compile_seconds=1.0,
    )


def test_json_has_the_promised_keys():
    told = json.loads(json.dumps(made().to_dict()))
    promised = ("name", "topology", "fits", "bytes_per_device", "memory_per_device", "flops")
    assert {*promised, "estimated_seconds", "estimated_mfu"} <= set(told)
    assert told["fits"] is True and told["flops"] == 8e13
    assert told["estimated_seconds"] == 0.5
    assert told["estimated_mfu"] == pytest.approx(1 / 8 / 0.5)
    assert told["interconnect_seconds"] == 0.4


def test_what_does_not_fit_is_marked():
    for found in (made(gib=16.0), dataclasses.replace(made(gib=20.0), costs=None)):
        assert not found.fits
        json.dumps(found.to_dict())
        assert "of 15.8: **does not fit**" in plan.table([found])


def test_the_table_tells_the_smallest_slice_that_fits():
    rows = [made(devices=16), made(devices=8), made(devices=4, gib=16.0), made("other")]
    lines = plan.table(rows).splitlines()
    assert [line.count("|") for line in lines[:6]] == [11] * 6
    assert "| `tiny` | v5e-16 (16 chips) | fsdp 8 |" in lines[2]
    assert "all-gather 3.0 |" in lines[2] and "| 25 % |" in lines[2]
    assert lines[6:] == ["", "`tiny`: v5e-8 is the smallest of these slices that fits."]


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (256.00G) exceeds available HBM (15.75G).",
            256 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.",
            17.25 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: of something else", None),
        ("INTERNAL: a defect. Used 17.25G of 15.75G hbm.", None),
    ],
)
def test_the_compiler_says_what_a_program_needs_that_does_not_fit(message, needed):
    assert plan._needed(message) == needed


def test_mistakes_are_told_before_anything_is_compiled(monkeypatch):
    with pytest.raises(UserError, match="no CUDA device here"):
        plan.devices_of("cuda")
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install .* -r launch/locks/tpu.txt"):
            plan.devices_of("v5e:2x4")
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(plan, "chip_of", lambda kind: V5E)
    wishes = [Wish("a", config(), "here"), Wish("b", config(data=1, fsdp=8), "here")]
    with pytest.raises(UserError, match=r"fsdp 8, .* does not fit 4 devices"):
        next(plan.run(wishes))


@libtpu
@pytest.mark.parametrize("topology", ["v5e:9x9", "v99:2x2", "here"])
def test_an_unknown_topology(topology):
    with pytest.raises(UserError, match=f"no TPU topology '{topology}'"):
        plan.devices_of(topology)


@libtpu
@pytest.mark.slow
def test_a_plan_of_a_small_model_for_a_tpu(tmp_path, loose_promotion):
    shape = LlamaConfig(
        vocab_size=512, width=256, layers=2, heads=4, kv_heads=4, head_dim=64, ffn=512
    )
    (tmp_path / "config.json").write_text(json.dumps(families.config_to_hf(shape)))
    given = finetune.get_config("queryner")
    given.model.update(path=str(tmp_path), param_dtype="bfloat16", compute_dtype="bfloat16")
    given.training.row_length = 256
    given.mesh.update(data=1, fsdp=2, tensor=2)
    (found,) = plan.run([Wish("small", from_config(given), "v5e:2x2")])
    assert found.fits and found.slice == "v5e-4" and found.mesh == "fsdp 2, tensor 2"
    assert found.memory_per_device == V5E.memory
    assert not found.costs.unbounded
    c, tokens, rank = shape, 2 * 256, 16
    kernels = [(c.width, c.width)] * 4 + [(c.width, c.ffn)] * 2 + [(c.ffn, c.width)]
    products = c.layers * sum(i * o for i, o in kernels)
    adapter = c.layers * rank * sum(i + o for i, o in kernels)
    attended = 256 * c.width * c.layers
    # Attention computes two products forward and seven backward, and logits are made once.
    spent = tokens * (4 * products + 4 * c.width * c.vocab_size + 6 * adapter + 18 * attended)
    assert found.costs.flops * 4 == pytest.approx(spent, rel=0.05)
    assert 0 < found.mfu < 1 and found.costs.sent
    json.dumps(found.to_dict())


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_plan_is_a_config_of_its_model_whose_mesh_divides_its_slices(name):
    planned, found = plans.PLANS[name], from_config(plans.get_config(name))
    assert found.model.name == planned.model
    assert found.experiment == ("finetune" if "lora" in name else "icl")
    fixed = math.prod(size for size in dataclasses.asdict(found.mesh).values() if size != -1)
    for topology in planned.topologies:
        chips = math.prod(map(int, topology.split(":")[1].split("x")))
        assert chips % fixed == 0
