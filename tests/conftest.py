"""What every test runs under: eight fake CPU devices and strict numerics.

The environment is set before jax is imported, and is inherited by the commands that tests
start; the strict settings hold in the test process alone. Functions of ecomjax are checked
against their annotations, shapes included, at each call.
"""

import os
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import flax.linen
import flax.struct
import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs are kept for other tests and runs; the bound brings a lock between processes.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_compilation_cache_max_size", 2**30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# jax rebuilds structs around specs, shardings and None, so their fields are not checked.
flax.struct.PyTreeNode.__no_type_check__ = True
flax.linen.Module.__no_type_check__ = True
install_import_hook(
    "ecomjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

hypothesis.settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("reproducible")


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
