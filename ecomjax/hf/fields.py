"""Two-way tables between the fields of a Hugging Face `config.json` and a config of ours.

A table is strict both ways: every field of theirs is mapped, has the one value that is
built here, or is known to say nothing about the forward pass; anything else is refused by
name, and so is a value of another kind than our field's.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ecomjax.errors import UserError

COMMON_IGNORED = frozenset(
    """architectures torch_dtype dtype transformers_version transformers.js_config use_cache
    initializer_range bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    _name_or_path id2label label2id num_labels problem_type return_dict output_hidden_states
    output_attentions chunk_size_feed_forward auto_map unsloth_fixed unsloth_version
    tokenizer_class name_or_path torchscript gradient_checkpointing finetuning_task
    task_specific_params""".split()
)
"""Fields that say nothing about the forward pass. `auto_map` names code, which never runs."""

COMMON_ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Their names of activations to ours; the first of each serves the way out."""


@dataclasses.dataclass(frozen=True)
class FieldTable:
    """The fields of one architecture.

    Attributes:
        model_type: what `config.json` calls it.
        architecture: the class that transformers loads it with.
        names: their field to ours.
        optional: their fields that may be absent or null, and what they then mean; None
            means that the family derives the value.
        nullable: those whose null means None, whatever they mean when absent.
        only: their fields that have one value here; null reads as the first.
        ignored: fields that say nothing about the forward pass, besides COMMON_IGNORED.
        apart: fields that the family reads and writes itself.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    optional: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nullable: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()

    def read(self, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Our values of the mapped fields; `apart` is only let pass.

        Raises:
            UserError: a field or value that is not built here, or a missing one.
        """
        only = {"model_type": (self.model_type,), **COMMON_ONLY, **self.only}
        known = {*self.names, *only, *self.ignored, *COMMON_IGNORED, *self.apart}
        for key in fields:
            if key not in known:
                raise refused(f"unknown config field {key!r}", where)
        for key, allowed in only.items():
            value = fields.get(key)
            if value is not None and value not in allowed:
                raise refused(f"config field {key!r} is {value!r}, built is {allowed[0]!r}", where)
        values: dict[str, Any] = {}
        for theirs, ours in self.names.items():
            value = fields.get(theirs)
            if value is None:
                if theirs not in self.optional:
                    raise refused(f"missing config field {theirs!r}", where)
                if theirs not in fields or theirs not in self.nullable:
                    value = self.optional[theirs]
            elif ours == "activation":
                if value not in ACTIVATIONS:
                    raise refused(f"config field {theirs!r} is {value!r}", where)
                value = ACTIVATIONS[value]
            values[ours] = value
        return values

    def write(self, config: Any) -> dict[str, Any]:
        """The content of a `config.json` that transformers reads, `apart` left out."""
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        fields: dict[str, Any] = {}
        for theirs, ours in self.names.items():
            value = getattr(config, ours)
            fields[theirs] = names[value] if ours == "activation" else value
        return fields | {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": config.param_dtype,
        }


def check_values(config_class: type, values: Mapping[str, Any], where: str) -> None:
    """Raises where a value is not of its field's kind: positive numbers, true or false, words.

    Numbers of fields that have zero as their default may be zero.
    """
    kinds = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        kind = kinds[name]
        numbers = {int: (int,), float: (int, float)}.get(kind)
        if numbers:
            fine = isinstance(value, numbers) and not isinstance(value, bool)
            fine = fine and (value > 0 or value == 0 == defaults[name])
        elif kind in (bool, str):
            fine = isinstance(value, kind)
        else:
            fine = isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None
        if not fine:
            raise refused(f"config value of {name} is {value!r}", where)


def refused(what: str, where: str) -> UserError:
    """The error for a checkpoint that is not built here."""
    return UserError(what, where, "use a checkpoint of an architecture that is built here")
