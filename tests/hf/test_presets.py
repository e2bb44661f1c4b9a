"""Every preset, described without its weights: a model of any size in milliseconds."""

import pytest

from ecomjax import sharding, trees
from ecomjax.hf import families
from ecomjax.hf.presets import PRESETS
from ecomjax.models import registry


@pytest.fixture(scope="module", params=PRESETS)
def preset(request):
    return PRESETS[request.param]


@pytest.fixture(scope="module")
def config(preset):
    return families.config_from_hf(preset.fields, preset.hub_id)


def test_parameters_are_as_many_as_published(preset, config):
    """BART's bias of the logits is a constant there, and counts as none."""
    shapes, _ = registry.describe(registry.build(config))
    constants = trees.count(trees.select(shapes, "logits_bias"))
    assert trees.count(shapes) - constants == preset.parameters


def test_every_leaf_has_its_rule(config):
    shapes, _ = registry.describe(registry.build(config))
    table = families.rule_table(config)
    ruled = {rule.ours: rule.our_shape(table.sizes) for rule in table.rules}
    assert ruled == {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}


def test_every_leaf_has_a_sharding(config):
    """And next to nothing is held whole by every device, whatever does not divide."""
    shapes, axes = registry.describe(registry.build(config))
    specs, _ = sharding.specs(axes, shapes, sharding.make_mesh(data=1, fsdp=4, tensor=2))
    leaves, specs = trees.flatten(shapes), trees.flatten(specs)
    assert leaves.keys() == specs.keys()
    split = sum(leaf.size for path, leaf in leaves.items() if any(specs[path]))
    assert split > 0.99 * trees.count(shapes)


def test_its_config_is_written_and_read(config):
    assert families.config_from_hf(families.config_to_hf(config), "config.json") == config
