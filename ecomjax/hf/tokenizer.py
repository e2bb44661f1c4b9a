"""Text to token ids and back, and conversations to text."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ecomjax.errors import UserError
from ecomjax.hf.chat_template import ChatTemplate
from ecomjax.hf.files import read_json, replace_file

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Names under which a tokenizer's config and chat template know its special tokens."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids and the template of a model.

    Attributes:
        eos_id: ends a turn: generation stops there, and it is appended to targets. The
            token that the chat template puts after what the assistant says, or, without
            a template, the tokenizer's own end of text.
        pad_id: fills slots that hold nothing.
        vocab_size: one more than the largest id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str],
        chat_template: str | None,
        where: str,
    ):
        """Joins the pieces.

        Args:
            backend: text to ids.
            special: names of `SPECIAL_NAMES` to the tokens they stand for.
            chat_template: source of the jinja template, where there is one.
            where: folder or file it comes from, for error messages.
        """
        self._backend, self._special, self._where = backend, dict(special), where
        self._backend.no_truncation()
        self._backend.no_padding()
        for name, token in self._special.items():
            if backend.token_to_id(token) is None:
                raise UserError(
                    f"{name} {token!r} is not in the vocabulary", where, "correct the tokenizer"
                )
        self._template: ChatTemplate | None = None
        if chat_template:
            self._template = ChatTemplate(chat_template, self._special, where)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = self._end_of_turn()
        self.pad_id = self._id("pad_token", self.eos_id)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads `tokenizer.json` and, where present, the config and chat template beside it."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                "missing tokenizer.json",
                str(folder),
                "convert the tokenizer to the fast format with transformers and save it there",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"unreadable tokenizer: {error}", str(path), "fetch it again") from None
        fields: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                fields |= read_json(folder / name)
        special = {n: _content(fields[n]) for n in SPECIAL_NAMES if fields.get(n) is not None}
        return cls(backend, special, _find_template(folder, fields), str(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """Builds the tokenizer that the `tokenizer.*` metadata of a GGUF file describe."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UserError(
                f"GGUF tokenizer model {kind!r}",
                where,
                "use a file with a byte-level BPE tokenizer ('gpt2')",
            )
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        merges = metadata.get("tokenizer.ggml.merges", [])
        backend = _byte_level_bpe(tokens, merges, metadata.get("tokenizer.ggml.pre"), where)
        kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        if len(kinds) != len(tokens):
            raise UserError(
                f"GGUF tokenizer has {len(tokens)} tokens and {len(kinds)} token types",
                where,
                "fetch the file again",
            )
        for token, kind in zip(tokens, kinds, strict=True):
            if kind in (_CONTROL, _USER_DEFINED):
                special = kind == _CONTROL
                backend.add_tokens([AddedToken(token, special=special, normalized=False)])
        special = {}
        for name, key in _GGUF_SPECIAL.items():
            index = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if index is not None:
                if index >= len(tokens):
                    raise UserError(f"{name} id {index} is no token", where, "fetch the file again")
                special[name] = tokens[index]
        return cls(backend, special, metadata.get("tokenizer.chat_template"), where)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing added; special tokens spelt in it are recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model was trained to see it.

        Args:
            messages: dicts with `role` (system, user, assistant) and `content`.
            add_generation_prompt: end where the assistant's next answer starts.
        """
        if not self._template:
            raise UserError(
                "the model has no chat template", self._where, "use the prompt format alpaca"
            )
        return self._template.render(messages, add_generation_prompt)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides about ids and conversations."""
        template = self._template.source if self._template else None
        parts = [self._backend.to_str(), self._special, template, self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that `from_folder` and transformers read."""
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special,
        }
        replace_file(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        replace_file(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        if self._template:
            replace_file(folder / "chat_template.jinja", self._template.source)

    def _id(self, name: str, default: int | None = None) -> int:
        token = self._special.get(name)
        index = default if token is None else self._backend.token_to_id(token)
        if index is None:
            raise UserError(f"the tokenizer has no {name}", self._where, "name it in its config")
        return index

    def _end_of_turn(self) -> int:
        if self._template:
            answer = "~answer~"
            turns = [{"role": "user", "content": "question"}]
            turns.append({"role": "assistant", "content": answer})
            text = self._template.render(turns, add_generation_prompt=False)
            after = self.encode(text.rpartition(answer)[2])
            if answer in text and after and after[0] in self.special_ids:
                return after[0]
        return self._id("eos_token")


def check_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Raises unless an embedding of `rows` rows belongs to the tokenizer.

    The sizes are equal, or the embedding is padded: by less than 1024 rows, to a
    multiple of 64. A gather out of range is silent in JAX, so nothing else passes.
    """
    padding = rows - tokenizer.vocab_size
    if padding and not (0 < padding < 1024 and rows % 64 == 0):
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {rows} rows",
            where,
            "use the tokenizer that the model was trained with",
        )


_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_GGUF_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(name: str | None) -> pre_tokenizers.PreTokenizer | None:
    """What the GGUF names in `tokenizer.ggml.pre` stand for."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "gpt-2":
            return byte_level
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, byte_level])
        case "llama-bpe":
            split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([split, bytes_only])
    return None


def _byte_level_bpe(tokens, merges, pre: str | None, where: str) -> tokenizers.Tokenizer:
    pre_tokenizer = _pre_tokenizer(pre)
    if pre_tokenizer is None:
        raise UserError(
            f"unknown GGUF pre-tokenizer {pre!r}",
            where,
            "use a file whose tokenizer.ggml.pre is smollm, gpt-2 or llama-bpe",
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError("the GGUF tokenizer lists a token twice", where, "fetch the file again")
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"broken GGUF tokenizer: {error}", where, "fetch the file again") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _content(token: Any) -> str:
    """A special token of a config: a string, or a dict that holds it."""
    return token["content"] if isinstance(token, dict) else token


def _find_template(folder: Path, fields: Mapping[str, Any]) -> str | None:
    """The default chat template: a file of its own or, before transformers 4.52, a field."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = fields.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
