"""Against the installed PEFT, on a torch module of three linear layers as one stacked kernel."""

import math

import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters.factorwise import COMBINATIONS, factorwise_merge
from ecomjax.adapters.merge import Options, merge
from ecomjax.errors import UserError
from ecomjax.typing import LowRank

LAYERS, D_IN, D_OUT = 3, 12, 9
PATH = "layers/q/kernel"


class Peft:
    """A torch model with adapters, and what PEFT merges them into."""

    def __init__(self, ranks, alphas, rslora=False, patch=None):
        self.peft, self.torch = pytest.importorskip("peft"), pytest.importorskip("torch")
        torch = self.torch
        torch.manual_seed(0)
        module = torch.nn.Sequential(*[torch.nn.Linear(D_IN, D_OUT) for _ in range(LAYERS)])
        names = [str(layer) for layer in range(LAYERS)]
        for number, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
            config = self.peft.LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=names, use_rslora=rslora
            )
            if number:
                self.model.add_adapter(f"a{number}", config)
            else:
                self.model = self.peft.get_peft_model(module, config, adapter_name="a0")
        rng = np.random.default_rng(0)
        for name, parameter in self.model.named_parameters():
            if "lora" in name:
                values = rng.standard_normal(parameter.shape).astype(np.float32)
                parameter.data = torch.from_numpy(values)
        self.names = [f"a{number}" for number in range(len(ranks))]

    def modules(self):
        return [self.model.base_model.model[layer] for layer in range(LAYERS)]

    def adapter(self, name):
        def stacked(values):
            return np.stack([value.detach().numpy().T for value in values])

        modules = self.modules()
        a = stacked([module.lora_A[name].weight for module in modules])
        b = stacked([module.lora_B[name].weight for module in modules])
        scale = np.float32([module.scaling[name] for module in modules])
        return trees.unflatten({PATH: LowRank(a=a, b=b, scale=scale)})

    def adapters(self):
        return [self.adapter(name) for name in self.names]

    def merged(self, weights, combination, **settings):
        self.model.add_weighted_adapter(
            self.names, weights, "merged", combination_type=combination, **settings
        )
        return self.adapter("merged")


@pytest.fixture
def masks(monkeypatch):
    """Masks that PEFT draws, kept in the order of its draws."""
    torch, kept = pytest.importorskip("torch"), []
    draw = torch.bernoulli

    def bernoulli(probabilities):
        kept.append(draw(probabilities))
        return kept[-1]

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return kept


def as_trees(drawn, adapters):
    """PEFT goes layer by layer, first through A of all adapters and then through B."""
    if not drawn:
        return None
    order = iter(drawn)
    layers = [
        [[next(order).numpy().T for _ in range(adapters)] for _ in "AB"] for _ in range(LAYERS)
    ]
    assert next(order, None) is None
    return [
        trees.unflatten(
            {
                PATH: LowRank(
                    a=np.stack([a[i] for a, _ in layers]),
                    b=np.stack([b[i] for _, b in layers]),
                    scale=np.ones(LAYERS, np.float32),
                )
            }
        )
        for i in range(adapters)
    ]


def delta(adapter):
    leaf = trees.flatten(adapter)[PATH]
    return leaf.scale[:, None, None] * (leaf.a @ leaf.b)


def assert_close(ours, expected, tolerance=1e-6):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("rslora", [False, True])
def test_equal_to_peft(combination, rslora, masks):
    """Factors and scales, weights below zero included; those of a decomposition as a product."""
    theirs = Peft((4, 4, 4), (8, 2, 5), rslora)
    weights = [0.7, -0.4, 1.3]
    settings = {} if combination in ("linear", "cat", "svd") else {"density": 0.6}
    expected = theirs.merged(weights, combination, **settings)
    ours = factorwise_merge(
        theirs.adapters(), weights, combination, rslora=rslora, masks=as_trees(masks, 3), **settings
    )
    assert bool(masks) == combination.startswith("dare")
    ours, expected = trees.flatten(ours)[PATH], trees.flatten(expected)[PATH]
    np.testing.assert_allclose(ours.scale, expected.scale, rtol=1e-6)
    if combination == "svd":
        assert_close(ours.a @ ours.b, expected.a @ expected.b, 1e-5)
    else:
        assert_close(ours.a, expected.a)
        assert_close(ours.b, expected.b)


@pytest.mark.parametrize("combination", ["ties", "dare_ties"])
def test_votes_by_frequency(combination, masks):
    theirs = Peft((4, 4, 4), (8, 2, 5))
    settings = {"density": 0.5}
    expected = theirs.merged(
        [1.0, 0.5, 2.0], combination, majority_sign_method="frequency", **settings
    )
    ours = factorwise_merge(
        theirs.adapters(),
        [1.0, 0.5, 2.0],
        combination,
        votes="frequency",
        masks=as_trees(masks, 3),
        **settings,
    )
    assert_close(delta(ours), delta(expected))


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_ranks_that_differ(combination):
    theirs = Peft((2, 4), (8, 2))
    expected = theirs.merged([0.7, 0.4], combination)
    ours = factorwise_merge(theirs.adapters(), [0.7, 0.4], combination)
    assert_close(delta(ours), delta(expected), 1e-5)


def test_one_adapter_is_always_linear():
    theirs = Peft((4,), (8,))
    expected = theirs.merged([0.7], "ties", density=0.3)
    assert_close(delta(factorwise_merge(theirs.adapters(), [0.7], "ties", 0.3)), delta(expected))


@pytest.mark.parametrize(
    ("theirs", "ours"), [("svd", "svd"), ("ties_svd", "ties"), ("magnitude_prune_svd",) * 2]
)
@pytest.mark.parametrize("votes", ["total", "frequency"])
def test_merging_of_deltas_is_what_peft_computes_on_deltas(theirs, ours, votes):
    """The types of PEFT that are exact are our methods with PEFT's options."""
    peft = Peft((3, 4), (8, 2))
    settings = {} if theirs == "svd" else {"density": 0.4, "majority_sign_method": votes}
    expected = peft.merged([0.7, 0.4], theirs, svd_rank=D_OUT, **settings)
    ours = ours.removesuffix("_svd")
    options = Options(
        rank=D_OUT,
        density=0.4,
        elect="unweighted",
        votes=votes,
        normalise="count" if ours == "ties" else None,
    )
    merged = merge(peft.adapters(), [0.7, 0.4], ours, options).adapter
    assert_close(delta(merged), delta(expected), 1e-5)


def test_cross_terms_and_rslora_are_the_faults_told():
    """`linear` is far from the sum of the deltas; rsLoRA brings a scale of √rank."""
    rng = np.random.default_rng(0)

    def draw(scale):
        a, b = (rng.standard_normal(s, np.float32) for s in ((1, 12, 4), (1, 4, 9)))
        return {"q": LowRank(a=a, b=b, scale=np.full(1, scale, np.float32))}

    adapters = [draw(2.0) for _ in range(2)]
    exact = sum(0.5 * x["q"].scale[:, None, None] * (x["q"].a @ x["q"].b) for x in adapters)
    wrong = factorwise_merge(adapters, [0.5, 0.5], "linear")["q"]
    assert np.linalg.norm(wrong.a @ wrong.b - exact) > 0.8 * np.linalg.norm(exact)
    cat = factorwise_merge(adapters, [0.5, 0.5], "cat", rslora=True)["q"]
    assert_close(cat.scale[:, None, None] * (cat.a @ cat.b), math.sqrt(8) * exact, 1e-5)


def test_masks_are_drawn_from_the_seed():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1, 12, 4), np.float32), rng.standard_normal((1, 4, 9), np.float32)
    adapter = {"q": LowRank(a=a, b=b, scale=np.ones(1, np.float32))}
    pair, weights = [adapter, adapter], [1.0, 1.0]
    runs = [factorwise_merge(pair, weights, "dare_linear", seed=seed)["q"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].a, runs[1].a)
    assert not np.array_equal(runs[0].a, runs[2].a)
    kept = runs[0].a[a != 0] / a[a != 0]
    np.testing.assert_allclose(np.unique(kept.round(4)), [0.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("second", "combination", "message"),
    [
        ({"q": 4}, "linar", "unknown combination 'linar'.*linear"),
        ({"q": 3}, "ties", r"ranks \[4, 3\]: kernel 'q', 'ties'"),
        ({"q": 4, "k": 4}, "cat", "not in all adapters: kernel 'k'"),
    ],
)
def test_what_peft_cannot_merge_is_refused(second, combination, message):
    def zeros(ranks):
        ones = np.ones((), np.float32)
        return {
            path: LowRank(a=np.ones((5, r), np.float32), b=np.ones((r, 6), np.float32), scale=ones)
            for path, r in ranks.items()
        }

    with pytest.raises(UserError, match=message):
        factorwise_merge([zeros({"q": 4}), zeros(second)], [1.0, 1.0], combination)
