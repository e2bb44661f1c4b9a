"""Reading GGUF files: weights under Hugging Face names, config fields, tokenizer pieces.

The file is walked once before anything is mapped, so that a truncated or forged one
ends in a clear error and never in a huge allocation or an endless loop.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

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

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the scalar metadata types; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


class GGUFFile(Mapping[str, np.ndarray]):
    """The weights of a Llama GGUF as {Hugging Face name: float32 array}, read on demand."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        _check(self.path)
        from gguf import GGUFReader

        self._reader = GGUFReader(self.path)
        architecture = self.metadata("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"GGUF architecture {architecture!r}", self.path, "use a GGUF file of a Llama model"
            )
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise UserError(
                f"tensor {tensor.name!r} is of type {tensor.tensor_type.name}",
                self.path,
                "use a GGUF file of types Q4_1, Q8_0, F16 or F32",
            ) from None
        if name.endswith("q_proj.weight"):
            return unpermute(values, self.config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return unpermute(values, self.config["num_key_value_heads"])
        return values

    def _hf_name(self, name: str) -> str:
        if name in _NAMES:
            return _NAMES[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in _BLOCK_NAMES:
            return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"
        raise UserError(
            f"unknown tensor {name!r}", self.path, "use a GGUF file of a plain Llama model"
        )

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The fields of a Hugging Face `config.json`."""
        fields: dict[str, Any] = {"model_type": "llama"}
        fields["tie_word_embeddings"] = "lm_head.weight" not in self
        keys = [key for key in self._reader.fields if key.startswith("llama.")]
        found = {key.removeprefix("llama."): self.metadata(key) for key in keys}
        for key, value in found.items():
            if isinstance(value, float):
                value = float(str(np.float32(value)))
            if key in _FIELDS:
                fields[_FIELDS[key]] = value
            elif key not in _SAME_AS_HEAD_DIM and value != _ABSENT_OR.get(key):
                raise self._unsupported(f"GGUF key 'llama.{key}' is {value!r}")
        fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
        if "hidden_size" in fields and fields.get("num_attention_heads"):
            head_dim = fields["hidden_size"] // fields["num_attention_heads"]
            fields.setdefault("head_dim", head_dim)
        for key in _SAME_AS_HEAD_DIM:
            if found.get(key, fields.get("head_dim")) != fields.get("head_dim"):
                raise self._unsupported(f"GGUF key 'llama.{key}' is {found[key]!r}")
        fields.setdefault("vocab_size", len(self.metadata("tokenizer.ggml.tokens", [])))
        return fields

    @property
    def tokenizer_metadata(self) -> dict[str, Any]:
        """The metadata that describe the tokenizer."""
        keys = [key for key in self._reader.fields if key.startswith("tokenizer.")]
        return {key: self.metadata(key) for key in keys}

    def _unsupported(self, what: str) -> UserError:
        return UserError(what, self.path, "use a GGUF file of a plain Llama model")


def unpermute(weight: Float[np.ndarray, "rows D"], heads: int) -> Float[np.ndarray, "rows D"]:
    """Rows of q or k in the rotate-half order of Hugging Face.

    GGUF stores, per head, the two halves interleaved: row 2i is theirs i, row 2i + 1 is
    theirs i + H/2 (`permute` of llama.cpp's `convert_hf_to_gguf.py`, read backwards).
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _check(path: str) -> None:
    """Walks header, metadata and tensor table, and holds every extent against the file size."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            fault = _Walk(file, size).fault()
    except (struct.error, UnicodeDecodeError):
        fault = "ends or breaks off inside its header"
    except OSError as error:
        raise UserError(f"cannot read GGUF file ({error.strerror})", path, "check it") from None
    if fault:
        raise UserError(f"GGUF file {fault}", path, "fetch the file again")


class _Walk:
    def __init__(self, file, size: int):
        self.file, self.size = file, size

    def fault(self) -> str | None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.file.read(4) != b"GGUF":
            return "does not start with the GGUF magic"
        version, tensors, keys = self._take("<IQQ")
        if version not in (2, 3):
            return f"is of version {version}, read are 2 and 3"
        alignment = 32
        seen = set()
        for _ in range(keys):
            key = self._string()
            if key in seen:
                return f"holds the key {key!r} twice"
            seen.add(key)
            (kind,) = self._take("<I")
            value = self._value(kind)
            if key == "general.alignment":
                if kind != 4 or value not in (2**i for i in range(3, 16)):
                    return "has no valid alignment"
                alignment = value
        extents = []
        for _ in range(tensors):
            name = self._string()
            if name in seen:
                return f"holds the tensor {name!r} twice"
            seen.add(name)
            (rank,) = self._take("<I")
            if rank > 4:
                return f"says tensor {name!r} has {rank} axes"
            *shape, kind, offset = self._take(f"<{rank}QIQ")
            if kind not in [t.value for t in GGMLQuantizationType]:
                return f"holds tensor {name!r} of unknown type {kind}"
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if not shape or shape[0] % block or offset % alignment:
                return f"holds tensor {name!r} in broken blocks"
            extents.append((offset, math.prod(shape) // block * width, name))
        start = math.ceil(self.file.tell() / alignment) * alignment
        end = 0
        for offset, width, name in sorted(extents):
            if offset < end:
                return f"holds tensor {name!r} over another one"
            end = offset + width
            if start + end > self.size:
                return f"is truncated: tensor {name!r} ends at byte {start + end} of {self.size}"
        return None

    def _take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.file.read(struct.calcsize(layout)))

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise struct.error
        self.file.seek(count, os.SEEK_CUR)

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if length > self.size - self.file.tell():
            raise struct.error
        return self.file.read(length).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._take("<IQ")
            if inner == _STRING:
                if count > self.size // 8:
                    raise struct.error
                for _ in range(count):
                    self._string()
            elif inner in _SCALARS:
                self._skip(count * _SCALARS[inner])
            else:
                raise struct.error
            return None
        if kind not in _SCALARS:
            raise struct.error
        raw = self.file.read(_SCALARS[kind])
        if len(raw) < _SCALARS[kind]:
            raise struct.error
        return int.from_bytes(raw, "little")
