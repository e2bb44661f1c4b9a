import dataclasses
import re
import zlib

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.routing import hold_together
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.sources import Row, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.decoding.generate import generate
from ecomjax.decoding.sampling import Sampling
from ecomjax.errors import UserError
from ecomjax.evaluation import predict
from ecomjax.evaluation.labels import CONTENT_FREE
from ecomjax.evaluation.predict import Predictor
from ecomjax.metrics.calibration import probabilities
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Invalid
from ecomjax.tasks.esci import LABELS, Esci
from ecomjax.tasks.instruction import Instruction
from ecomjax.tasks.queryner import QueryNer

END = 2


class Words:
    """A tokenizer of 61 ids, one for each word by its hash; it decodes to what it is told."""

    eos_id = END
    fingerprint = "words"

    def __init__(self, said=""):
        self.said = said

    def encode(self, text):
        return [zlib.crc32(word.encode()) % 58 + 3 for word in text.split()]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def escape(self, text):
        return text.replace("<assistant>", "< assistant>")

    def decode(self, ids):
        assert END not in list(ids)
        return self.said

    def chat(self, messages):
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"


@pytest.fixture(scope="module")
def tiny(make_llama):
    return make_llama(layers=2)


@pytest.fixture(scope="module")
def variables(tiny):
    return {"params": jax.tree.map(jax.numpy.asarray, tiny.params)}


@pytest.fixture
def make(tiny):
    """Function (task, changes) -> predictor."""

    def make(task, said="", **changes):
        given = {
            "model": tiny.model,
            "tokenizer": Words(said),
            "task": task,
            "prompt_format": "chat",
            "method": "auto",
            "batch_size": 4,
            "window": 1024,
            "max_new_tokens": 5,
        }
        return Predictor(**given | changes)

    return make


def examples_of(task, size=6):
    return task.load(SyntheticSource(0, Sizes(3, 3, size)), "test")


@pytest.mark.parametrize("task", [Esci(), QueryNer()], ids=lambda task: task.name)
@pytest.mark.parametrize("prompt_format", ["chat", "alpaca"])
def test_training_sees_the_prompt_of_evaluation_then_the_answer_and_its_end(
    make, task, prompt_format
):
    predictor = make(task, prompt_format=prompt_format)
    for example in examples_of(task):
        (encoded,), prompt = predictor.encode([example]), predictor.prompt(example)
        assert encoded.id == example.id
        assert encoded.tokens[: encoded.prompt] == prompt
        answer = tuple(predictor.tokenizer.encode(task.answer(example)))
        assert encoded.tokens[encoded.prompt :] == (*answer, END)


def test_demonstrations_stand_before_the_question_in_their_order(make):
    task = Esci()
    examples = examples_of(task)
    shown = examples[:2]
    prompt = make(task).prompt(examples[2], shown)
    expected = " ".join(
        [
            f"<system> {task.system}",
            *(f"<user> {task.user(e)} <assistant> {task.answer(e)}" for e in shown),
            f"<user> {task.user(examples[2])} <assistant>",
        ]
    )
    assert prompt == tuple(Words().encode(expected))


def test_a_label_is_chosen_by_its_likelihood(make, variables, tiny):
    """The scores are those of one full forward for each label."""
    task, examples = Esci(), examples_of(Esci(), 3)
    predictor = make(task)
    done = []
    for example, found in zip(
        examples, predictor.predict(variables, examples, on_done=done.append), strict=True
    ):
        assert tuple(found.scores) == LABELS
        assert found.value == found.text == max(LABELS, key=lambda label: found.scores[label])
        prompt = predictor.prompt(example)
        for label in LABELS:
            answer = predictor.answer(label)
            tokens = np.array([[*prompt, *answer]], np.int32)
            logits = tiny.logits(tokens)[0, len(prompt) - 1 : -1].astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = log_p[np.arange(len(answer)), list(answer)].sum()
            assert found.scores[label] == pytest.approx(expected, rel=1e-5)
    assert sum(done) == 3


class Bytes(Words):
    """Two tokens for each byte of UTF-8: labels that open alike share their first tokens."""

    def encode(self, text):
        return [half + 3 for byte in text.encode() for half in divmod(byte, 16)]


def test_f38_shares_of_labels_that_open_alike(make, variables, tiny):
    """One a prefix of another, some with the same first token, some beyond ASCII."""
    labels = ("Substitute", "Substitutes", "Süß", "Suß", "代替品", "代替")
    row = {"instruction": "Which?", "input": "a", "output": labels[0]}
    task = Instruction(score="label", labels=labels)
    predictor = make(task, tokenizer=Bytes(), prompt_format="alpaca")
    example = task.example(Row(row, "here"))
    (found,) = predictor.predict(variables, [example])
    prompt, expected = predictor.prompt(example), []
    assert len({predictor.answer(label)[:1] for label in labels}) == 2
    for label in labels:
        answer = predictor.answer(label)
        logits = tiny.logits(np.array([[*prompt, *answer]], np.int32))[0, len(prompt) - 1 : -1]
        log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        expected.append(log_p[np.arange(len(answer)), list(answer)].sum())
    shares = probabilities(np.array([[found.scores[label] for label in labels]]))[0]
    brute_force = np.exp(expected) / np.exp(expected).sum()
    np.testing.assert_allclose(shares, brute_force, rtol=1e-5, atol=1e-9)
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert found.value == labels[int(brute_force.argmax())]


class Plain(Esci):
    """Asks the query as it is, for labels of different lengths."""

    labels = ("aa", "a", "b b")

    def user(self, example):
        return example.inputs["query"]


def test_other_scores_of_labels_by_hand(make, variables):
    """Sums by length; and sums less the mean of what three questions without content get."""
    examples = [Example(word, {"query": word}, "a") for word in ("x", "y")]
    shown = [[examples[1]], []]

    def table(texts, label_score):
        asked = [dataclasses.replace(e, inputs={"query": text}) for e, text in texts]
        found = make(Plain(), label_score=label_score).predict(variables, asked, shown)
        for each in found:
            assert each.value == max(each.scores, key=lambda label: each.scores[label])
        return np.array([list(each.scores.values()) for each in found], np.float64)

    own = [(e, e.inputs["query"]) for e in examples]
    sums, found = table(own, "sum"), table(own, "calibrated")
    np.testing.assert_allclose(table(own, "mean"), sums / [2, 2, 3], rtol=1e-6)
    blank = [table([(e, text) for e in examples], "sum") for text in CONTENT_FREE]
    favoured = np.mean([probabilities(each) for each in blank], axis=0)
    np.testing.assert_allclose(found, np.log(probabilities(sums) / favoured), atol=1e-5)
    assert (found.argsort(-1) != sums.argsort(-1)).any()


def test_calibration_asks_within_the_frame_of_the_question(make):
    """The names of what is shown stay, and so does a row's own instruction."""
    esci = Example("1", {"query": "red shoe", "product_brand": "Acme"}, "Exact")
    task = Instruction(score="label", labels=("yes", "no"))
    rows = [{"instruction": "Is it red?", "input": text, "output": "yes"} for text in ("a b", "")]
    given, blank = (task.example(Row(row, "here")) for row in rows)
    for asked, example, head, body in (
        (Esci(), esci, f"<system> {Esci.system} <user>", "Query: {} Brand: {}"),
        (task, given, "<system> Is it red? <user>", "{}"),
    ):
        (fitted,) = make(asked, label_score="calibrated").fitted([example])
        assert len(fitted.content_free) == 3
        for text, prompt in zip(CONTENT_FREE, fitted.content_free, strict=True):
            expected = f"{head} {body.replace('{}', text)} <assistant>"
            assert prompt == tuple(Words().encode(expected))
    with pytest.raises(UserError, match=r"without input.*label_score=sum"):
        make(task, label_score="calibrated").fitted([blank])
    assert not make(task).fitted([blank])[0].content_free


def test_content_free_prompts_leave_room_too(make, variables):
    """Demonstrations are left out for them; they are told to be too long before any decoding."""
    task, example = Plain(), Example("1", {"query": "x"}, "a")
    shown = [[Example(word, {"query": word}, "a") for word in ("y", "z")]]

    class Long(Words):
        def encode(self, text):
            return super().encode(text.replace("[MASK]", "one two three"))

    given = {"tokenizer": Long(), "label_score": "calibrated"}
    size = len(make(task).prompt(example, shown[0]))
    whole, cut = (
        make(task, window=size + 3, too_long=policy, **given) for policy in ("raise", "truncate")
    )
    with pytest.raises(UserError, match=rf"prompt of {size + 2} tokens leaves no room.*example 1"):
        whole.fitted([example], shown)
    (fitted,) = cut.fitted([example], shown)
    assert (fitted.lost, fitted.dropped) == (0, 1)
    assert all(len(prompt) <= size for prompt in fitted.content_free)
    assert fitted.content_free == make(task, **given).fitted([example], [shown[0][1:]])[0][3]
    (found,) = cut.predict(variables, [example], shown)
    assert found.dropped == 1
    tight = make(task, window=len(make(task).prompt(example)) + 3, too_long="truncate", **given)
    with pytest.raises(UserError, match="leaves no room"):
        tight.fitted([example], shown)


class Breaks(Words):
    """Line breaks that follow each other are one token."""

    def encode(self, text):
        pieces = re.findall(r"\n+|\S+", text)
        return [zlib.crc32(piece.encode()) % 58 + 3 for piece in pieces]


def test_line_breaks_before_an_input_that_is_cut_stay(make):
    """In the wrapper of Alpaca an empty input would join them with those behind it."""
    task, example = Plain(), Example("1", {"query": "x y z w"}, "a")
    predictor = make(task, tokenizer=Breaks(), prompt_format="alpaca")
    window = len(predictor.prompt(example)) - 2 + len(predictor.answer("b b"))
    cut = dataclasses.replace(predictor, window=window, too_long="truncate")
    (fitted,) = cut.fitted([example])
    assert fitted.lost == 2
    text = prompts.ALPACA.replace("{instruction}", f"{task.system}\n\nz w")
    assert fitted.prompt == tuple(Breaks().encode(text))


def test_free_answers_are_drawn_and_stopped_as_told(make, variables, monkeypatch):
    """A stop string cuts the text; the options are those of `generate`."""
    seen = []

    def generate_as_told(*given, **more):
        seen.append(given[3])
        return generate(*given, **more)

    monkeypatch.setattr(predict, "generate", generate_as_told)
    example = Example("1", {"tokens": ("a", "b")}, ("O", "O"))
    said = "(a, O), (b, B-color) and more"
    free = make(QueryNer(), said, method="generate").predict(variables, [example])
    assert free[0].text == said and seen[0] == dataclasses.replace(seen[0], stop=(), top_k=0)
    told = {"sampling": Sampling(top_k=3, min_p=0.1, repetition_penalty=1.2), "stop": (" and",)}
    (cut,) = make(QueryNer(), said, method="generate", **told).predict(variables, [example])
    assert cut.text == "(a, O), (b, B-color)" and cut.value == ("O", "B-color")
    assert (seen[1].top_k, seen[1].min_p, seen[1].repetition_penalty) == (3, 0.1, 1.2)
    never = make(QueryNer(), said, method="generate", stop=("never",)).predict(variables, [example])
    assert never == free


@pytest.mark.parametrize("method", ["likelihood", "generate"])
def test_f35_answers_do_not_depend_on_order_or_batch(make, variables, method):
    task, examples = Esci(), examples_of(Esci())
    shown = task.load(SyntheticSource(0, Sizes(3, 3, 6)), "train")[:1]

    def ask(order, batch_size):
        predictor = make(task, "exact", method=method, batch_size=batch_size)
        predictor.tokenizer.decode = lambda ids: f"exact {list(ids)}"
        found = predictor.predict(variables, order, [shown] * len(order))
        return {e.id: (p.value, p.text, p.scores) for e, p in zip(order, found, strict=True)}

    one, other = ask(examples, 4), ask(examples[::-1], 1)
    for id, (value, text, scores) in one.items():
        assert other[id][:2] == (value, text)
        assert other[id][2] == pytest.approx(scores, rel=1e-5)


def test_auto_writes_where_there_are_no_labels_and_reads_what_was_written(make, variables):
    task, examples = QueryNer(), examples_of(QueryNer(), 2)
    said = task.answer(examples[0])
    right, other = make(task, said).predict(variables, examples)
    assert right.value == examples[0].target and right.text == said and right.scores == {}
    if len(examples[0].target) != len(examples[1].target):
        assert isinstance(other.value, Invalid)
    invalid, _ = make(task, "no idea").predict(variables, examples)
    assert isinstance(invalid.value, Invalid) and invalid.value.text == "no idea"


class Asked(Bytes):
    """Its prompts are the example's own input alone, which keeps them short."""

    def chat(self, messages):
        return messages[-1]["content"]


NASTY = [
    ["(a, O)", ","],
    [")", "<assistant>"],
    ["3\"x5'", "größe"],
    ["'", "e\u0301"],
    ["代替", "B-color"],
    ["a b", "x\u2028"],
]


def nasty(task):
    rows = [{"example_id": i, "tokens": one, "ner_tags": ["O", "O"]} for i, one in enumerate(NASTY)]
    return [task.example(Row(row, "here")) for row in rows]


def test_constrained_answers_can_always_be_read(make, variables):
    """One allowed tag for each token, in any order and batch, whatever the tokens hold."""
    task, examples = QueryNer(), nasty(QueryNer())
    predictor = make(task, tokenizer=Asked(), method="constrained", batch_size=3, max_new_tokens=1)
    done = []
    found = predictor.predict(variables, examples, on_done=done.append)
    for example, one in zip(examples, found, strict=True):
        tokens, tags = list(example.inputs["tokens"]), list(one.value)
        assert one.text == task.answer(Example("1", example.inputs, one.value))
        read = task.example(Row({"tokens": tokens, "ner_tags": tags}, "an I- continues a B-"))
        assert read.target == one.value
    assert sum(done) == len(examples) and len({one.value for one in found}) > 1
    assert predictor.predict(variables, examples[::-1])[::-1] == found


def test_a_constrained_label_is_decided_token_by_token(make, variables, tiny):
    """The likeliest of the tokens that go on as a label does: not always the likeliest label."""
    task, examples = Esci(), examples_of(Esci(), 3)
    predictor = make(task, tokenizer=Asked(), method="constrained")
    found = predictor.predict(variables, examples)
    for example, one in zip(examples, found, strict=True):
        prompt, written = predictor.prompt(example), ()
        labels = {predictor.answer(label): label for label in LABELS}
        while written not in labels:
            opened = [label for label in labels if label[: len(written)] == written]
            allowed = sorted({label[len(written)] for label in opened})
            tokens, length = np.zeros((1, 384), np.int32), len(prompt) + len(written)
            tokens[0, :length] = (*prompt, *written)
            logits = tiny.logits(tokens)[0, length - 1] if len(allowed) > 1 else np.zeros(61)
            written += (max(allowed, key=logits.__getitem__),)
        assert one.value == one.text == labels[written] and one.scores == {}


def test_room_for_the_longest_constrained_answer_of_each_example(make):
    """And not for that of another, or for max_new_tokens."""
    task = QueryNer()
    rows = [
        {"example_id": len(words), "tokens": words, "ner_tags": ["O"] * len(words)}
        for words in (["a" * 14], ["a", "a"])
    ]
    short, long = (task.example(Row(row, "here")) for row in rows)
    predictor = make(task, tokenizer=Asked(), method="constrained", max_new_tokens=9999)
    answer = len(predictor.answer("(a, B-core_product_type), (a, I-core_product_type)"))
    needed = len(predictor.prompt(long)) + answer
    tight = dataclasses.replace(predictor, window=needed)
    assert [each.lost for each in tight.fitted([short, long])] == [0, 0]
    tight = dataclasses.replace(predictor, window=needed - 1)
    assert [each.lost for each in tight.fitted([short])] == [0]
    with pytest.raises(UserError, match=rf"an answer of {answer} in .*queryner, example 2;"):
        tight.fitted([short, long])


def test_answers_without_a_form_are_not_constrained(make):
    message = r"without a form .*: task instruction; set its method to auto or generate"
    with pytest.raises(UserError, match=message):
        make(Instruction(), method="constrained")


def test_labels_can_be_written_too(make, variables):
    examples = examples_of(Esci(), 2)
    found = make(Esci(), "Substitute, I think", method="generate").predict(variables, examples)
    assert [p.value for p in found] == ["Substitute"] * 2


def test_there_is_no_likelihood_of_labels_that_are_none(make, variables):
    with pytest.raises(UserError, match=r"no closed set.*task queryner; set its method"):
        make(QueryNer(), method="likelihood").predict(variables, examples_of(QueryNer(), 1))


def test_a_prompt_too_long_for_the_window_is_told_not_cut(make, variables):
    for method in ("likelihood", "generate"):
        predictor = make(Esci(), window=40, method=method)
        with pytest.raises(UserError, match=r"window of 40: esci, example 2\d*; .*too_long"):
            predictor.predict(variables, examples_of(Esci(), 1))


@pytest.mark.parametrize("method", ["likelihood", "generate"])
def test_a_prompt_that_may_be_cut_loses_the_beginning_of_its_own_input(make, variables, method):
    """The instruction stays, and so does what the answer follows; other prompts do not matter."""
    examples = examples_of(Esci(), 3)
    whole = make(Esci(), method=method)
    prompts = [each.prompt for each in whole.fitted(examples)]
    longest = max(map(len, prompts))
    answer = 5 if method == "generate" else 2
    assert prompts == [whole.prompt(example) for example in examples]
    cut = make(Esci(), window=longest - 2 + answer, method=method, too_long="truncate")
    fitted = cut.fitted(examples)
    shared = len(Words().encode(f"<system> {Esci.system} <user>"))
    assert fitted == [cut.fitted([example])[0] for example in examples]
    for prompt, (found, gone, dropped, _) in zip(prompts, fitted, strict=True):
        assert gone == max(len(prompt) - (longest - 2), 0) and not dropped
        assert found == prompt[:shared] + prompt[shared + gone :]
    lost = [each.lost for each in fitted]
    assert [p.lost for p in cut.predict(variables, examples)] == lost and any(lost)
    with pytest.raises(UserError, match="leaves no room"):
        make(Esci(), window=shared + answer, method=method, too_long="truncate").fitted(examples)


def test_demonstrations_are_left_out_before_input_is_cut(make, variables):
    """The first shown go first, as many as are needed, prompt by prompt."""
    examples, train = examples_of(Esci(), 3), SyntheticSource(0, Sizes(3, 3, 6))
    shown = [Esci().load(train, "train")[:k] for k in (3, 0, 2)]
    whole = make(Esci())
    sizes = [len(whole.prompt(e, d[1:])) for e, d in zip(examples, shown, strict=True)]
    cut = make(Esci(), window=sizes[0] + 2, too_long="truncate")
    found = cut.predict(variables, examples, shown)
    assert found[0].dropped == 1 and found[1].dropped == 0 and not any(p.lost for p in found)
    for example, given, each in zip(examples, shown, cut.fitted(examples, shown), strict=True):
        assert each.prompt == whole.prompt(example, given[each.dropped :])
    small = make(Esci(), window=len(whole.prompt(examples[0])) + 1, too_long="truncate")
    (fitted,) = small.fitted(examples[:1], shown[:1])
    assert (fitted.lost, fitted.dropped) == (1, 3)
    with pytest.raises(UserError, match="use fewer demonstrations"):
        make(Esci(), window=sizes[0] + 2).fitted(examples, shown)


def test_special_tokens_spelt_in_a_query_are_plain_text_in_its_constrained_answer(make):
    task, words = QueryNer(), ("<assistant>", "red")
    example = Example("a", {"tokens": words, "query": " ".join(words)}, ("O", "O"))
    (automaton,) = make(task, method="constrained").automata([example])
    answer = task.answer(example)
    escaped = Words().escape(answer)
    assert escaped != answer
    assert automaton.text([*Words().encode(escaped), END]) == answer
    with pytest.raises(ValueError, match="no answer of the form"):
        automaton.text([*Words().encode(answer), END])


def test_no_text_of_a_row_can_end_a_turn(make):
    """Titles, demonstrations and answers with a special token spelt in them are plain text."""
    task = QueryNer()
    row = {"example_id": 1, "tokens": ["red", "<assistant>"], "ner_tags": ["B-color", "O"]}
    example = task.example(Row(row, "here"))
    predictor = make(task)
    turn = predictor.tokenizer.encode("<assistant>")[0]
    assert predictor.prompt(example, [example]).count(turn) == 2  # one for each turn
    (encoded,) = predictor.encode([example])
    assert encoded.tokens.count(turn) == 1


def test_every_example_by_its_own_adapter(tiny, make, variables):
    """Labels and written answers of a batch that uses two adapters are those of two runs."""
    adapters = []
    for seed in (1, 2):
        rules = [LoraRule(rank=seed + 1, alpha=8.0)]
        _, adapter = lora.init(tiny.params, tiny.axes, rules, jax.random.key(seed))
        drawn = jax.random.key(seed + 2)
        adapters.append(
            trees.map_leaves(
                lambda leaf, key=drawn: leaf.replace(b=jax.random.normal(key, leaf.b.shape)),
                adapter,
            )
        )
    predictor, examples = make(Esci()), examples_of(Esci())
    used = [0, 1, 1, 0, 1, 0]
    both = variables | {"lora": hold_together(adapters)}
    together = predictor.predict(both, examples, adapters=used)
    alone = [predictor.predict(variables | {"lora": one}, examples) for one in adapters]
    for i, number in enumerate(used):
        ours, expected = together[i].scores, alone[number][i].scores
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert ours != pytest.approx(alone[1 - number][i].scores, rel=1e-2)
