import numpy as np
import pytest


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
