"""The benchmark of merging on a model of two small layers, in this process."""

import dataclasses

import numpy as np
import pytest

from ecomjax.errors import UserError
from ecomjax.experiments import merged
from ecomjax.experiments.benchmarks import merging
from ecomjax.models.llama import LlamaConfig


@pytest.fixture(autouse=True)
def small(monkeypatch):
    config = LlamaConfig(50, 128, 2, 4, 2, 32, 160, tied_embeddings=False)
    for module in (merging, merged):
        monkeypatch.setattr(module, "load_config", lambda *_: config)
    monkeypatch.setattr(merging, "_in_a_process", lambda function, *own: function(*own))


def test_every_method_is_merged_and_dense_ones_are_checked():
    results = {result.method: result for result in merging.merge_7b()}
    assert list(results) == list(merging.METHODS_7B)
    for method, result in results.items():
        exact = method in ("linear", "concatenation")
        assert result.matrices == 14 and result.seconds > 0 and result.gib > 0.05
        assert result.rank == (64 if exact else 16)
        assert (result.relative_error == 0) == exact
        assert len(result.checks) == (7 if "ties" in method else 0)
        assert f"merge_7b {method}: 14 matrices in" in str(result)
        assert {"name", "limit_seconds", "versions"} <= result.to_dict().keys()
        for check in result.checks.values():
            assert check["optimum"] * 0.9999 <= check["error"] < 1
    assert results["ties"].limit > results["svd"].limit


def test_the_error_of_the_best_factors():
    matrix = np.random.default_rng(0).standard_normal((20, 30), np.float32)
    s = np.linalg.svd(matrix, compute_uv=False)
    for one in (matrix, matrix.T):
        expected = np.sqrt((s[5:] ** 2).sum() / (s**2).sum())
        np.testing.assert_allclose(merging._best_error(one, 5), expected, rtol=1e-5)


def test_a_layer_that_is_another_is_told(monkeypatch, tmp_path):
    adapters = [str(tmp_path / str(number)) for number in range(2)]
    merging._write(adapters)
    config = merging._config("ties", adapters)
    assert merging.check(config)
    # At another density the entries that stay are others.
    other = dataclasses.replace(config.options, density=0.2)
    with pytest.raises(UserError, match=r"of the best factors.*ties of layers_0"):
        merging.check(dataclasses.replace(config, options=other))


def test_unknown_methods_are_told_first():
    with pytest.raises(UserError, match=r"unknown method 'slerp'.*known: linear"):
        next(merging.merge_7b(["linear", "slerp"]))
