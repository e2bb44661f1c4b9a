import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import LocalSource
from ecomjax.errors import UserError
from ecomjax.evaluation.encode import encode_pair, encode_source, encode_words
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.tasks.base import Example
from ecomjax.tasks.esci import LABELS, Esci
from ecomjax.tasks.instruction import Instruction
from ecomjax.tasks.queryner import TAGS, QueryNer
from ecomjax.tasks.review_summarization import ReviewSummarization

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "red",
    "shoes",
    "ünder",
    "cafe\u0301",
    "x-y",
    "a",
    "'",
    "5",
    "women's",
    "日本",
    "👩‍👩",
    "[SEP]",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A WordPiece tokenizer, ours and that of transformers."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"05:-'日本", "red", "shoe"]
    pieces += [f"##{letter}" for letter in LETTERS]
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


def byte_pairs(special):
    """Vocabulary of the special tokens, the bytes and two merges, and the merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("Ġ", "s")]
    tokens = [*special, *alphabet, *("".join(pair) for pair in merges)]
    return {token: i for i, token in enumerate(tokens)}, merges


@pytest.fixture(scope="module", params=["Roberta", "Bart"])
def byte_level(request, tmp_path_factory):
    """A byte-level tokenizer of RoBERTa's or BART's form, ours and that of transformers."""
    vocabulary, merges = byte_pairs(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    folder = tmp_path_factory.mktemp(request.param)
    made = getattr(transformers, f"{request.param}Tokenizer")(vocab=vocabulary, merges=merges)
    made.save_pretrained(folder)
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A Unigram tokenizer of T5's form, ours and that of transformers."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), ("▁red", -1.0)]
    pieces += [(letter, -4.0) for letter in f"{LETTERS}RL12:-'"]
    folder = tmp_path_factory.mktemp("t5")
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


def match(query, title, label="Complement"):
    return Example("7", {"query": query, "product_title": title}, label)


def query(words, tags=None):
    return Example("7", {"tokens": tuple(words)}, tuple(tags or ["O"] * len(words)))


TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)


@given(TEXTS, TEXTS, st.integers(4, 40))
def test_pairs_are_those_of_transformers(bert, byte_level, first, second, window):
    example = match(first, second)
    for ours, theirs in (bert, byte_level):
        special = 3 if theirs is bert[1] else 4
        if window <= special:
            continue
        found = encode_pair(Esci(), example, ours, window)
        texts = Esci().pair(example)
        expected = theirs(*texts, truncation=True, max_length=window, return_token_type_ids=True)
        assert list(found.tokens) == expected["input_ids"]
        if theirs is bert[1]:
            assert list(found.token_types) == expected["token_type_ids"]
        else:
            assert set(found.token_types) == {0}
        assert found.lost == len(theirs(*texts)["input_ids"]) - len(found.tokens)
        assert (found.id, found.label) == ("7", LABELS.index("Complement"))


def test_a_pair_without_a_second_text_is_a_text(bert):
    ours, theirs = bert
    task = Instruction("a", "label", ("yes", "no"))
    example = Example("1", {"instruction": "red?", "input": ""}, "no")
    found = encode_pair(task, example, ours, 9)
    assert list(found.tokens) == theirs("red?")["input_ids"] and found.label == 1


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), st.integers(3, 40))
def test_words_of_wordpiece_are_those_of_transformers(bert, words, window):
    ours, theirs = bert
    tags = [TAGS[i] for i in range(len(words))]
    found = encode_words(QueryNer(), query(words, tags), ours, window)
    expected = theirs(words, is_split_into_words=True, truncation=True, max_length=window)
    assert list(found.tokens) == expected["input_ids"]
    owners = expected.word_ids()
    slots = [owners.index(i) if i in owners else None for i in range(len(words))]
    assert list(found.slots) == slots and found.lost == slots.count(None)
    assert found.tags == tuple(range(len(words)))


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9))
def test_words_begin_where_their_characters_do(bert, byte_level, t5, words):
    """Any tokenizer: the ids are those of the text, and a slot's token is of its word."""
    text = " ".join(words)
    starts = [len(" ".join([*words[:i], ""])) for i in range(len(words))]
    for ours, theirs in (bert, byte_level, t5):
        found = encode_words(QueryNer(), query(words), ours, 512)
        expected = theirs(text, return_offsets_mapping=True)
        assert list(found.tokens) == expected["input_ids"]
        assert None not in found.slots and list(found.slots) == sorted(set(found.slots))
        for word, start, slot in zip(words, starts, found.slots, strict=True):
            first, end = expected["offset_mapping"][slot]
            assert first <= start < end or word == "👩‍👩", (word, first, end)


def test_words_that_a_tokenizer_does_not_know_have_no_slot(bert):
    found = encode_words(QueryNer(), query(["red", "\u200b", "shoe"]), bert[0], 9)
    assert found.slots == (1, None, 2) and found.lost == 1


def test_words_that_share_a_token_do_not_share_its_slot():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red shoe": 0, "?": 1}, "?"))
    ours = Tokenizer(backend, {}, None, "test")
    assert encode_words(QueryNer(), query(["red", "shoe"]), ours, 9).slots == (0, None)


@pytest.mark.parametrize("window", [8, 512])
def test_sources_are_those_of_transformers(t5, byte_level, window):
    task = ReviewSummarization()
    example = Example("7", {"reviews": ("red shoes", "a")}, ("under red", "x"))
    for ours, theirs in (t5, byte_level):
        found = encode_source(task, example, ours, window)
        whole = theirs(task.source(example))["input_ids"]
        cut = theirs(task.source(example), truncation=True, max_length=window)["input_ids"]
        assert list(found.source) == cut and found.lost == len(whole) - len(cut)
        target = theirs(text_target="under red")["input_ids"]
        opening = target[: theirs is not t5[1]]  # BART's <s>, which its decoder starts with
        assert [*opening, *found.target] == target
        assert found.source[-1] == found.target[-1] == ours.eos_id


def test_a_source_of_a_tokenizer_that_adds_nothing_ends_too():
    vocabulary, merges = byte_pairs(("</s>",))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = Tokenizer(backend, {"eos_token": "</s>"}, None, "test")
    example = Example("7", {"reviews": ("red",)}, ("x",))
    found = encode_source(ReviewSummarization(), example, ours, 9)
    assert found.source == (*ours.encode("summarize: Review 1: red")[:8], 0)
    assert found.lost == len(ours.encode("summarize: Review 1: red")) - 8


def test_what_cannot_be_encoded(bert, t5):
    with pytest.raises(UserError, match="no sequence classification: task queryner"):
        encode_pair(QueryNer(), query(["a"]), bert[0], 9)
    with pytest.raises(UserError, match="no token classification: task esci"):
        encode_words(Esci(), match("a", "b"), bert[0], 9)
    with pytest.raises(UserError, match="a window of 3 tokens holds no text"):
        encode_pair(Esci(), match("a", "b"), bert[0], 3)
    with pytest.raises(UserError, match="a window of 1 tokens holds no text"):
        encode_source(Esci(), match("a", "b"), t5[0], 1)


def test_every_real_query_keeps_its_words(shared_data, bert):
    task = QueryNer()
    for example in task.load(LocalSource(shared_data), "validation"):
        found = encode_words(task, example, bert[0], 512)
        assert found.lost == 0 and len(set(found.slots)) == len(found.tags)
