import numpy as np
import pytest
import tokenizers

from ecomjax.data.encoded import NO_CLASS, key_of
from ecomjax.errors import UserError
from ecomjax.evaluation import classify
from ecomjax.evaluation.classify import Classifier, classifies
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.models import registry
from ecomjax.models.heads import SequenceClassifierConfig, TokenClassifierConfig
from ecomjax.tasks.base import Example
from ecomjax.tasks.esci import LABELS, Esci
from ecomjax.tasks.instruction import Instruction
from ecomjax.tasks.queryner import TAGS, QueryNer
from ecomjax.tasks.review_summarization import ReviewSummarization

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "shoe", "##s", "hat"]
QUERY = Example("1", {"tokens": ("red", "shoes", "hat")}, ("B-color", "O", "B-core_product_type"))
PAIR = Example("2", {"query": "red shoes", "product_title": "hat hat hat"}, "Complement")


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return Tokenizer(backend, {"cls_token": "[CLS]", "sep_token": "[SEP]"}, None, "test")


def make(tokenizer, task, window=20, too_long="raise"):
    kind, labels = SequenceClassifierConfig, task.labels
    if task.tags:
        kind, labels = TokenClassifierConfig, task.tags
    model = registry.build(kind(len(PIECES), 8, 1, 2, 8, labels=labels))
    return Classifier(model, tokenizer, task, 2, window, too_long)


def test_which_tasks_have_classes():
    assert classifies(QueryNer()) == "words" and classifies(Esci()) == "sequences"
    assert classifies(ReviewSummarization()) is None
    assert classifies(Instruction("a", "label", ("yes", "no"))) == "sequences"
    assert classifies(Instruction("a", "rouge")) is None


def test_the_class_of_a_word_stands_at_its_first_token(tokenizer):
    (found,) = make(tokenizer, QueryNer()).encode([QUERY])
    assert [PIECES[i] for i in found.tokens] == ["[CLS]", "red", "shoe", "##s", "hat", "[SEP]"]
    own = [TAGS.index("B-color"), TAGS.index("O"), NO_CLASS, TAGS.index("B-core_product_type")]
    assert found.marks == tuple((0, number) for number in (NO_CLASS, *own, NO_CLASS))
    assert (found.prompt, found.key, found.lost) == (6, key_of("red shoes hat"), 0)


def test_the_class_of_a_pair_stands_at_its_start(tokenizer):
    (found,) = make(tokenizer, Esci()).encode([PAIR])
    types, classes = zip(*found.marks, strict=True)
    assert classes == (LABELS.index("Complement"), *[NO_CLASS] * (len(found.tokens) - 1))
    assert types == tuple([0] * 5 + [1] * (len(found.tokens) - 5))


def test_inputs_are_cut_where_it_is_asked_for_and_else_refused(tokenizer):
    (cut,) = make(tokenizer, QueryNer()).encode([QUERY], 5)
    assert len(cut.tokens) == 5 and cut.lost == 1
    with pytest.raises(UserError, match="input of 6 tokens in a window of 5"):
        make(tokenizer, QueryNer(), 5).fitted([QUERY])
    ((encoded, slots),) = make(tokenizer, QueryNer(), 5, "truncate").fitted([QUERY])
    assert len(encoded.tokens) == 5 and slots == (1, 2, None)


def test_predictions_are_the_most_likely_classes(tokenizer, monkeypatch):
    """A word that was cut off is outside of all entities."""
    classifier = make(tokenizer, QueryNer(), 5, "truncate")
    table = np.zeros((5, len(TAGS)), np.float32)
    table[1, 3], table[2, 4] = 1.0, 1.0
    monkeypatch.setattr(classify, "class_log_probabilities", lambda *_: [table])
    (found,) = classifier.predict({}, [QUERY])
    assert found.value == (TAGS[3], TAGS[4], "O") and found.lost == 1
    assert found.text == QueryNer().answer(Example("1", QUERY.inputs, found.value))
    one = np.array([[-3.0, -1.0, -2.0, -4.0]], np.float32)
    monkeypatch.setattr(classify, "class_log_probabilities", lambda *_: [one])
    (found,) = make(tokenizer, Esci()).predict({}, [PAIR])
    assert (found.value, found.text) == ("Substitute", "Substitute")
    assert found.scores == dict(zip(LABELS, one[0].tolist(), strict=True))
    with pytest.raises(TypeError, match="no demonstrations"):
        classifier.predict({}, [QUERY], [[QUERY]])
