"""SentencePiece models (Kudo & Richardson 2018, arXiv 1808.06226) as fast tokenizers.

A `tokenizer.model` or `spiece.model` is a list of scored pieces with the settings of its
training. They become a tokenizer of the `tokenizers` library with the ids of transformers:
unlike SentencePiece itself it recognises special tokens spelt in a text, and reads one
space that opens a text as the space that is put before a first word anyway.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ecomjax.errors import UserError
from ecomjax.hf.files import read_json

FILES = ("tokenizer.model", "spiece.model")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"


def find(folder: Path) -> Path | None:
    """The model file of a folder, where there is one."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def load(path: Path, fields: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a model file, and the special tokens that the file itself names.

    Args:
        path: of the file; `config.json` and `added_tokens.json` beside it are read too.
        fields: of `tokenizer_config.json`. Its `legacy` (a space is put before the text
            after every special token, not only before the first word) is false unless
            given, as it is since transformers 5; its `add_prefix_space`, which puts none
            at all if false, is what the file says.
    """
    proto = _read(path)
    trainer, where = proto.trainer_spec, str(path)
    pieces = [piece.piece for piece in proto.pieces]
    named = {
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "unk_token": trainer.unk_id,
        "pad_token": trainer.pad_id,
    }
    special = {name: pieces[i] for name, i in named.items() if 0 <= i < len(pieces)}
    is_t5 = _is_t5(path.parent, fields)
    sentinels = fields.get("extra_ids", 100 if is_t5 else 0)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    sentinels = [] if sentinels and sentinels[0] in pieces else sentinels

    backend = tokenizers.Tokenizer(_model(proto, sentinels, where))
    _set_spaces(backend, proto.normalizer_spec, fields)
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            _add(backend, piece.piece, piece.type != _USER_DEFINED)
    for token in sentinels:
        _add(backend, token, True)
    for index, token, is_special in _added(path.parent, fields):
        if backend.token_to_id(token) is None:
            _add(backend, token, is_special)
        if backend.token_to_id(token) != index:
            raise UserError(
                f"added token {token!r} has id {index} where {backend.token_to_id(token)} is next",
                where,
                "use the tokenizer_config.json of this model file",
            )
    wanted = (
        ("bos_token", fields.get("add_bos_token", False)),
        ("eos_token", fields.get("add_eos_token", is_t5)),
    )
    _set_ends(backend, *([special[n]] if add and n in special else [] for n, add in wanted))
    return backend, special


def _read(path: Path) -> Any:
    """The parsed file."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto: Any = schema.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # of a kind that the protobuf library keeps to itself
        raise UserError(f"unreadable tokenizer: {error}", str(path), "fetch it again") from None
    if not proto.pieces:
        raise UserError("the tokenizer has no pieces", str(path), "fetch it again")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("a tokenizer with spaces after words", str(path), "use another model")
    return proto


def _model(proto: Any, sentinels: list[str], where: str) -> models.Model:
    trainer = proto.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        scored += [(token, 0.0) for token in sentinels]
        return models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type)
        raise UserError(f"SentencePiece model of kind {kind}", where, "use a unigram or BPE one")
    names = [*(piece.piece for piece in proto.pieces), *sentinels]
    vocabulary = {piece: i for i, piece in enumerate(names)}
    # Pieces stand in the order in which they were merged, and any two that make one may be.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return models.BPE(
        vocabulary,
        merges,
        unk_token=names[trainer.unk_id],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _set_spaces(backend: tokenizers.Tokenizer, spec: Any, fields: Mapping[str, Any]) -> None:
    """What happens to characters and spaces before the pieces are found, and afterwards."""
    if spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(spec.precompiled_charsmap)
    prefix = fields.get("add_prefix_space")
    prefix = spec.add_dummy_prefix if prefix is None else prefix
    if spec.remove_extra_whitespaces:
        scheme = "always" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, scheme, True)]
        )
    else:
        scheme = ("always" if fields.get("legacy") else "first") if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


def _set_ends(backend: tokenizers.Tokenizer, opening: list[str], closing: list[str]) -> None:
    """What stands around texts where special tokens are asked for, as transformers does."""
    if opening or closing:
        ids = [(token, backend.token_to_id(token)) for token in (*opening, *closing)]
        first, second = ([*opening, text, *closing] for text in ("$A", "$B"))
        backend.post_processor = processors.TemplateProcessing(
            single=first, pair=[*first, *second], special_tokens=ids
        )


def _add(backend: tokenizers.Tokenizer, token: str, special: bool) -> None:
    backend.add_tokens([AddedToken(token, special=special, normalized=False)])


def _is_t5(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether ids of sentinels follow the pieces, and the end token every text."""
    if "tokenizer_class" in fields:
        return fields["tokenizer_class"] in ("T5Tokenizer", "T5TokenizerFast")
    config = folder / "config.json"
    return os.path.isfile(config) and read_json(config).get("model_type") == "t5"


def _added(folder: Path, fields: Mapping[str, Any]) -> list[tuple[int, str, bool]]:
    """Id, text and whether it is special of every token that files beside the model add."""
    path = folder / "added_tokens.json"
    tokens: dict[int, tuple[str, bool]] = {}
    if path.is_file():
        tokens = {index: (token, False) for token, index in read_json(path).items()}
    for index, token in (fields.get("added_tokens_decoder") or {}).items():
        tokens[int(index)] = token["content"], token.get("special", False)
    return [(index, *tokens[index]) for index in sorted(tokens)]
