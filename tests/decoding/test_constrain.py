"""Constrained answers against a loop that runs the whole model at every token."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import sharding, trees
from ecomjax.adapters import lora
from ecomjax.adapters.routing import hold_together
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.forms import Edge, Form, one_of
from ecomjax.decoding import constrain
from ecomjax.decoding.automaton import from_form
from ecomjax.decoding.constrain import generate_constrained
from ecomjax.errors import UserError
from ecomjax.models import registry
from ecomjax.models.gpt2 import GPT2Config
from ecomjax.models.t5 import T5Config

END = 2
LETTERS = "abcdefghijklmnopqrstuvwxyzABIO(),- "
PAIRS = ("),", ", ", "(w", "B-")
IDS = {piece: 10 + i for i, piece in enumerate([*LETTERS, *PAIRS])}


def encode(texts):
    """A token for each letter, or for some pairs of them."""
    found = []
    for text in texts:
        ids, rest = [], text
        while rest:
            piece = rest[:2] if rest[:2] in PAIRS else rest[0]
            ids.append(IDS[piece])
            rest = rest[len(piece) :]
        found.append(ids)
    return found


def tagging(*words):
    """A tag for each word; an entity is gone on with only by its own type."""
    final, states = 3 * len(words) - 2, []
    for i, word in enumerate(words):
        following = [final] * 3 if i == len(words) - 1 else [3 * i + 1, 3 * i + 2, 3 * i + 3]
        rest = "" if i == len(words) - 1 else ", "
        if i > 0:
            for kind in (0, 1):
                inside = Edge(f"({word}, I-{'xy'[kind] * 4}){rest}", following[kind])
                states.append((Edge("", 3 * i), inside))
        tags = zip(("B-xxxx", "B-yyyy", "O"), following, strict=True)
        states.append(tuple(Edge(f"({word}, {tag}){rest}", target) for tag, target in tags))
    return Form((*states, ()))


FORMS = [
    tagging("white", "duvet", "a"),
    one_of(["exact", "exactly", "no"]),
    tagging("w", "verylongword"),
    one_of(["exact"]),
    tagging("w"),
    tagging("a", "b", "c"),
    one_of(["no", "nothing", "none"]),
    tagging("size", "of"),
]


@pytest.fixture(scope="module")
def automata():
    return [from_form(form, encode, END, "here") for form in FORMS]


def texts_of(form, state=0):
    if not form.states[state]:
        return [""]
    return [a + b for a, target in form.states[state] for b in texts_of(form, target)]


def make_gpt2():
    """Its positions end where the longest prompt and answer do; no weight is 0 or 1."""
    model = registry.build(GPT2Config(61, 24, 2, 3, 40, max_positions=88))
    shapes, rng = registry.describe(model)[0], np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32), shapes)
    return model, {"params": params}


@pytest.fixture(scope="module")
def answering(request, tiny, prompts):
    """A model, its variables, and naive answers to the prompts: tokens, score, decisions."""
    model, variables = tiny.model, {"params": tiny.params}
    if request.param == "gpt2":
        model, variables = make_gpt2()

    @jax.jit
    def logits(variables, tokens, length):
        positions = jnp.arange(88, dtype=jnp.int32)[None]
        segments = (positions < length).astype(jnp.int32)
        hidden, _ = model.apply(variables, tokens, positions, segments)
        return model.apply(variables, hidden, method="logits")[0, length - 1]

    answers = []
    for prompt, form in zip(prompts, FORMS, strict=True):
        whole = [(*ids, END) for ids in encode(texts_of(form))]
        answer, score, decisions = (), 0.0, 0
        while not answer or answer[-1] != END:
            opened = [one for one in whole if one[: len(answer)] == answer]
            allowed = sorted({one[len(answer)] for one in opened})
            tokens = np.zeros((1, 88), np.int32)
            tokens[0, : len(prompt) + len(answer)] = (*prompt, *answer)
            row = np.asarray(
                logits(variables, tokens, np.int32(len(prompt) + len(answer))), np.float64
            )
            row = row[allowed]
            answer += (allowed[int(row.argmax())],)
            score += row.max() - np.log(np.exp(row).sum())
            decisions += len(allowed) > 1
        assert answer in whole
        answers.append((answer[:-1], score, decisions))
    assert len({answer[:9] for answer, _, _ in answers}) > 5
    return model, variables, answers


def assert_naive(found, naive):
    for one, (tokens, score, decisions) in zip(found, naive, strict=True):
        assert one.tokens == tokens
        assert one.log_probability == pytest.approx(score, abs=1e-4)
        assert one.decisions == decisions
        assert one.forwards <= len(tokens) / 4 + 4


def assert_answers(answering, automata, prompts, batch_size):
    model, variables, naive = answering
    done = []
    options = {"batch_size": batch_size, "window": 88}
    found = generate_constrained(
        model, variables, prompts, automata, on_done=done.append, **options
    )
    assert_naive(found, naive)
    assert sum(done) == len(prompts)
    assert found[3].decisions == 0 and found[3].log_probability == 0.0 and found[3].forwards == 1
    found = generate_constrained(model, variables, prompts[::-1], automata[::-1], **options)
    assert_naive(found[::-1], naive)


@pytest.mark.parametrize("answering", ["llama", "gpt2"], indirect=True)
def test_answers_are_those_of_the_naive_loop(answering, automata, prompts):
    """For prompts of mixed lengths and forms, in any order."""
    assert_answers(answering, automata, prompts, 3)


@pytest.mark.parametrize("answering", ["llama"], indirect=True)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_any_batch_gives_the_same_answers(answering, automata, prompts, batch_size):
    assert_answers(answering, automata, prompts, batch_size)


@pytest.mark.parametrize("answering", ["llama"], indirect=True)
def test_answers_that_outgrow_their_slots_are_the_same(answering, automata, prompts, monkeypatch):
    asked = []
    monkeypatch.setattr(constrain, "FIRST_SLOTS", 1)
    with_slots = constrain.with_slots

    def counted(held, more):
        asked.append(more)
        return with_slots(held, more)

    monkeypatch.setattr(constrain, "with_slots", counted)
    assert_answers(answering, automata, prompts, 8)
    assert len(set(asked)) > 2


ENDS_AT_ONCE = one_of(["exact"])
GO_ON = [tagging("white", "duvet", "a"), tagging("size", "of"), tagging("a", "b", "c")]


@pytest.mark.parametrize(
    ("rows", "fewest", "mesh"),
    [(8, 4, {}), (16, 4, {"data": 2, "tensor": 4}), (16, 1, {"data": 4, "tensor": 2})],
)
@pytest.mark.parametrize("going_on", [0, 4, 7])
def test_rows_that_end_early_are_left_behind(
    tiny, variables, monkeypatch, rows, fewest, mesh, going_on
):
    """Some of them with their first decision; each answer is that to its prompt alone."""
    forms = [*(GO_ON[i % 3] for i in range(going_on)), *[ENDS_AT_ONCE] * (rows - going_on)]
    automata = [from_form(form, encode, END, "here") for form in forms]
    prompts = [[3 + i, 7, 5 + i % 4] for i in range(rows)]
    asked = tiny.model, variables, prompts, automata
    alone = generate_constrained(*asked, batch_size=1, window=88)
    assert sum(one.forwards > 1 for one in alone) == going_on
    counts, rows_kept = [rows], constrain._rows_kept

    def watched(*given):
        counts.append(len(given[-1]))
        return rows_kept(*given)

    monkeypatch.setattr(constrain, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(constrain, "_rows_kept", watched)
    with sharding.use(sharding.make_mesh(**mesh)) if mesh else contextlib.nullcontext():
        together = generate_constrained(*asked, batch_size=rows, window=88)
    for one, other in zip(together, alone, strict=True):
        assert (one.tokens, one.decisions) == (other.tokens, other.decisions)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    assert counts == sorted(set(counts), reverse=True)
    if 0 < going_on <= rows // 2:
        assert len(counts) > 1 and max(going_on, fewest) <= counts[1] <= rows // 2
    parts = mesh.get("data", 1)
    assert all(count % parts == 0 for count in counts)


@pytest.mark.parametrize("answering", ["llama"], indirect=True)
def test_the_common_prefix_changes_nothing(answering, automata, prompts):
    """Beside a prompt that shares no token with the rest."""
    model, variables, naive = answering
    found = generate_constrained(
        model, variables, [*prompts, [3]], [*automata, automata[0]], batch_size=8, window=88
    )
    assert_naive(found[:-1], naive)


def test_a_window_may_be_filled(automata):
    """With the longest answer that the form allows; behind it the table of positions ends."""
    model, variables = make_gpt2()
    longest = automata[0].longest
    prompt = [(7 * i) % 61 for i in range(88 - longest)]
    options = {"batch_size": 1, "window": 88}
    (found,) = generate_constrained(model, variables, [prompt], automata[:1], **options)
    assert np.isfinite(found.log_probability) and found.log_probability < 0
    with pytest.raises(UserError, match=rf"up to {longest} exceed the window of 88: prompt 1"):
        generate_constrained(model, variables, [prompt, [1, *prompt]], automata[:1] * 2, **options)


def test_a_forward_for_each_state_and_nothing_compiled_anew(tiny, variables, watched, prompts):
    """However long prompts, words and answers are in their buckets."""
    forms = [tagging("white", "duvet"), tagging("a", "size"), tagging("longer", "word")]
    automata = [from_form(form, encode, END, "here") for form in forms]
    model, count = watched(tiny.config)
    results = []

    def run(prompts, automata):
        found = generate_constrained(model, variables, prompts, automata, batch_size=2, window=99)
        results.append(found)

    traced, runs = count(run, prompts[:2], automata[:2])
    assert traced > 0
    assert runs == max(one.forwards for one in results[0])
    assert runs < max(len(one.tokens) for one in results[0]) / 3
    traced, _ = count(run, [[1, 2], [1, 3, 4, 5, 6], [1] * 9], [automata[2], *automata[:2]])
    assert traced == 0


def test_every_prompt_as_with_its_adapter_alone(tiny, prompts, automata):
    adapters, rng = [], np.random.default_rng(0)
    for seed in (1, 2):
        rules = [LoraRule(rank=2, alpha=8.0)]
        _, adapter = lora.init(tiny.params, tiny.axes, rules, jax.random.key(seed))

        def drawn(leaf):
            return leaf.replace(b=rng.standard_normal(leaf.b.shape, np.float32))

        adapters.append(trees.map_leaves(drawn, adapter))
    own = [0, 1, 1, 0, 1, 0, 0, 1]

    def answer(adapter, chosen=None):
        variables = {"params": tiny.params, "lora": adapter}
        options = {"batch_size": 8, "window": 88, "adapters": chosen}
        found = generate_constrained(tiny.model, variables, prompts, automata, **options)
        return [(one.tokens, pytest.approx(one.log_probability, abs=1e-4)) for one in found]

    alone = [answer(adapter) for adapter in adapters]
    assert alone[0] != alone[1]
    together = answer(hold_together(adapters), own)
    assert together == [alone[number][prompt] for prompt, number in enumerate(own)]
    with pytest.raises(UserError, match="adapter 2 of 2"):
        answer(hold_together(adapters), [2] * 8)


def test_refusals(tiny, variables, automata):
    options = {"batch_size": 2, "window": 88}
    assert generate_constrained(tiny.model, variables, [], [], **options) == []
    with pytest.raises(UserError, match="empty prompt: prompt 1"):
        generate_constrained(tiny.model, variables, [[1], []], automata[:2], **options)
    t5 = registry.build(T5Config(61, 16, 2, 2, 2, 8, 20))
    with pytest.raises(UserError, match="encoder-decoder cannot be constrained"):
        generate_constrained(t5, variables, [[1]], automata[:1], **options)
