import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.errors import UserError
from ecomjax.models import registry
from ecomjax.models.bart import BartConfig
from ecomjax.models.t5 import T5Config

NEW = 6


@pytest.fixture(scope="module")
def naive(prompts, log_probabilities):
    """Greedy answers of NEW tokens and their log-probabilities, by a full forward a token."""
    answers, scores = [[] for _ in prompts], [[] for _ in prompts]
    for _ in range(NEW):
        sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
        table = log_probabilities(sequences)
        for row, sequence in enumerate(sequences):
            last = table[row, len(sequence) - 1]
            answers[row].append(int(last.argmax()))
            scores[row].append(last.max())
    return answers, scores


@pytest.fixture(scope="module")
def end(naive):
    """The token that prompt 0 answers with first: its answer is empty."""
    answers, _ = naive
    assert any(answers[0][0] not in answer for answer in answers)
    return answers[0][0]


def assert_naive(results, naive, end):
    answers, scores = naive
    for result, answer, score in zip(results, answers, scores, strict=True):
        ended = end in answer
        cut = answer.index(end) if ended else NEW
        assert result.tokens == tuple(answer[:cut])
        assert result.ended == ended
        assert result.log_probabilities == pytest.approx(score[: cut + ended], abs=3e-4)
        assert result.log_probability == pytest.approx(sum(score[: cut + ended]), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_f37_greedy_is_the_naive_loop(tiny, variables, prompts, naive, end, batch_size):
    """For prompts of mixed lengths in any batch, with answers that end first, later or never."""
    done = []
    options = GenerateOptions(NEW, end, batch_size)
    results = generate(tiny.model, variables, prompts, options, done.append)
    assert_naive(results, naive, end)
    assert results[0].tokens == () and results[0].ended
    assert {result.ended for result in results} == {True, False}
    assert sum(done) == len(prompts)


def test_f37_the_common_prefix_changes_nothing(tiny, variables, prompts, naive, end):
    """Beside prompts that share no token with the rest: of one token, and of another bucket."""
    options = GenerateOptions(NEW, end, len(prompts) + 2)
    results = generate(tiny.model, variables, [*prompts, [3], [4] * 40], options)
    assert_naive(results[:-2], naive, end)


def test_draws_depend_on_seed_and_place_alone(tiny, variables, prompts):
    options = GenerateOptions(NEW, 0, 8, temperature=50.0, top_p=0.9)

    def draw(chosen=prompts, **changes):
        return generate(tiny.model, variables, chosen, dataclasses.replace(options, **changes))

    def tokens(results):
        return [result.tokens for result in results]

    first = draw()
    long = [result.tokens for result in first if len(result.tokens) == NEW]
    assert long and all(len(set(answer)) > 2 for answer in long), "every step draws anew"
    assert tokens(draw()) == tokens(first)
    assert tokens(draw(batch_size=3)) == tokens(first)
    assert tokens(draw(prompts[:3], batch_size=3)) == tokens(first[:3])
    other = draw(seed=1)
    assert tokens(other) != tokens(first)
    same = tokens(draw([prompts[0]] * 8))
    assert len(set(same)) > 1


def test_any_of_several_tokens_ends_an_answer(tiny, variables, prompts, naive):
    answers, scores = naive
    ends = (answers[0][0], answers[1][2], answers[2][1])
    options = GenerateOptions(NEW, ends[0], 3, stop_ids=ends[1:])
    results = generate(tiny.model, variables, prompts, options)
    for result, answer, score in zip(results, answers, scores, strict=True):
        cut = min((answer.index(end) for end in ends if end in answer), default=NEW)
        assert result.tokens == tuple(answer[:cut]) and result.ended == (cut < NEW)
        assert result.log_probabilities == pytest.approx(score[: cut + 1], abs=1e-4)
    assert len({len(result.tokens) for result in results}) > 2


def digits(ids):
    """A text of two digits a token."""
    return "".join(f"{i:02d}" for i in ids)


def test_f37_stop_strings_cut_the_text(tiny, variables, prompts, naive):
    """Inside of a token or between two, in any batch; one that never appears does no harm."""
    answers, scores = naive
    texts = [digits(answer) for answer in answers]
    stops = (texts[0][3:6], texts[1][5:9], "never")
    options = GenerateOptions(NEW, 61, 3, stop=stops)
    for batch_size in (1, 3, 8):
        options = dataclasses.replace(options, batch_size=batch_size)
        results = generate(tiny.model, variables, prompts, options, decode=digits)
        for result, answer, text, score in zip(results, answers, texts, scores, strict=True):
            start = min((text.index(stop) for stop in stops if stop in text), default=2 * NEW)
            assert result.text == text[:start] and result.ended == (start < 2 * NEW)
            assert result.tokens == tuple(answer[: start // 2])
            assert result.log_probabilities == pytest.approx(score[: start // 2 + 1], abs=1e-4)
    never = dataclasses.replace(options, stop=("never",))
    results = generate(tiny.model, variables, prompts, never, decode=digits)
    assert [result.text for result in results] == texts


def test_samples_of_a_prompt(tiny, variables, prompts):
    """Each with draws of its own, which further samples, prompts or batches do not change."""
    options = GenerateOptions(NEW, 0, 8, temperature=2.0)

    def draw(chosen=prompts, **changes):
        done = []
        changed = dataclasses.replace(options, **changes)
        results = generate(tiny.model, variables, chosen, changed, done.append)
        assert sum(done) == len(chosen)
        return [result.tokens for result in results]

    many = draw(samples=3)
    assert draw() == many[::3]
    assert draw(prompts[:3], samples=2, batch_size=3) == [
        answer for i in (0, 3, 6) for answer in many[i : i + 2]
    ]
    assert all(len(set(many[i : i + 3])) == 3 for i in range(0, len(many), 3))


def test_log_probabilities_are_those_of_scoring_the_answer(tiny, variables, prompts):
    """However it was drawn: by the model alone, at temperature 1."""
    end = 3
    options = GenerateOptions(
        NEW, end, 3, temperature=1.5, top_k=40, min_p=0.01, repetition_penalty=1.3
    )
    results = generate(tiny.model, variables, prompts[:4], options)
    for prompt, result in zip(prompts, results, strict=False):
        answer = [*result.tokens, *[end] * result.ended]
        [[expected]] = label_log_likelihoods(
            tiny.model, variables, [prompt], [answer], batch_size=1, window=64
        )
        assert len(result.log_probabilities) == len(answer)
        assert result.log_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("penalty", [1.7, 0.5])
def test_a_repetition_penalty_is_of_the_prompt_and_of_what_was_drawn(
    tiny, variables, prompts, penalty
):
    """Tokens that all prompts open with are of each prompt; the answer is the naive loop's."""
    options = GenerateOptions(NEW, 60, batch_size=3, repetition_penalty=penalty)
    found = [r.tokens for r in generate(tiny.model, variables, prompts, options)]
    answers = [[] for _ in prompts]
    for _ in range(NEW):
        sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
        padded = np.zeros((len(prompts), 64), np.int32)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = sequence
        table = tiny.logits(padded)
        for row, sequence in enumerate(sequences):
            logits = table[row, len(sequence) - 1].copy()
            seen = np.unique(sequence)
            logits[seen] = np.where(logits < 0, logits * penalty, logits / penalty)[seen]
            answers[row].append(int(logits.argmax()))
    assert found == [tuple(a[: a.index(60)] if 60 in a else a) for a in answers]
    plain = generate(
        tiny.model, variables, prompts, dataclasses.replace(options, repetition_penalty=1.0)
    )
    assert found != [r.tokens for r in plain]


def test_f37_decoding_stops_when_all_rows_have_ended(tiny, variables, prompts, watched, naive):
    """And compiles nothing anew for other lengths of a bucket, prompts or seeds."""
    answers, _ = naive
    row = next(i for i, answer in enumerate(answers) if answer[2] not in answer[:2])
    options = GenerateOptions(NEW, answers[row][2], 3)
    model, count = watched(tiny.config)
    traced, runs = count(generate, model, variables, [prompts[row]] * 3, options)
    assert traced > 0
    # A row at a time is filled in, which draws its first token; two steps are of all rows.
    assert runs == 3 + 2
    others = [[1, 2], [1, 3, 4], [1, 5, 6, 7, 8], [1, 9]]
    changed = dataclasses.replace(options, seed=3, window=99)
    traced, _ = count(generate, model, variables, others, changed)
    assert traced == 0


def test_refusals(tiny, variables):
    def run(prompts, **options):
        options = {"max_new_tokens": 4, "end": 0, "window": 10} | options
        return generate(tiny.model, variables, prompts, GenerateOptions(**options))

    assert run([]) == []
    with pytest.raises(UserError, match="empty prompt: prompt 1"):
        run([[1], []])
    with pytest.raises(UserError, match=r"7 tokens and 4 new ones .* window of 10: prompt 1"):
        run([[1] * 6, [1] * 7])
    with pytest.raises(UserError, match="max_new_tokens 0"):
        run([[1]], max_new_tokens=0)
    with pytest.raises(UserError, match="temperature -1"):
        run([[1]], temperature=-1.0)
    with pytest.raises(UserError, match="samples 0"):
        run([[1]], samples=0)
    with pytest.raises(UserError, match="3 greedy answers, all the same"):
        run([[1]], samples=3)
    with pytest.raises(UserError, match="batch_size 0"):
        run([[1]], batch_size=0)
    with pytest.raises(UserError, match="1 numbers, 2 prompts"):
        generate(tiny.model, variables, [[1], [2]], GenerateOptions(4, 0), numbers=[7])
    with pytest.raises(UserError, match=r"stop strings \[''\]: decoding; leave the empty out"):
        run([[1]], stop=("",))
    with pytest.raises(UserError, match=r"stop strings \['end'\] but no decoder"):
        run([[1]], stop=("end",))


def test_f37_a_prompt_may_fill_the_window(tiny, variables, prompts, naive, end):
    """Longest prompt and answer together take the window to the last slot."""
    longest = max(map(len, prompts))
    options = GenerateOptions(NEW, end, 16, window=longest + NEW)
    assert_naive(generate(tiny.model, variables, prompts, options), naive, end)
    with pytest.raises(UserError, match="window"):
        narrow = dataclasses.replace(options, window=longest + NEW - 1)
        generate(tiny.model, variables, prompts, narrow)


ENCODER_DECODERS = {
    "t5": T5Config(61, 16, 2, 2, 3, 8, 20, tied_embeddings=False, start=(5,)),
    "bart": BartConfig(61, 16, 2, 2, 2, 4, 20, 28, max_positions=21, start=(2, 9)),
}


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def answering(request, prompts):
    """An encoder-decoder, its variables, start, and naive answers to the prompts.

    Its weights are large beside its biases, so that sources and drawn tokens matter.
    """
    config = ENCODER_DECODERS[request.param]
    model = registry.build(config)
    shapes, rng = registry.describe(model)[0], np.random.default_rng(0)
    drawn = {
        path: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.1 ** ("bias" in path))
        for path, leaf in trees.flatten(shapes).items()
    }
    params = jax.tree.map(jnp.asarray, trees.unflatten(drawn))

    @jax.jit
    def log_probabilities(source, length, target):
        at = jnp.arange(32, dtype=jnp.int32)[None]
        live = (at < length).astype(jnp.int32)
        positions = jnp.arange(target.shape[1], dtype=jnp.int32)[None]
        variables = {"params": params}
        memory = model.apply(variables, source, jnp.minimum(at, 20), live, method="remember")
        hidden, _ = model.apply(variables, target, positions, jnp.ones_like(target), None, memory)
        return jax.nn.log_softmax(model.apply(variables, hidden, method="logits"), axis=-1)

    answers, scores = [], []
    for prompt in prompts:
        source = np.zeros((1, 32), np.int32)
        source[0, : len(prompt)] = prompt
        target, first = np.zeros((1, NEW + 2), np.int32), len(config.start)
        target[0, :first] = config.start
        score = []
        for t in range(first, first + NEW):
            row = log_probabilities(source, len(prompt), target)[0, t - 1]
            score.append(float(row.max()))
            target[0, t : t + 1] = int(row.argmax())
        answers.append(target[0, first : first + NEW].tolist())
        scores.append(score)
    return model, {"params": params}, config.start, (answers, scores)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_answers_to_sources_are_the_naive_loop(answering, prompts, batch_size):
    """For sources of mixed lengths in any batch, some of whose answers end."""
    model, variables, start, naive = answering
    assert len({tuple(answer) for answer in naive[0]}) > 3
    end = naive[0][0][2]
    options = GenerateOptions(NEW, end, batch_size, window=21, start=start)
    results = generate(model, variables, prompts, options)
    assert_naive(results, naive, end)
    assert {result.ended for result in results} == {True, False}


def test_draws_of_answers_to_sources(answering, prompts):
    """Depend on the seed and the source's place alone."""
    model, variables, start, _ = answering
    options = GenerateOptions(NEW, 0, 8, temperature=50.0, start=start)

    def draw(chosen=prompts, **changes):
        results = generate(model, variables, chosen, dataclasses.replace(options, **changes))
        return [result.tokens for result in results]

    first = draw()
    assert draw(batch_size=3) == first and draw(prompts[:3]) == first[:3]
    assert draw(seed=1) != first


def test_sources_and_answers_have_a_window_each(answering, tiny, variables):
    model, own, start, _ = answering
    options = GenerateOptions(4, 0, window=6, start=start)
    assert len(generate(model, own, [[1] * 6], options)) == 1
    with pytest.raises(UserError, match=r"7 tokens and 4 new ones .* window of 6: prompt 0"):
        generate(model, own, [[1] * 7], options)
    with pytest.raises(UserError, match=r"1 tokens and 6 new ones .* window of 6: prompt 0"):
        generate(model, own, [[1]], dataclasses.replace(options, max_new_tokens=6))
    with pytest.raises(UserError, match=r"start with the tokens \[\]"):
        generate(model, own, [[1]], dataclasses.replace(options, start=()))
    with pytest.raises(UserError, match="and to no other model"):
        generate(tiny.model, variables, [[1]], options)
