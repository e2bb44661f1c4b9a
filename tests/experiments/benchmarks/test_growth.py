import dataclasses

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import growth, registry


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_is_that_of_a_power_law(power):
    sizes = (2, 4, 16)
    assert growth.exponent(sizes, [3.0 * n**power for n in sizes]) == pytest.approx(power)


@pytest.mark.usefixtures("loose_promotion")
def test_time_and_memory_of_every_kind_are_measured_and_drawn(tmp_path, monkeypatch):
    few = {"layers": (1, 2), "rank": (1, 2), "examples": (200, 400), "adapters": (2, 3)}
    for constant, sizes in zip(
        ("LAYERS", "RANKS", "EXAMPLES", "ADAPTERS"), few.values(), strict=True
    ):
        monkeypatch.setattr(growth, constant, sizes)
    narrow = {"vocab_size": 512, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}
    shape = dataclasses.replace(growth.SHAPE, **narrow)
    for constant, value in {"SHAPE": shape, "ROUNDS": 1, "ROWS": 1, "LENGTH": 32}.items():
        monkeypatch.setattr(growth, constant, value)
    figure = tmp_path / "growth.svg"
    results = list(registry.run(["growth"], registry.Given("", figure=figure)))
    kinds = [(name, kind) for name in few for kind in growth.Cost._fields]
    assert [result.name for result in results] == [f"growth_{n}_{k}" for n, k in kinds]
    for result, (name, kind) in zip(results, kinds, strict=True):
        assert all(value > 0 for value in result.details[kind])
        assert result.details["sizes"] == few[name]
    deeper = next(result for result in results if result.name == "growth_layers_megabytes")
    first, second = deeper.details["megabytes"]
    assert first < second < 2 * first
    assert "adapters: seconds" in figure.read_text()


def test_a_figure_of_another_kind_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "_step", None)
    with pytest.raises(UserError, match="suffix"):
        next(iter(registry.run(["growth"], registry.Given("", figure=tmp_path / "growth.pdf"))))
