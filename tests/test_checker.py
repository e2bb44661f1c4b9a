import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from tests.checker import checked


def outer(scale):
    @jaxtyped(typechecker=checked)
    def inner(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        return scale * x

    return inner


def test_functions_in_functions_are_checked_whenever_they_are_made():
    """And each computes with what it closes over: checkers alone are shared."""
    one, two = np.ones(2), np.ones(3)
    for scale in (2.0, 3.0):
        inner = outer(scale)
        assert inner(one, one).tolist() == [scale, scale]
        with pytest.raises(TypeCheckError):
            inner(one, two)
        with pytest.raises(TypeCheckError):
            inner(one.astype(np.int32), one)
    with pytest.raises(TypeCheckError):
        outer(np.ones((2, 1)))(one, one)


def test_other_annotations_have_another_checker():
    def make(kind):
        @jaxtyped(typechecker=checked)
        def inner(x: kind) -> None:
            del x

        return inner

    make(int)(1)
    make(str)("1")
    with pytest.raises(TypeCheckError):
        make(str)(1)
