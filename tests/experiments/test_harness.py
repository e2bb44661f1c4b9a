"""lm-eval over our models gives what we give."""

import json
import warnings

import numpy as np
import pytest

from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval.evaluator", reason="needs the extra lm-eval")

QUESTIONS = ["white duvet", "a size of cotton", "red shoe for men", "lamp", "blue socks 3 pack"]
LABELS = [" exact match", " substitute", " no"]


@pytest.fixture(scope="module")
def model(tiny_base):
    from ecomjax.experiments.harness import load

    return load(str(tiny_base), batch_size=4)


class Asked:
    def __init__(self, *args):
        self.args = args


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_lm_eval_agrees_with_our_label_likelihood(model, tmp_path):
    """Row by row and label by label, in a task read from a file."""
    from lm_eval.api.task import ConfigurableTask

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": q, "label": 1}) + "\n" for q in QUESTIONS))
    task = ConfigurableTask(
        config={
            "task": "relevance",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Query: {{q}}\nAnswer:",
            "doc_to_choice": LABELS,
            "doc_to_target": "label",
            "target_delimiter": "",
        }
    )
    found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    encode = model.encoder.encode
    prompts = [encode(f"Query: {q}\nAnswer:") for q in QUESTIONS]
    expected = label_log_likelihoods(
        model.model,
        model.variables,
        prompts,
        [encode(label) for label in LABELS],
        batch_size=4,
        window=model.window,
    )
    samples = sorted(found["samples"]["relevance"], key=lambda one: one["doc_id"])
    scores = [[float(answer[0]) for answer in one["filtered_resps"]] for one in samples]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    right = np.mean(expected.argmax(axis=1) == 1)
    assert found["results"]["relevance"]["acc,none"] == pytest.approx(right)


def test_blanks_at_the_end_of_a_context_go_to_the_continuation(model):
    moved, plain = model.loglikelihood([Asked("white ", "duvet"), Asked("white", " duvet")])
    assert moved == plain


def test_a_continuation_is_greedy_where_the_model_would_write_it(model):
    (text,) = model.generate_until([Asked("white duvet", {"max_gen_toks": 3})])
    context = model.encoder.encode("white duvet")
    written = model._greedy([(tuple(context), (0, 0, 0))])[tuple(context)]
    assert model.encoder.decode(written) == text
    other = (*written[:-1], (written[-1] + 1) % 600)
    asked = [(None, context, list(own)) for own in (written, written[:1], other)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(asked)] == [True, True, False]


def test_a_text_is_scored_token_by_token(model):
    text = "red shoe for men"
    tokens = model.encoder.encode(text)
    (found,) = model.loglikelihood_rolling([Asked(text)])
    assert len(tokens) > 4
    whole = model._sums([((model.eot_token_id,), tuple(tokens))])
    assert found == pytest.approx(*whole.values(), abs=1e-4)


def test_unknown_generation_options(model):
    with pytest.raises(UserError, match="unknown generation options beams"):
        model.generate_until([Asked("a", {"beams": 3})])
