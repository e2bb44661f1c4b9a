"""Reading GGUF files: weights under Hugging Face names, config fields, tokenizer pieces.

The header is parsed here, with every length held against the file's size, so that a
truncated or forged file ends in a clear error and never in a huge allocation or an
endless loop; the `gguf` package decodes the blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from ecomjax.errors import UserError

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""Keys of the metadata, after `llama.`, and the Hugging Face fields they are."""

_SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")
_ABSENT_OR = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none"}

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Scalar types of the metadata, as `struct` and numpy name them."""
_STRING, _ARRAY = 8, 9


class GGUFFile(Mapping[str, np.ndarray]):
    """The weights of a Llama GGUF as {Hugging Face name: float32 array}, read on demand.

    Attributes:
        metadata: the key-value pairs of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self.metadata, tensors = _read_header(self.path)
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise self._unsupported(f"GGUF architecture {architecture!r}")
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, tensor.shape_in_bytes)
        try:
            values = dequantize(np.asarray(raw), kind).astype(np.float32, copy=False)
        except NotImplementedError:
            raise self._unsupported(f"tensor {tensor.name!r} is of type {kind.name}") from None
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return values
        query = name.endswith("q_proj.weight")
        heads = self.config["num_attention_heads" if query else "num_key_value_heads"]
        if values.shape[0] % (2 * heads):
            raise self._unsupported(f"tensor {tensor.name!r} has {len(values)} rows, {heads} heads")
        return unpermute(values, heads)

    def _hf_name(self, name: str) -> str:
        if name in _NAMES:
            return _NAMES[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in _BLOCK_NAMES:
            return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"
        raise self._unsupported(f"unknown tensor {name!r}")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The fields of a Hugging Face `config.json`."""
        fields: dict[str, Any] = {"model_type": "llama"}
        fields["tie_word_embeddings"] = "lm_head.weight" not in self
        prefix = "llama."
        found = {k[len(prefix) :]: v for k, v in self.metadata.items() if k.startswith(prefix)}
        for key, value in found.items():
            if isinstance(value, float):
                value = float(str(np.float32(value)))
            if key in _FIELDS:
                fields[_FIELDS[key]] = value
            elif key not in _SAME_AS_HEAD_DIM and value != _ABSENT_OR.get(key):
                raise self._unsupported(f"GGUF key 'llama.{key}' is {value!r}")
        fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
        width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        if isinstance(width, int) and isinstance(heads, int) and heads:
            fields.setdefault("head_dim", width // heads)
        for key in _SAME_AS_HEAD_DIM:
            if found.get(key, fields.get("head_dim")) != fields.get("head_dim"):
                raise self._unsupported(f"GGUF key 'llama.{key}' is {found[key]!r}")
        fields.setdefault("vocab_size", len(self.metadata.get("tokenizer.ggml.tokens", [])))
        return fields

    def _unsupported(self, what: str) -> UserError:
        return UserError(what, self.path, "use a GGUF file of a plain Llama model")


def unpermute(weight: Float[np.ndarray, "rows D"], heads: int) -> Float[np.ndarray, "rows D"]:
    """Rows of q or k in the rotate-half order of Hugging Face.

    GGUF stores, per head, the two halves interleaved: row 2i is theirs i, row 2i + 1 is
    theirs i + H/2 (`permute` of llama.cpp's `convert_hf_to_gguf.py`, read backwards).
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    kind: int
    shape_in_bytes: tuple[int, ...]
    """Rows first (the file has them last), each row in bytes."""
    offset: int
    """From the start of the file."""


class _Broken(Exception):
    """What is wrong with a file."""


def _read_header(path: str) -> tuple[dict[str, Any], list[_Tensor]]:
    """Metadata and tensor table of a file in which every extent lies inside the file."""
    try:
        with open(path, "rb") as file:
            return _Parser(file, os.stat(path).st_size).parse()
    except _Broken as error:
        fault = str(error)
    except (struct.error, UnicodeDecodeError):
        fault = "ends or breaks off inside its header"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    raise UserError(f"GGUF file {fault}", path, "fetch the file again")


class _Parser:
    """Reads the header in the order of the file; `struct.error` where it ends too early."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def parse(self) -> tuple[dict[str, Any], list[_Tensor]]:
        if self._bytes(4) != b"GGUF":
            raise _Broken("does not start with GGUF")
        version, tensor_count, key_count = self._take("IQQ")
        if version not in (2, 3):
            raise _Broken(f"is of version {version}, read are 2 and 3")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise _Broken(f"holds the key {key!r} twice")
            metadata[key] = self._value(*self._take("I"))
        alignment = metadata.get("general.alignment", 32)
        if alignment not in (2**i for i in range(3, 17)):
            raise _Broken(f"has the alignment {alignment!r}")
        table = [self._tensor(alignment) for _ in range(tensor_count)]
        start = -(-self.file.tell() // alignment) * alignment
        table = [dataclasses.replace(t, offset=start + t.offset) for t in table]
        self._check_extents(table)
        return metadata, table

    def _check_extents(self, table: list[_Tensor]) -> None:
        if len({tensor.name for tensor in table}) < len(table):
            raise _Broken("holds a tensor name twice")
        reached = 0
        for tensor in sorted(table, key=lambda t: t.offset):
            end = tensor.offset + math.prod(tensor.shape_in_bytes)
            if tensor.offset < reached:
                raise _Broken(f"holds tensor {tensor.name!r} over another one")
            if end > self.size:
                raise _Broken(
                    f"is truncated: tensor {tensor.name!r} ends at byte {end} of {self.size}"
                )
            reached = end

    def _tensor(self, alignment: int) -> _Tensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        (rank,) = self._take("I")
        if rank not in (1, 2, 3, 4):
            raise _Broken(f"says that tensor {name!r} has {rank} axes")
        *shape, kind, offset = self._take(f"{rank}QIQ")
        try:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _Broken(f"holds tensor {name!r} of unknown type {kind}") from None
        if shape[0] % block or offset % alignment:
            raise _Broken(f"holds tensor {name!r} in broken blocks")
        return _Tensor(name, kind, (*shape[:0:-1], shape[0] // block * width), offset)

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise struct.error
        return self.file.read(count)

    def _take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._bytes(struct.calcsize("<" + layout)))

    def _string(self) -> str:
        return self._bytes(*self._take("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise _Broken(f"holds a value of unknown type {kind}")
        inner, count = self._take("IQ")
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        if inner not in _SCALARS:
            raise _Broken(f"holds an array of type {inner}")
        dtype = np.dtype(f"<{_SCALARS[inner]}")
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
