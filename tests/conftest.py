"""What every test runs under: eight fake CPU devices and strict numerics.

The environment is set before jax is imported, and is inherited by the commands that tests
start; the strict settings hold in the test process alone. Functions of ecomjax are checked
against their annotations, shapes included, at each call.
"""

import dataclasses
import functools
import gc
import os
import signal
import zlib
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    # Compiling takes longer than running, in the commands that tests start too.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # Threads of torch wait for each other busily, which the other test process pays for.
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import flax.linen
import flax.struct
import hypothesis
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

import tests.checker  # noqa: F401, named by the import hook

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests hardly compile a program twice, and XLA has died while it wrote one out to be kept. Commands
# that tests start keep theirs where they are told to.
jax.config.update("jax_enable_compilation_cache", False)

# jax rebuilds structs around specs, shardings and None, so their fields are not checked.
flax.struct.PyTreeNode.__no_type_check__ = True
flax.linen.Module.__no_type_check__ = True
install_import_hook("ecomjax", "tests.checker.checked")

hypothesis.settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("reproducible")


# Commands that tests start are interrupted as in a terminal, even where the tests themselves run
# in the background, whose children would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONG = (
    *("test_hosts", "test_meshes", "test_kill", "test_packing", "test_smollm2"),
    *("test_notebooks", "test_study", "test_encoders"),
)
"""Modules that take many minutes each."""

REAL = ("test_smollm2", "test_minilm")
"""Modules that run real models, whose programs are worth optimizing."""


def pytest_collection_modifyitems(items):
    """Long modules come first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Converted and tokenized data go to a folder of this run, in commands that it starts too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data samples beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data samples in ../shared/data")
    return folder


@pytest.fixture
def loose_promotion():
    """Promotion as in production, for code that steps optax, which mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass(frozen=True)
class TinyLlama:
    """A Llama small enough to hold every law against; its weights are numpy arrays."""

    config: Any
    model: Any
    params: dict[str, Any]
    axes: dict[str, Any]

    def logits(self, tokens, positions=None, segments=None, params=None, lora=None, index=None):
        """Logits [B, T, V] of a full forward; by default every row is one sequence."""
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        if segments is None:
            segments = np.ones(tokens.shape, np.int32)
        variables = {"params": self.params if params is None else params}
        variables |= {} if lora is None else {"lora": lora}
        return np.asarray(_logits(self.model, variables, tokens, positions, segments, index))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, tokens, positions, segments, index):
    hidden, _ = model.apply(variables, tokens, positions, segments, adapter_index=index)
    return model.apply(variables, hidden, adapter_index=index, method="logits")


@pytest.fixture(scope="session")
def make_llama():
    """Function (changes of the config) -> TinyLlama, every number off its default.

    Its head is free, its scale vectors are not one, its heads are not as wide as the model.
    """
    from ecomjax import trees
    from ecomjax.models import registry
    from ecomjax.models.llama import LlamaConfig

    base = LlamaConfig(
        vocab_size=61,
        width=24,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=8,
        ffn=40,
        rope_theta=500.0,
        norm_eps=1e-3,
        max_positions=77,
    )

    def draw(path, shape):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        values = 0.2 * rng.standard_normal(shape.shape, np.float32)
        return values + np.float32(path.endswith("norm/scale"))

    @functools.cache
    def make(**changes) -> TinyLlama:
        config = dataclasses.replace(base, **changes)
        stacked = registry.build(dataclasses.replace(config, scan=True))
        shapes, axes = registry.describe(stacked)
        flat = trees.flatten(shapes)
        params = trees.unflatten({path: draw(path, flat[path]) for path in flat})
        if not config.scan:
            params = trees.unstack_layers(params)
        params = jax.tree.map(lambda x: x.astype(config.param_dtype), params)
        return TinyLlama(config, registry.build(config), params, axes)

    return make


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """Programs are optimized for real models alone, and go with the module that they are of.

    Set for a whole module, fixtures included: what they made is compared bit for bit. Each
    program takes some fifteen of the 65,530 memory maps that Linux grants a process, and XLA
    dies where none are left.
    """
    jax.config.update("jax_disable_most_optimizations", request.path.stem not in REAL)
    yield
    jax.clear_caches()
    gc.collect()
