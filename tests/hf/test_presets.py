"""Every preset, described without its weights: a model of any size in milliseconds."""

import pytest

from ecomjax import trees
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
    shapes, _ = registry.describe(registry.build(config))
    assert trees.count(shapes) == preset.parameters


def test_every_leaf_has_its_rule(config):
    shapes, _ = registry.describe(registry.build(config))
    table = families.rule_table(config)
    ruled = {rule.ours: rule.our_shape(table.sizes) for rule in table.rules}
    assert ruled == {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}


def test_its_config_is_written_and_read(config):
    assert families.config_from_hf(families.config_to_hf(config), "config.json") == config


