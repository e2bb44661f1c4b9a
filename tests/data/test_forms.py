import pytest

from ecomjax.data.forms import Edge, Form, one_of


def test_one_of_has_an_edge_for_each_text():
    assert one_of(["a", "b"]) == Form(((Edge("a", 1), Edge("b", 1)), ()))
    assert hash(one_of(["a"])) == hash(one_of(["a"]))


@pytest.mark.parametrize(
    "states",
    [
        (),
        ((Edge("a", 0),),),
        ((Edge("a", 2),), ()),
        ((Edge("a", 2),), (Edge("b", 2),), ()),
        ((Edge("a", 1),), (Edge("b", 0),)),
    ],
    ids=["none", "itself", "beyond", "unreached", "back"],
)
def test_edges_lead_on_and_everywhere(states):
    with pytest.raises(ValueError, match="lead"):
        Form(states)
