import dataclasses

import numpy as np
import pytest

from ecomjax.decoding.beam import BeamOptions, beam_search
from ecomjax.decoding.generate import GenerateOptions, generate, until
from ecomjax.errors import UserError
from ecomjax.hf import llama

NEW = 6
BEAMS = 4
PENALTIES = (-1.0, 0.0, 0.8, 3.0)


@pytest.fixture(scope="module")
def following(log_probabilities):
    """Function of sequences -> log p of what may come next [n, V]; each is computed once."""
    known = {}

    def run(sequences):
        new = [s for s in map(tuple, sequences) if s not in known]
        for first in range(0, len(new), 8):
            some = new[first : first + 8]
            table = log_probabilities(some + [(0,)] * (8 - len(some)))
            known.update((s, table[row, len(s) - 1]) for row, s in enumerate(some))
        return np.stack([known[tuple(s)] for s in sequences])

    return run


@pytest.fixture(scope="module")
def naive(following):
    """Function (prompt, options) -> (tokens, score, forwards), kept in lists and sorted."""

    def search(prompt, options):
        running, finished, beams = [((), 0.0)], [], options.beams
        for length in range(1, options.max_new_tokens + 1):
            table = following([(*prompt, *answer) for answer, _ in running])
            candidates = [
                ((*answer, token), total + more)
                for (answer, total), row in zip(running, table, strict=True)
                for token, more in enumerate(row)
            ]
            candidates.sort(key=lambda x: -x[1])
            weight, last = length**-options.length_penalty, length == options.max_new_tokens
            finished += [
                (answer, total * weight)
                for answer, total in candidates[:beams]
                if last or answer[-1] == options.end
            ]
            finished = sorted(finished, key=lambda x: -x[1])[:beams]
            running = [x for x in candidates[: 2 * beams] if x[0][-1] != options.end][:beams]
            if len(finished) == beams and running[0][1] * weight <= finished[-1][1]:
                break
        return *finished[0], length

    return search


@pytest.fixture(scope="module")
def ends(tiny, variables, prompts):
    """Tokens that end answers early, late and hardly ever."""
    free = beam_search(tiny.model, variables, prompts, BeamOptions(NEW, 60, beams=BEAMS))
    answers = [result.tokens for result in free]
    return answers[0][0], answers[1][3], 60


def assert_found(results, expected, options):
    for result, (answer, score, _) in zip(results, expected, strict=True):
        assert (result.tokens, result.ended) == until((options.end,), answer)
        assert result.score == pytest.approx(score, rel=1e-4)
        total = score * len(answer) ** options.length_penalty
        assert result.log_probability == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_f37_search_is_the_naive_one(tiny, variables, prompts, naive, ends, penalty):
    """For answers that end first, later or never, and some that no greedy choice leads to."""
    lengths, greedy = set(), 0
    for end in ends:
        options = BeamOptions(NEW, end, beams=BEAMS, length_penalty=penalty)
        results = beam_search(tiny.model, variables, prompts, options)
        assert_found(results, [naive(prompt, options) for prompt in prompts], options)
        lengths |= {len(result.tokens) for result in results}
        single = [naive(prompt, dataclasses.replace(options, beams=1)) for prompt in prompts]
        greedy += sum(
            result.tokens == until((end,), answer)[0]
            for result, (answer, *_) in zip(results, single, strict=True)
        )
    assert len(lengths) > 2 or penalty == 3.0
    assert greedy < len(ends) * len(prompts)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_beam_is_greedy(tiny, variables, prompts, ends, penalty):
    for end in ends:
        options = BeamOptions(NEW, end, beams=1, length_penalty=penalty)
        found = beam_search(tiny.model, variables, prompts, options)
        drawn = generate(tiny.model, variables, prompts, GenerateOptions(NEW, end))
        for ours, theirs in zip(found, drawn, strict=True):
            assert (ours.tokens, ours.ended) == (theirs.tokens, theirs.ended)
            assert ours.log_probability == pytest.approx(theirs.log_probability, rel=1e-4)


def test_as_many_beams_as_tokens_find_the_best_of_all(tiny, variables, prompts, following, ends):
    """Of all answers of two tokens."""
    vocabulary, end = tiny.config.vocab_size, ends[1]
    options = BeamOptions(2, end, beams=vocabulary, length_penalty=0.5)
    results = beam_search(tiny.model, variables, prompts[:2], options)
    for prompt, result in zip(prompts[:2], results, strict=True):
        first = following([prompt])[0]
        second = following([[*prompt, token] for token in range(vocabulary)])
        scores = (first[:, None] + second) * 2**-0.5
        scores[end] = first[end]
        assert result.score == pytest.approx(scores.max(), rel=1e-4)
        best = divmod(int(scores.argmax()), vocabulary)
        assert result.tokens == until((end,), best)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_depend_on_no_neighbour(tiny, variables, prompts, ends, batch_size):
    """Nor on what all prompts open with: one of another bucket shares nothing with the rest."""
    options = BeamOptions(NEW, ends[0], beams=BEAMS)
    expected = beam_search(tiny.model, variables, prompts, options)
    done = []
    options = dataclasses.replace(options, batch_size=batch_size)
    results = beam_search(tiny.model, variables, [*prompts, [4] * 40], options, done.append)
    for result, other in zip(results[:-1], expected, strict=True):
        assert (result.tokens, result.ended) == (other.tokens, other.ended)
        assert result.score == pytest.approx(other.score, rel=1e-4)
    assert sum(done) == len(prompts) + 1


def test_f37_the_search_stops_when_nothing_can_improve(
    tiny, variables, prompts, watched, naive, ends
):
    """And compiles nothing anew for other prompts of a bucket."""
    model, count = watched(tiny.config)
    options = BeamOptions(NEW, ends[0], beams=2, length_penalty=0.0)
    forwards = [naive(prompt, options)[2] for prompt in prompts]
    row = int(np.argmin(forwards))
    assert forwards[row] < NEW
    traced, runs = count(beam_search, model, variables, [prompts[row]] * 3, options)
    assert traced > 0 and runs == forwards[row]
    options = dataclasses.replace(options, batch_size=3, window=99)
    others = [[1, 2], [1, 3, 4], [1, 5, 6, 7, 8], [1, 9]]
    traced, _ = count(beam_search, model, variables, others, options)
    assert traced == 0


def test_refusals(tiny, variables):
    assert beam_search(tiny.model, variables, [], BeamOptions(2, 0)) == []
    with pytest.raises(UserError, match="beams 0"):
        BeamOptions(2, 0, beams=0)
    with pytest.raises(UserError, match="max_new_tokens 0"):
        BeamOptions(0, 0)
    with pytest.raises(UserError, match=r"window of 3: prompt 1"):
        beam_search(tiny.model, variables, [[1], [1, 2]], BeamOptions(2, 0, window=3))


@pytest.fixture(scope="module")
def theirs(tiny):
    """The same model in transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**llama.config_to_hf(tiny.config))
    )
    tensors = llama.rule_table(tiny.config).export_tensors(tiny.params)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors})
    return model.eval()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_search_is_that_of_transformers(tiny, variables, prompts, theirs, ends, penalty):
    import torch

    widest = max(map(len, prompts))
    padded = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for end in ends:
        output = theirs.generate(
            padded,
            attention_mask=mask,
            num_beams=BEAMS,
            do_sample=False,
            early_stopping=False,
            length_penalty=penalty,
            max_new_tokens=NEW,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        options = BeamOptions(NEW, end, beams=BEAMS, length_penalty=penalty)
        results = beam_search(tiny.model, variables, prompts, options)
        for row, result in enumerate(results):
            answer = output.sequences[row, widest:].tolist()
            assert (result.tokens, result.ended) == until((end,), answer)
            assert result.score == pytest.approx(float(output.sequences_scores[row]), rel=1e-4)
