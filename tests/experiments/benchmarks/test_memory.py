"""On a model so small that its memory means nothing."""

import jax
import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import memory, training


def test_what_a_process_held_at_most_in_its_steps(make_config, loose_promotion, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("torch")
    model = make_config("finetune").model
    # One process: those that are started know no changes of this one.
    monkeypatch.setattr(memory, "_in_a_process", memory.steps)
    for name, small in (("RAW_BATCH", 2), ("RAW_LENGTH", 12)):
        monkeypatch.setattr(training, name, small)
    held, forget = [], memory.FORGET

    class Watched:
        """In the place of the file that a process tells to forget what it held at most."""

        def exists(self):
            return True

        def write_text(self, text):
            held.append(sum(x.size for x in jax.live_arrays()))
            return forget.write_text(text)

    monkeypatch.setattr(memory, "FORGET", Watched())
    memory.load_base.cache_clear()
    before = sum(x.size for x in jax.live_arrays())
    found = list(memory.memory(model))
    assert held[0] <= before < held[1], "the peer is measured without our weights"
    assert [result.name for result in found] == ["memory", "memory_remat"]
    assert all(50 < result.ours < 50_000 for result in found)


def test_losses_that_differ_are_a_defect(monkeypatch):
    losses = {"ours": 2.0, "peer": 2.1}
    monkeypatch.setattr(memory, "_in_a_process", lambda model, side: (losses[side], 1.0))
    with pytest.raises(UserError, match="this is a defect"):
        list(memory.memory(memory.ModelConfig()))


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "FORGET", tmp_path / "missing")
    with pytest.raises(UserError, match="measure memory on Linux"):
        list(memory.memory(memory.ModelConfig()))
