"""The comparison with PEFT on a model so small that its numbers mean nothing."""

import math

import pytest

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import refactoring, registry, result
from ecomjax.models.llama import LlamaConfig


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    config = LlamaConfig(61, 48, 2, 3, 1, 16, 80, tied_embeddings=True)
    monkeypatch.setattr(refactoring, "load_config", lambda _: config)


def test_both_do_the_same_work(capsys):
    (found,) = registry.run(["merge"], registry.Given(""))
    found = found.to_dict()
    assert found["samples"] == 3 and found["details"]["difference"] < 1e-4
    assert all(len(found["details"][kind]) == 3 for kind in ("ours", "peft", "peft_small"))
    assert math.isclose(found["ratio"], found["ours"] / found["peer"])
    assert found["peer"] == min(found["details"]["medians"][k] for k in ("peft", "peft_small"))
    assert "singular values differ" in capsys.readouterr().err


def test_another_result_is_a_defect(monkeypatch):
    merge = refactoring.merge

    def wrong(*arguments):
        merged = merge(*arguments)
        return merged._replace(
            adapter=trees.map_leaves(lambda leaf: leaf.replace(a=1.01 * leaf.a), merged.adapter)
        )

    monkeypatch.setattr(refactoring, "merge", wrong)
    with pytest.raises(UserError, match=r"singular values differ by 1\.0e-02"):
        refactoring.refactor_beside_peft()


def test_turns_alternate_and_the_first_does_not_count():
    turns = []
    seconds = result.alternate(lambda: turns.append("a"), lambda: turns.append("b"), rounds=2)
    assert turns == ["a", "b"] * 3 and [len(own) for own in seconds] == [2, 2]
