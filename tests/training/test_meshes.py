"""Ten steps on meshes of eight devices are ten steps on one, whatever is trained."""

import re

import jax
import numpy as np
import optax
import pytest

from ecomjax import placement, sharding, trees
from ecomjax.adapters import lora
from ecomjax.adapters.quantize import quantize
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.encoded import Encoded
from ecomjax.data.packing import make_plan
from ecomjax.data.pipeline import iterate
from ecomjax.experiments.initial import init_adapter, init_state
from ecomjax.models import registry
from ecomjax.models.llama import LlamaConfig
from ecomjax.training.losses import adapted, causal_lm, whole
from ecomjax.training.step import make_train_step
from ecomjax.typing import FrozenKernel

pytestmark = pytest.mark.slow

SHAPE = {"vocab_size": 80, "width": 32, "layers": 2, "head_dim": 8, "ffn": 96}
MODELS = {
    "divides": LlamaConfig(**SHAPE, heads=8, kv_heads=4),
    # As SmolLM2-135M: no mesh axis but of size 1 or 3 divides these heads.
    "does_not": LlamaConfig(**SHAPE, heads=9, kv_heads=3, tied_embeddings=True),
    "experts": LlamaConfig(**SHAPE, heads=8, kv_heads=4, experts=4, experts_per_token=2),
}
METHODS = ("lora", "full", "qlora")
MESHES = [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
STEPS, BATCH = 10, 8
CASES = [
    *(("divides", mesh, method) for mesh in MESHES[:3] for method in METHODS),
    # What cannot be split differs by model and mesh alone; what is trained shows above.
    *(("does_not", mesh, "lora") for mesh in MESHES[:3]),
    *(("experts", MESHES[3], method) for method in ("lora", "full")),
]


@pytest.fixture(scope="module")
def examples():
    """Sequences of many lengths; half of each is a prompt, the rest is soon learnt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 16, STEPS * BATCH).tolist()
    return [
        Encoded(f"e{i}", (*rng.integers(1, 64, n // 2).tolist(), *[7] * (n - n // 2)), n // 2)
        for i, n in enumerate(lengths)
    ]


def make_params(config):
    shapes, axes = registry.describe(registry.build(config))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    return params, axes


class Run:
    """Ten steps of AdamW on a mesh."""

    def __init__(self, config, method, sizes, examples):
        self.mesh = mesh = sharding.make_mesh(*sizes)
        params, self.axes = make_params(config)
        if method == "qlora":
            params = quantize(params, self.axes, "nf4")
        specs, self.fallbacks = sharding.specs(self.axes, params, mesh)
        params = placement.shard_params(params, sharding.shardings(specs, mesh))
        optimizer, key = optax.adamw(1e-2), jax.random.key(0)
        if method == "full":
            trained, self.frozen, variables_of = params, {}, whole
        else:
            rules = [LoraRule(rank=4, alpha=8.0)]
            params, adapter = init_adapter(params, self.axes, rules, key, mesh)
            trained, fixed = lora.split(adapter)
            self.frozen, variables_of = {"params": params, "fixed": fixed}, adapted
        with sharding.use(mesh), jax.numpy_dtype_promotion("standard"):
            with jax.numpy_rank_promotion("allow"):
                self.state, lies = init_state(trained, optimizer, key, mesh)
                self._train(config, variables_of, optimizer, lies, examples)

    def _train(self, config, variables_of, optimizer, lies, examples):
        mesh = self.mesh
        loss = causal_lm(registry.build(config), variables_of=variables_of)
        step = make_train_step(loss, optimizer, lambda step: 1e-2, shardings=lies)
        rows = sharding.row_parts(mesh)
        plan = make_plan(
            np.array([len(e.tokens) for e in examples]),
            [np.arange(len(examples))],
            prefixes=[0],
            packing="plain",
            row_length=24,
            batch_size=BATCH,
            rows_multiple=rows,
        )
        share, ids = placement.row_share(mesh), [e.id for e in examples]
        self.ids = [sorted(ids[i] for row in plan.step(n) for i in row) for n in range(len(plan))]
        self.losses, compiled = [], None
        batches = iterate(
            plan,
            examples,
            rows,
            *share,
            place=lambda batch: placement.shard_rows(batch, mesh, axis=1, share=True),
        )
        for batch in batches:
            if compiled is None:
                compiled = step.lower(self.state, self.frozen, batch).compile()
                self.text = compiled.as_text()
            self.state, metrics = compiled(self.state, self.frozen, batch)
            self.losses.append(float(metrics["loss"]))


@pytest.fixture(scope="module")
def alone(examples):
    """Function (model, method) -> its run on one device."""
    made = {}

    def get(model, method):
        if (model, method) not in made:
            made[model, method] = Run(MODELS[model], method, (1, 1, 1, 1), examples)
        return made[model, method]

    return get


@pytest.mark.parametrize(
    ("model", "sizes", "method"), CASES, ids=lambda x: str(x).replace(", ", "x")
)
def test_ten_steps_are_those_of_one_device(model, sizes, method, examples, alone):
    one, many = alone(model, method), Run(MODELS[model], method, sizes, examples)
    assert many.ids == one.ids and len(one.ids) == STEPS
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    assert one.losses[-1] < one.losses[0]
    check_where_things_lie(many)
    check_gathers(many)


def check_where_things_lie(run):
    """What can be split is, base, adapter and optimizer state alike; what cannot is told."""
    told = {fallback.path for fallback in run.fallbacks}
    held = ideal = 0
    for path, leaf in trees.flatten(run.frozen.get("params", run.state.trained)).items():
        names = trees.flatten(run.axes)[path].names
        for array in jax.tree.leaves(leaf):
            rules = [sharding.RULES[name] for name in names]
            axes = [rule for rule, size in zip(rules, array.shape, strict=True) if size > 1]
            ways = np.prod([run.mesh.shape[rule] for rule in axes if rule], dtype=int)
            if path not in told:
                held += array.addressable_shards[0].data.nbytes
                ideal += array.nbytes / ways
    assert held <= 1.1 * ideal
    lies = {str(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(run.state)}
    moments = [path for path in lies if ".mu" in path or ".nu" in path]
    trained = [path for path in lies if ".trained" in path]
    assert len(moments) == 2 * len(trained)
    for path in moments:
        of = next(own for own in trained if path.endswith(own.split(".trained")[1].strip("(,")))
        assert lies[path].spec == lies[of].spec, (path, of)


def check_gathers(run):
    """No all-gather makes a whole stack of layers, of the base or of an adapter."""
    stacks = {
        leaf.shape
        for tree in (run.frozen, run.state.trained)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if "layers" in str(path) and leaf.ndim > 2
    }
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", run.text)
    gathered = {(kind, tuple(map(int, dims.split(",")))) for kind, dims in found}
    shapes = {shape for _, shape in gathered}
    if run.mesh.shape["fsdp"] > 1:
        assert shapes, "the layers are gathered one by one"
        kernels = trees.flatten(run.frozen.get("params", {}))
        quantized = [k for path, k in kernels.items() if isinstance(k, FrozenKernel)]
        sizes = {np.prod(k.shape[1:]) // run.mesh.shape["tensor"] for k in quantized}
        floats = {shape for kind, shape in gathered if kind in ("f32", "bf16")}
        if quantized:
            assert "u8" in {kind for kind, _ in gathered}
            assert not sizes & {np.prod(shape) for shape in floats}
    layers = SHAPE["layers"]
    for shape in shapes:
        assert shape not in stacks
        assert not (shape[0] == layers and any(np.prod(shape) == np.prod(s) for s in stacks))
