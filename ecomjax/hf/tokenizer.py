"""Text to token ids and back, and conversations to text."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ecomjax.errors import UserError
from ecomjax.hf import gguf_tokenizer, sentencepiece
from ecomjax.hf.chat_template import ChatTemplate
from ecomjax.hf.files import read_json, replace_file

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "cls_token",
    "sep_token",
    "mask_token",
)
"""Names under which a tokenizer's config and chat template know its special tokens."""


_PRINTED = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF = {chr(value): value for value in _PRINTED} | {
    chr(0x100 + place): value
    for place, value in enumerate(value for value in range(0x100) if value not in _PRINTED)
}
"""How byte-level tokenizers write bytes: as themselves where printed, else past all bytes."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids and the template of a model.

    Not every tokenizer has every special token: to ask for an id that there is none of
    raises UserError.

    Attributes:
        special_ids: of the special tokens.
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
        self._ids: dict[str, int] = {}
        for name, token in self._special.items():
            index = backend.token_to_id(token)
            if index is None:
                raise UserError(
                    f"{name} {token!r} is not in the vocabulary", where, "correct the tokenizer"
                )
            self._ids[name] = index
        self._template: ChatTemplate | None = None
        if chat_template:
            self._template = ChatTemplate(chat_template, self._special, where)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Of tokens that begin alike, the longest is the one spelt.
        spelt = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, spelt)) or r"(?!)")
        self.rows = self.vocab_size
        """Ids from here on are refused: the model has no row for them."""
        if (end := self._end_of_turn()) is not None:
            self._ids = {"pad_token": end} | self._ids | {"eos_token": end}

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads `tokenizer.json` or a SentencePiece model, and what stands beside it.

        The config beside it says which tokens are special; where it does not, a
        SentencePiece model does itself.
        """
        folder = Path(folder)
        fields: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                fields |= read_json(folder / name)
        special = {n: _content(fields[n]) for n in SPECIAL_NAMES if fields.get(n) is not None}
        path, model = folder / "tokenizer.json", sentencepiece.find(folder)
        if path.is_file():
            backend = _read_fast(path)
        elif model:
            backend, own = sentencepiece.load(model, fields)
            special = own | special
        else:
            raise UserError(
                f"missing tokenizer.json, {' or '.join(sentencepiece.FILES)}",
                str(folder),
                "convert the tokenizer to the fast format with transformers and save it there",
            )
        return cls(backend, special, _find_template(folder, fields), str(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """Builds the tokenizer that the `tokenizer.*` metadata of a GGUF file describe."""
        backend, special = gguf_tokenizer.load(metadata, where)
        return cls(backend, special, metadata.get("tokenizer.chat_template"), where)

    @property
    def eos_id(self) -> int:
        """Ends a turn: generation stops there, and it is appended to targets.

        The token that the chat template puts after what the assistant says, or, without a
        template, the tokenizer's own end of text.
        """
        return self._id("eos_token")

    @property
    def pad_id(self) -> int:
        """Fills slots that hold nothing; `eos_id` where there is no token for it."""
        return self._id("pad_token")

    @property
    def cls_id(self) -> int:
        """Opens what an encoder reads."""
        return self._id("cls_token")

    @property
    def sep_id(self) -> int:
        """Ends each part of what an encoder reads."""
        return self._id("sep_token")

    @property
    def config_fields(self) -> dict[str, int]:
        """What a model's config says of the end and of padding, where there are such tokens."""
        names = ("eos_token", "pad_token")
        return {f"{name}_id": self._ids[name] for name in names if name in self._ids}

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing added; special tokens spelt in it are recognised."""
        return self._checked(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._checked(encoding.ids) for encoding in encodings]

    def enclosed(self, first: str, second: str | None = None) -> tokenizers.Encoding:
        """A text or a pair with the special tokens that the tokenizer puts around it.

        What an encoder reads; with its token types, and which token is of which text, where.
        """
        encoding = self._backend.encode(first, second)
        self._checked(encoding.ids)
        return encoding

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self.rows:
            token = self._backend.id_to_token(max(ids))
            raise UserError(
                f"a text holds {token!r}, which the model has no embedding for",
                self._where,
                "take it out of the text",
            )
        return ids

    def escape(self, text: str) -> str:
        """The text with a blank in every special token spelt in it, which makes it plain text.

        For texts of others, such as a product title: `<|im_end|>` in one would end a turn.
        """
        return self._spelt.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self) -> list[bytes | None]:
        """The bytes that each id spells; None of special tokens, and where there is no token.

        UserError unless the tokenizer is byte-level: the bytes of others depend on their place.
        """
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        if decoder.get("type") != "ByteLevel":
            raise UserError(
                "the tokenizer is not byte-level", self._where, "use a model whose tokenizer is"
            )
        found: list[bytes | None] = [None] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            found[index] = bytes(_BYTE_OF[letter] for letter in token)
        for index, token in self._backend.get_added_tokens_decoder().items():
            found[index] = None if token.special else token.content.encode("utf-8")
        return found

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

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides about ids and conversations."""
        template = self._template.source if self._template else None
        ends = [self._ids.get("eos_token"), self._ids.get("pad_token")]
        parts = [self._backend.to_str(), self._special, template, *ends]
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

    def _id(self, name: str) -> int:
        if name not in self._ids:
            raise UserError(f"the tokenizer has no {name}", self._where, "name it in its config")
        return self._ids[name]

    def _end_of_turn(self) -> int | None:
        if self._template:
            answer = "~answer~"
            turns = [{"role": "user", "content": "question"}]
            turns.append({"role": "assistant", "content": answer})
            text = self._template.render(turns, add_generation_prompt=False)
            after = self.encode(text.rpartition(answer)[2])
            if answer in text and after and after[0] in self.special_ids:
                return after[0]
        return self._ids.get("eos_token")


def check_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Raises unless an embedding of `rows` rows belongs to the tokenizer.

    The sizes are equal, or the embedding is padded: by less than 1024 rows, to a
    multiple of 64. A gather out of range is silent in JAX, so nothing else passes, but
    special tokens past the table (Gemma 3 has one for images), which texts may not hold.
    """
    beyond = range(rows, tokenizer.vocab_size)
    if beyond and tokenizer.special_ids.issuperset(beyond):
        tokenizer.rows = rows
        return
    padding = rows - tokenizer.vocab_size
    if padding and not (0 < padding < 1024 and rows % 64 == 0):
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {rows} rows",
            where,
            "use the tokenizer that the model was trained with",
        )


def _read_fast(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"unreadable tokenizer: {error}", str(path), "fetch it again") from None


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
