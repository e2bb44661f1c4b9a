"""SentencePiece models, trained here, against transformers and SentencePiece itself."""

import json

import pytest

from ecomjax.errors import UserError
from ecomjax.hf import sentencepiece
from ecomjax.hf.tokenizer import Tokenizer

LINES = [
    "Wireless Bluetooth headphones with noise cancelling, 30 hours battery",
    "Kabellose Bluetooth-Kopfhörer mit Geräuschunterdrückung, 30 Stunden Akku",
    "Größe 42 für Kinder, wasserdichte Schuhe aus Leder",
    "Chaussures imperméables en cuir pour enfants, taille 42",
    "Zapatos impermeables de cuero para niños, talla 42, color marrón",
    "子供用の防水革靴 サイズ42 ブラウン",
    "儿童防水皮鞋 42码 棕色",
    "حذاء جلدي مقاوم للماء للأطفال مقاس 42",
    "Водонепроницаемые кожаные ботинки для детей, размер 42",
    "the other shoe, the shoe rack and the shoe horn",
    "USB-C charging cable 2 m, fast charging 60 W, braided nylon",
]
PLAIN = [
    *LINES,
    "Größe 43 für Damen: Hausschuhe",
    "two  spaces inside ",
    "tabs\tand\nlines\r\n",
    "日本語の靴 👟👩‍👩‍👧 مرحبا",
    "it's 12,345.67 €/m² — 3×4 ﬁne ｆｕｌｌ",
    "e\u0301 \u00e9 \u2028 \x00 \ufeff x",
    "",
]
MARKED = [
    " leading",
    "   ",
    "▁ ▁x",
    "a</s>b <s> <unk> <pad> c",
    "word </s> word",
    "<extra_id_0> the <extra_id_1>shoe <extra_id_99>",
    "<start_of_turn>user <0x41>",
]
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 480,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}
T5 = {
    "model_type": "unigram",
    "vocab_size": 400,
    "hard_vocab_limit": False,
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
}
GEMMA = LLAMA | {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>"],
}
FAMILIES = {
    "T5Tokenizer": ("spiece.model", T5, {}),
    "LlamaTokenizer": ("tokenizer.model", LLAMA, {"add_bos_token": True}),
    "LlamaTokenizer, legacy": ("tokenizer.model", LLAMA, {"legacy": True}),
    "GemmaTokenizer": ("tokenizer.model", GEMMA, {"add_bos_token": True}),
}


def train(path, settings):
    """Some characters are left out of the pieces: they are unknown, or bytes."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_prefix=str(path.with_suffix("")),
        character_coverage=0.98,
        minloglevel=2,
        **settings,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A folder of a model file and the config beside it."""
    file, settings, fields = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    train(folder / file, settings)
    fields = {"tokenizer_class": request.param.partition(",")[0], **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    return getattr(transformers, fields["tokenizer_class"]).from_pretrained(folder)


def test_ids_and_text_are_those_of_transformers(folder, theirs):
    ours = Tokenizer.from_folder(folder)
    for text in PLAIN + MARKED:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_batch(PLAIN) == [ours.encode(text) for text in PLAIN]


def test_ids_are_those_of_the_model(folder):
    """For text that spells no special token and does not start with a space."""
    import sentencepiece as package

    model = package.SentencePieceProcessor(model_file=str(sentencepiece.find(folder)))
    ours = Tokenizer.from_folder(folder)
    for text in PLAIN:
        assert ours.encode(text) == model.encode(text)
    known = [text for text in LINES if model.unk_id() not in ours.encode(text)]
    assert known and [ours.decode(ours.encode(text)) for text in known] == known


def test_special_tokens_are_those_of_the_model(folder, theirs):
    ours = Tokenizer.from_folder(folder)
    assert ours.eos_id == theirs.eos_token_id
    t5 = theirs.__class__.__name__ == "T5Tokenizer"
    assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs) - (theirs.mask_token is not None)
    assert len(ours.special_ids) == (103 if t5 else 3 + (theirs.pad_token is not None))


def test_transformers_loads_what_we_save(folder, theirs, tmp_path):
    """With what it puts around texts."""
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_folder(folder)
    ours.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PLAIN + MARKED:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    assert Tokenizer.from_folder(tmp_path).fingerprint == ours.fingerprint


@pytest.fixture
def small(tmp_path):
    """A folder of nothing but a T5 model without sentinels."""
    train(tmp_path / "spiece.model", T5)
    return tmp_path


def write(folder, name, fields):
    (folder / name).write_text(json.dumps(fields))


def test_a_bare_file_names_its_tokens_itself(small):
    bare = Tokenizer.from_folder(small)
    assert (bare.pad_id, bare.eos_id, bare.special_ids) == (0, 1, {0, 1, 2})
    write(small, "config.json", {"model_type": "t5"})
    t5 = Tokenizer.from_folder(small)
    assert t5.vocab_size == bare.vocab_size + 100
    assert t5.encode("<extra_id_0>") == [t5.vocab_size - 1]
    write(small, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 3})
    assert Tokenizer.from_folder(small).vocab_size == bare.vocab_size + 3
    fields = {"eos_token": {"content": "<pad>"}, "tokenizer_class": "Other"}
    write(small, "tokenizer_config.json", fields)
    other = Tokenizer.from_folder(small)
    assert (other.eos_id, other.vocab_size) == (0, bare.vocab_size)


def test_added_tokens(small):
    size = Tokenizer.from_folder(small).vocab_size
    write(small, "added_tokens.json", {"<b>": size + 1})
    added = {str(size): {"content": "<a>", "special": True}, "1": {"content": "</s>"}}
    write(small, "tokenizer_config.json", {"added_tokens_decoder": added, "pad_token": "<a>"})
    ours = Tokenizer.from_folder(small)
    assert ours.encode("<a><b>") == [size, size + 1]
    assert ours.pad_id == size and ours.special_ids == {0, 1, 2, size}
    write(small, "added_tokens.json", {"<b>": size + 7})
    with pytest.raises(UserError, match=f"'<b>' has id {size + 7} where {size + 1} is next"):
        Tokenizer.from_folder(small)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xff", "unreadable tokenizer"), (b"", "the tokenizer has no pieces")],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "char"}, "model of kind CHAR"),
        ({"treat_whitespace_as_suffix": True}, "spaces after words"),
    ],
)
def test_kinds_that_are_not_built(tmp_path, changes, message):
    train(tmp_path / "spiece.model", T5 | changes)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_fast_tokenizer_comes_first(small, tokenizer):
    tokenizer.save(small)
    assert Tokenizer.from_folder(small).vocab_size == tokenizer.vocab_size
