"""The tokenizers that GGUF files describe: byte-level BPE with a named pre-tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ecomjax.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_GGUF_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def load(metadata: Mapping[str, Any], where: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer that the `tokenizer.*` metadata describe, and the special tokens they name.

    Args:
        metadata: of the file.
        where: its path, for error messages.
    """
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
    return backend, special


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
