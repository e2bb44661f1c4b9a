from hypothesis import example, given
from hypothesis import strategies as st

from ecomjax.decoding.stopping import STRIDE, StopStrings

PIECES = ["a", "b", "ab", "ba", "b a", ""]
tokens_of = st.lists(st.integers(0, len(PIECES) - 1), max_size=3 * STRIDE)


def decode(ids):
    return "".join(PIECES[i] for i in ids)


def stop_at(*strings):
    return StopStrings(strings, decode)


@given(tokens_of, st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
@example([0] * STRIDE + [1], ["ab"])
@example([0] * (STRIDE - 1) + [2], ["ab"])
def test_an_answer_is_cut_where_a_string_first_appears(tokens, strings):
    """The text before it is kept to the letter, and the tokens that lie before it whole."""
    found = stop_at(*strings).find(tokens, 0, finished=True)
    text = decode(tokens)
    starts = [text.index(string) for string in strings if string in text]
    assert (found is None) == (not starts)
    if found is None:
        return
    assert text.startswith(found.text) and not any(s in found.text for s in strings)
    # Of two strings the one counts that is whole first, though another begins before it.
    first_whole = min(text.index(s) + len(s) for s in strings if s in text)
    assert min(starts) <= len(found.text) < first_whole
    before = [n for n in range(len(tokens)) if len(decode(tokens[:n])) <= len(found.text)]
    assert found.kept == max(before)


@given(tokens_of, st.lists(st.integers(1, STRIDE), max_size=12))
def test_it_does_not_matter_when_the_text_is_looked_at(tokens, pauses):
    strings = stop_at("b ab", "aab", "bbb")
    whole = strings.find(tokens, 0, finished=True)
    drawn = looked = 0
    found = None
    for pause in pauses:
        drawn = min(drawn + pause, len(tokens))
        found = found or strings.find(tokens[:drawn], looked, finished=False)
        looked = drawn // STRIDE * STRIDE
    assert (found or strings.find(tokens, looked, finished=True)) == whole


def test_strings_that_begin_inside_a_token():
    found = stop_at(" a").find([3, 4, 2], 0, finished=True)
    assert found == (1, "bab")
    assert stop_at("c").find([3, 4, 2], 0, finished=True) is None
