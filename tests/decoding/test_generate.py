import dataclasses

import pytest

from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.errors import UserError

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
        assert result.log_probability == pytest.approx(sum(score[: cut + ended]), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_is_the_naive_loop(tiny, variables, prompts, naive, end, batch_size):
    """For prompts of mixed lengths in any batch, with answers that end first, later or never."""
    done = []
    options = GenerateOptions(NEW, end, batch_size)
    results = generate(tiny.model, variables, prompts, options, done.append)
    assert_naive(results, naive, end)
    assert results[0].tokens == () and results[0].ended
    assert {result.ended for result in results} == {True, False}
    assert sum(done) == len(prompts)


def test_the_common_prefix_changes_nothing(tiny, variables, prompts, naive, end):
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


def test_decoding_stops_when_all_rows_have_ended(tiny, variables, prompts, watched, naive):
    """And compiles nothing anew for other lengths of a bucket, prompts or seeds."""
    answers, _ = naive
    row = next(i for i, answer in enumerate(answers) if answer[2] not in answer[:2])
    options = GenerateOptions(NEW, answers[row][2], 3)
    model, count = watched(tiny.config)
    traced, runs = count(generate, model, variables, [prompts[row]] * 3, options)
    assert traced > 0
    assert runs == 3
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


def test_a_prompt_may_fill_the_window(tiny, variables, prompts, naive, end):
    """Longest prompt and answer together take the window to the last slot."""
    longest = max(map(len, prompts))
    options = GenerateOptions(NEW, end, 16, window=longest + NEW)
    assert_naive(generate(tiny.model, variables, prompts, options), naive, end)
    with pytest.raises(UserError, match="window"):
        narrow = dataclasses.replace(options, window=longest + NEW - 1)
        generate(tiny.model, variables, prompts, narrow)
