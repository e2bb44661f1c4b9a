import jax
import numpy as np
import pytest

from ecomjax.models.llama import Llama


@pytest.fixture(scope="session")
def tiny(make_llama):
    return make_llama(layers=2)


@pytest.fixture(scope="session")
def variables(tiny):
    return {"params": tiny.params}


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of 4 to 21 tokens that open with the same three."""
    rng = np.random.default_rng(0)
    return [[7, 8, 9, *rng.integers(0, 61, n).tolist()] for n in (5, 1, 18, 2, 9, 9, 13, 4)]


@pytest.fixture(scope="session")
def log_probabilities(tiny):
    """Function of sequences -> log p of every next token, from full forwards [n, 64, V]."""

    def run(sequences):
        padded = np.zeros((len(sequences), 64), np.int32)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence)] = sequence
        logits = tiny.logits(padded).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return run


class Watched(Llama):
    """Counts how often its head is traced, and how often it runs."""

    traced = 0
    runs = 0

    def logits(self, hidden, adapter_index=None, tokens=None):
        type(self).traced += 1
        jax.debug.callback(self.count)
        return super().logits(hidden, adapter_index, tokens)

    @classmethod
    def count(cls):
        cls.runs += 1


@pytest.fixture
def watched():
    """Function of a config -> (model, function of a call -> heads traced, heads run by it)."""

    def make(config):
        def count(function, *arguments):
            before = Watched.traced, Watched.runs
            function(*arguments)
            jax.effects_barrier()
            return Watched.traced - before[0], Watched.runs - before[1]

        return Watched(config), count

    return make
