"""Steps traced from shapes: where their arrays lie, and that they cost what arithmetic says."""

import json

import jax
import pytest

from configs import finetune, icl
from ecomjax import sharding
from ecomjax.experiments.chips import Chip
from ecomjax.experiments.config import from_config
from ecomjax.experiments.costs import measure
from ecomjax.experiments.hlo import Program
from ecomjax.experiments.steps import Prompts, trace
from ecomjax.hf import families
from ecomjax.models.llama import LlamaConfig

pytestmark = pytest.mark.usefixtures("loose_promotion")

TINY = LlamaConfig(vocab_size=256, width=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=96)
CHIP = Chip("toy", memory=2**30, flops=1e12, bandwidth=1e11, interconnect=1e10)
PROMPTS = Prompts(slots=64, prefix=32)
RANK, LENGTH = 4, 128

WIDTH = TINY.heads * TINY.head_dim
NARROW = TINY.kv_heads * TINY.head_dim
KERNELS = [
    *[(TINY.width, WIDTH), (TINY.width, NARROW), (TINY.width, NARROW), (WIDTH, TINY.width)],
    *[(TINY.width, TINY.ffn), (TINY.width, TINY.ffn), (TINY.ffn, TINY.width)],
]
PRODUCTS = TINY.layers * sum(d_in * d_out for d_in, d_out in KERNELS)
ADAPTER = TINY.layers * RANK * sum(d_in + d_out for d_in, d_out in KERNELS)
HEAD = TINY.width * TINY.vocab_size
PAIR = WIDTH * TINY.layers
"""Of a query and a key."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without weights."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(families.config_to_hf(TINY)))
    return str(path)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=4)


def training(folder, **model):
    config = finetune.get_config("queryner")
    config.model.update(path=folder, **model)
    config.training.row_length, config.adapter.rank = LENGTH, RANK
    return from_config(config)


def few_shot(folder, method):
    config = icl.get_config("esci")
    config.model.path, config.evaluation.batch_size = folder, 8
    config.task.method, config.task.max_new_tokens = method, 4
    return from_config(config)


def compiled(step, mesh):
    with sharding.use(mesh):
        return step.traced.lower().compile()


def flops(program, mesh):
    return mesh.size * measure(Program(program.as_text()), CHIP).flops


def test_a_training_step(folder, mesh):
    """4 N + 6 N_lora a token, and what is computed again: attention's scores."""
    step = trace(training(folder), mesh, PROMPTS)
    program, tokens = compiled(step, mesh), 8 * LENGTH
    attended = PAIR * LENGTH
    spent = tokens * (4 * (PRODUCTS + HEAD) + 6 * ADAPTER + 14 * attended)
    assert flops(program, mesh) == pytest.approx(spent, rel=0.01)
    assert step.tokens == tokens
    useful = tokens * (4 * (PRODUCTS + HEAD) + 6 * ADAPTER + 6 * attended)
    assert step.useful_flops == useful
    # The state is left where it was found, and in its place.
    (before, frozen, _), _ = program.input_shardings
    assert jax.tree.leaves(before) == jax.tree.leaves(program.output_shardings[0])
    assert program.memory_analysis().alias_size_in_bytes > 0
    kernel = frozen["params"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shard_shape((TINY.layers, TINY.width, TINY.ffn)) == (3, 16, 96)


def test_a_step_of_a_quantized_base_holds_its_codes(folder, mesh):
    step = trace(training(folder, quantization="nf4"), mesh, PROMPTS)
    frozen = step.traced.args_info[0][1]
    codes = frozen["params"]["layers"]["mlp"]["up"]["kernel"].codes
    assert codes.shape == (TINY.layers, TINY.width // 2, TINY.ffn)


def test_scoring_follows_the_prefix_and_needs_no_gradient(folder, mesh):
    step = trace(few_shot(folder, "likelihood"), mesh, PROMPTS)
    tokens, before = 8 * PROMPTS.slots, PROMPTS.prefix
    spent = tokens * (2 * (PRODUCTS + HEAD) + 4 * PAIR * (PROMPTS.slots + before))
    assert flops(compiled(step, mesh), mesh) == pytest.approx(spent, rel=0.01)
    attended = before + PROMPTS.slots / 2
    assert step.useful_flops == tokens * (2 * PRODUCTS + 4 * PAIR * attended)


def test_a_decoding_step_draws_one_token_a_row(folder, mesh):
    step = trace(few_shot(folder, "generate"), mesh, PROMPTS)
    held = PROMPTS.prefix + PROMPTS.slots + 4
    needed = 8 * (2 * (PRODUCTS + HEAD) + 4 * PAIR * held)
    assert step.tokens == 8 and step.useful_flops == needed
    program = compiled(step, mesh)
    assert flops(program, mesh) == pytest.approx(needed, rel=0.01)
    assert program.memory_analysis().alias_size_in_bytes > 0
