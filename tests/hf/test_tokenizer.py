"""The tokenizer wrapper against transformers, from folders and from GGUF metadata."""

import json

import pytest
import tokenizers

from ecomjax.errors import UserError
from ecomjax.hf.tokenizer import Tokenizer, check_vocabulary

TEXTS = [
    "the other shoe",
    "Größe 42 für Kinder",
    "  spaces\t\n\n and\r\nlines ",
    "日本語の靴 👟👩‍👩‍👧 مرحبا",
    "it's 12,345.67 €/m² — 3×4",
    "a<|im_end|>b <|im_start|> <|endoftext|>",
    "",
    "e\u0301 \u00e9 \u2028 \x00 \ufeff",
]
MESSAGES = [{"role": "user", "content": "the shoe"}, {"role": "assistant", "content": "ja"}]


@pytest.fixture
def fast(backend):
    """The same tokenizer in transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_ids_and_text_are_those_of_transformers(tokenizer, fast):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == fast(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == fast.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_pieces_spell_the_texts_that_they_are_tokens_of(tokenizer):
    pieces = tokenizer.pieces()
    for text in TEXTS:
        plain = tokenizer.escape(text)
        assert b"".join(pieces[i] for i in tokenizer.encode(plain)) == plain.encode()
    assert {i for i, piece in enumerate(pieces) if piece is None} == tokenizer.special_ids


def test_pieces_are_those_of_byte_level_tokenizers_alone(backend):
    backend.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(UserError, match="not byte-level"):
        Tokenizer(backend, {}, None, "test").pieces()


def test_decode_leaves_out_special_tokens(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "ab"


def test_special_ids(tokenizer):
    assert tokenizer.vocab_size == 264
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.pad_id == 0


def test_eos_is_what_the_template_ends_a_turn_with(tokenizer, backend):
    """Though the config calls another token eos."""
    assert tokenizer.eos_id == 2
    plain = Tokenizer(backend, {"eos_token": "<|endoftext|>"}, None, "test")
    assert plain.eos_id == 0 and plain.pad_id == 0


def test_chat(tokenizer):
    assert tokenizer.chat(MESSAGES[:1]) == (
        "<|im_start|>user\nthe shoe<|im_end|>\n<|im_start|>assistant\n"
    )
    full = tokenizer.chat(MESSAGES, add_generation_prompt=False)
    assert full.endswith("assistant\nja<|im_end|>\n")


def test_chat_needs_a_template(backend):
    plain = Tokenizer(backend, {"eos_token": "<|endoftext|>"}, None, "there")
    with pytest.raises(UserError, match="no chat template: there"):
        plain.chat(MESSAGES)


def test_folder_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = Tokenizer.from_folder(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.eos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)


def test_transformers_loads_the_folder(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt
        )
        assert tokenizer.chat(MESSAGES, prompt) == expected


def test_fingerprint_sees_the_template(tokenizer, backend):
    other = Tokenizer(backend, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, None, "x")
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ messages[0].content }}!"},
        {"chat_template": [{"name": "default", "template": "{{ messages[0].content }}!"}]},
    ],
)
def test_template_inside_the_config(backend, tmp_path, fields):
    """Where transformers put it before it had a file of its own; tokens may be objects."""
    backend.save(str(tmp_path / "tokenizer.json"))
    fields = fields | {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.chat(MESSAGES) == "the shoe!"
    assert loaded.eos_id == 0


def test_truncation_and_padding_of_the_file_are_off(backend, tmp_path):
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert len(Tokenizer.from_folder(tmp_path).encode("abcdefgh")) == 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "missing tokenizer.json"),
        ({"tokenizer.json": "{"}, "unreadable tokenizer"),
        ({"tokenizer_config.json": "{"}, "not a JSON file"),
        ({"tokenizer_config.json": "[]"}, "not a JSON object"),
        ({"tokenizer_config.json": '{"eos_token": "<nope>"}'}, "'<nope>' is not in the vocabulary"),
    ],
)
def test_broken_folders(backend, tmp_path, files, message):
    if files and "tokenizer.json" not in files:
        backend.save(str(tmp_path / "tokenizer.json"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_encoders_have_no_end_and_no_template(tmp_path):
    """A WordPiece tokenizer of a BERT folder: text stays bare, [CLS] and [SEP] are known."""
    transformers = pytest.importorskip("transformers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "shoe", "##s", "ü", "##ber"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("The shoes", "über the [SEP] shoe", "日本"):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert [ours.cls_id, *ids, ours.sep_id] == theirs(text)["input_ids"]
    assert ours.config_fields == {"pad_token_id": 0}
    assert ours.fingerprint
    with pytest.raises(UserError, match="no eos_token"):
        _ = ours.eos_id
    with pytest.raises(UserError, match="no chat template"):
        ours.chat(MESSAGES)


def test_ids_that_there_are_none_of(tokenizer, backend):
    bare = Tokenizer(backend, {}, None, "there")
    for name in ("eos", "pad", "cls", "sep"):
        with pytest.raises(UserError, match=f"no {name}_token: there"):
            getattr(bare, f"{name}_id")
    assert bare.config_fields == {}
    assert tokenizer.config_fields == {"eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(("rows", "fits"), [(264, True), (320, True), (263, False), (265, False)])
def test_vocabulary_and_embedding(tokenizer, rows, fits):
    if fits:
        check_vocabulary(tokenizer, rows, "there")
        return
    with pytest.raises(UserError, match=f"has 264 tokens, the embedding {rows} rows: there"):
        check_vocabulary(tokenizer, rows, "there")


def test_special_tokens_without_a_row_are_refused_in_texts(backend):
    """As long as special tokens are all that is past the table."""
    backend.add_special_tokens(["<image>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<|endoftext|>"}, None, "there")
    check_vocabulary(tokenizer, 264, "there")
    assert tokenizer.encode("the") == tokenizer.encode_batch(["the"])[0]
    batch, enclosed = (lambda text: tokenizer.encode_batch([text])), tokenizer.enclosed
    for encode in (tokenizer.encode, batch, enclosed, lambda text: enclosed("the", text)):
        with pytest.raises(UserError, match="a text holds '<image>'"):
            encode("a <image> of it")
    with pytest.raises(UserError, match="the embedding 263 rows"):
        check_vocabulary(tokenizer, 263, "there")


def test_another_model_is_not_padding(tokenizer):
    with pytest.raises(UserError, match="the embedding 49152 rows"):
        check_vocabulary(tokenizer, 49152, "there")


def gguf_metadata(backend: tokenizers.Tokenizer, **changes):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_gguf_metadata_rebuild_the_tokenizer(backend, tokenizer):
    rebuilt = Tokenizer.from_gguf(gguf_metadata(backend), "test")
    assert rebuilt.eos_id == 2 and rebuilt.special_ids == {0, 1, 2}
    for text in TEXTS:
        assert rebuilt.encode(text) == tokenizer.encode(text)
        assert rebuilt.decode(rebuilt.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 123 X", ["it", "'s", "Ġ123", "ĠX"]),
        ("smollm", "it's 123 X", ["it", "'s", "Ġ", "1", "2", "3", "ĠX"]),
        ("llama-bpe", "IT'S 12345 x\n\n", ["IT", "'S", "Ġ", "123", "45", "Ġx", "ĊĊ"]),
    ],
)
def test_gguf_pre_tokenizers(backend, pre, text, pieces):
    rebuilt = Tokenizer.from_gguf(gguf_metadata(backend, pre=pre), "test")
    found = rebuilt._backend.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "chameleon"}, "unknown GGUF pre-tokenizer 'chameleon'"),
        ({"model": "llama"}, "GGUF tokenizer model 'llama'"),
        ({"eos_token_id": 264}, "eos_token id 264 is no token"),
        ({"tokens": []}, "broken GGUF tokenizer"),
        ({"tokens": ["a", "a"]}, "lists a token twice"),
        ({"merges": ["a"]}, "broken GGUF tokenizer"),
        ({"token_type": [1]}, "token types"),
    ],
)
def test_gguf_metadata_refused(backend, changes, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.from_gguf(gguf_metadata(backend, **changes), "test")


def test_special_tokens_spelt_in_a_text_are_escaped(backend):
    tokenizer = Tokenizer(backend, {"eos_token": "<|endoftext|>"}, None, "there")
    end = tokenizer.eos_id
    text = "a <|endoftext|><|endoftext|> b"
    assert tokenizer.encode(text).count(end) == 2
    escaped = tokenizer.escape(text)
    assert escaped == "a < |endoftext|>< |endoftext|> b"
    assert not tokenizer.special_ids & set(tokenizer.encode(escaped))
    assert tokenizer.escape("plain <|x|> text") == "plain <|x|> text"
