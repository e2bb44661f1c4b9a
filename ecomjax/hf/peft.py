"""Adapters as folders in the layout of PEFT, which PEFT, vLLM and others load.

What is adapted and how its tensors lie says `peft_targets`; scale is alpha / R. Beside PEFT's
two files, `base.json` says which base the adapter belongs to and, where the base has experts,
what PEFT has no fields for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity
from ecomjax.hf.files import read_json, replace_file, replace_folder
from ecomjax.hf.peft_config import (
    CONFIG,
    Pattern,
    alpha_of,
    check_targets_exist,
    is_target,
    rank_of,
    read_config,
    scale_of,
)
from ecomjax.hf.peft_pieces import (
    Piece,
    check_tensor,
    cut,
    in_common,
    join,
    shapes_of,
    split,
    stack,
    tensors_of,
)
from ecomjax.hf.peft_record import FUSED, MODULES, Record, read_record, write_record
from ecomjax.hf.peft_targets import (
    HEAD,
    PREFIX,
    Target,
    from_tensors,
    keys,
    stem,
    targets_of,
    tensor_names,
    tensor_shapes,
)
from ecomjax.hf.presets import PRESETS
from ecomjax.hf.rules import RuleTable
from ecomjax.hf.safetensors_io import SafetensorsFile, write_file
from ecomjax.models.config import ModelConfig
from ecomjax.typing import Adapter, DoRA, LowRank

WEIGHTS = "adapter_model.safetensors"

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""What PEFT calls the task of a class, by the end of its name. Classifiers are not told: PEFT
would look for the weights of a head that was trained beside the adapter."""

logger = logging.getLogger(__name__)


def write_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, config: ModelConfig, base: Identity | None
) -> None:
    """Writes an adapter, all or nothing.

    Every layer is written at its own rank. rsLoRA comes out as plain LoRA of the same scale,
    whatever that was made from.

    Args:
        folder: made, or replaced if it holds an adapter.
        adapter: tree of `LowRank` or of `DoRA` leaves at the paths of kernels, layers stacked.
        config: of the base.
        base: which weights the base is; None where that is not known, and then not said.

    Raises:
        UserError: what PEFT cannot hold, such as plain and DoRA kernels in one adapter.
    """
    leaves = trees.flatten(adapter)
    write_leaves(folder, leaves, leaves, config, base)


def write_leaves(
    folder: str | os.PathLike[str],
    expected: Mapping[str, LowRank | DoRA],
    leaves: Mapping[str, LowRank | DoRA],
    config: ModelConfig,
    base: Identity | None,
) -> None:
    """`write_adapter`, kernel by kernel: each is written before the next is asked for.

    Args:
        folder: see `write_adapter`.
        expected: kernels by path, of which shapes, dtypes, ranks and dropout are read.
        leaves: the kernels themselves, by the same paths.
        config: see `write_adapter`.
        base: see `write_adapter`.
    """
    where, table = str(folder), families.rule_table(config)
    dropout, dora = in_common(expected, where)
    targets = targets_of(table, parameters=True)
    adapted = [t for t in targets if any(part.path in expected for part in t.parts)]
    _check_dora(adapted, dora, where)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for target in adapted:
        for index, name in target.names():
            shapes |= shapes_of(target, stem(target, name, adapted), index, expected, where)
    part_ranks: dict[str, list[int]] = {}
    ranks, alphas = Pattern(), Pattern()

    def tensors_of_targets() -> Iterator[tuple[str, np.ndarray]]:
        held: dict[str, LowRank | DoRA] = {}
        for target in adapted:
            paths = [part.path for part in target.parts if part.path in expected]
            # An embedding and its tied head are one leaf, asked for once; others are let go.
            held = {path: leaf for path, leaf in held.items() if path in paths}
            for path in paths:
                if path not in held:
                    held[path] = jax.tree.map(np.asarray, leaves[path])
            yield from tensors_of_target(target, held)

    def tensors_of_target(
        target: Target, held: Mapping[str, LowRank | DoRA]
    ) -> Iterator[tuple[str, np.ndarray]]:
        pieces: dict[str, tuple[int, float]] = {}
        for index, name in target.names():
            parts = cut(target, index, held, where)
            for part, own in zip(target.parts, parts, strict=True):
                part_ranks.setdefault(part.path, []).append(own.rank if own else 0)
            piece = join(target, parts)
            pieces[name] = piece.rank, alpha_of(piece.scale, piece.rank)
            yield from tensors_of(target, stem(target, name, adapted), piece, where).items()
        found_by = keys(target, table, targets)
        ranks.add(found_by, {name: rank for name, (rank, _) in pieces.items()})
        alphas.add(found_by, {name: alpha for name, (_, alpha) in pieces.items()})

    (architecture,) = families.config_to_hf(config)["architectures"]
    task_types = [kind for end, kind in _TASK_TYPES.items() if architecture.endswith(end)]
    modules = [t for t in adapted if t.kind != "parameter"]
    parameters = [t for t in adapted if t.kind == "parameter"]
    with replace_folder(folder) as new:
        write_file(new / WEIGHTS, shapes, tensors_of_targets())
        fields = {
            "peft_type": "LORA",
            "task_type": task_types[0] if task_types else "FEATURE_EXTRACTION",
            "base_model_name_or_path": None if base is None else _reference(base),
            "inference_mode": True,
            "target_modules": sorted(key for t in modules for key in keys(t, table, targets)),
            "target_parameters": sorted(k for t in parameters for k in keys(t, table, targets)),
            "r": ranks.default,
            "rank_pattern": ranks.others,
            "lora_alpha": alphas.default,
            "alpha_pattern": alphas.others,
            # PEFT refuses to load dropout beside parameters.
            "lora_dropout": 0.0 if parameters else dropout,
            "bias": "none",
            "fan_in_fan_out": not all(t.transposed for t in adapted),
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": dora,
            "use_rslora": False,
            # In encoder-decoders PEFT would tie the head to a table that nothing reads.
            "ensure_weight_tying": [t.kind for t in modules if t.kind != "linear"]
            == ["embedding", "tied head"],
        }
        replace_file(new / CONFIG, json.dumps(fields, indent=2))
        record = Record(base)
        if table.parameters:
            joined = [part.path for t in parameters if len(t.parts) > 1 for part in t.parts]
            record = Record(base, FUSED, dropout, {path: part_ranks[path] for path in joined})
        write_record(new, record)


def _check_dora(adapted: Sequence[Target], dora: bool, where: str) -> None:
    """UserError for DoRA of what is no linear layer."""
    others = [t.template for t in adapted if t.kind != "linear"]
    if dora and others:
        raise UserError(
            f"DoRA of {others[0]!r}, which is no linear layer",
            where,
            "leave it out, or use plain LoRA",
        )


def read_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    base: Identity | None = None,
    any_base: bool = False,
) -> Adapter:
    """Reads an adapter that we or PEFT wrote, into numpy arrays.

    Where layers differ in rank, factors are padded with zeros to the largest. An adapter that
    changes nothing in some kernels is let pass with a note to the log.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        config: of the base it is to be used with.
        base: which weights that base is, where they are loaded; another one than at writing is
            an error,
        any_base: unless this is set. Adapters of PEFT do not say, and pass.
    """
    folder, table = Path(folder), families.rule_table(config)
    fields, record = read_config(folder), read_record(folder)
    if record and record.base and base and not any_base:
        _check_base(record.base, base, str(folder))
    weights = _weights(folder)
    tensors = SafetensorsFile(weights)
    targets = targets_of(table, _naming(record, table, tensors) == FUSED)
    adapted = _adapted(targets, fields, tensors, str(folder / CONFIG))
    _check_dora(adapted, fields["use_dora"], str(folder / CONFIG))
    kept = None if record is None else record.dropout
    dropout = float(fields["lora_dropout"] if kept is None else kept)
    # PEFT puts a copy of the base beside adapted embeddings and heads.
    held = set(tensors) - {
        f"{PREFIX}{name}.base_layer.weight"
        for target in adapted
        for _, name in target.names()
        if target.kind in ("embedding", "tied head") or name == HEAD
    }
    flat: dict[str, LowRank | DoRA] = {}
    for target in adapted:
        read = _read_pieces(target, adapted, fields, tensors, held, weights)
        paths = tuple(part.path for part in target.parts)
        parts = {
            index: split(target, piece, record.part_ranks(paths, layer) if record else None)
            for layer, (index, piece) in enumerate(read.items())
        }
        for number, part in enumerate(target.parts):
            pieces = {index: own[number] for index, own in parts.items()}
            if any(piece.rank for piece in pieces.values()):
                leaf = stack(pieces, target.stack, dropout)
                if not _equal(flat.setdefault(part.path, leaf), leaf):
                    raise UserError(
                        f"adapter of {target.template!r} is another than that of the embedding",
                        str(weights),
                        "train it with ensure_weight_tying: to this model both are one matrix",
                    )
    if held or not flat:
        stray = f"tensor {min(held)!r} belongs to no target module" if held else "adapter is empty"
        raise UserError(stray, str(weights), "use an adapter of this model's architecture")
    idle = [path for path, leaf in flat.items() if not leaf.b.any()]
    if idle:
        logger.warning(
            "%s: B is zero in %d of %d kernels, such as %s: A adds nothing there",
            folder,
            len(idle),
            len(flat),
            idle[0],
        )
    return trees.unflatten(flat)


def read_base(folder: str | os.PathLike[str]) -> Identity | None:
    """Which base an adapter says that it belongs to; None if it does not say."""
    record = read_record(Path(folder))
    if record is None or record.base is None:
        return None
    path = read_json(Path(folder) / CONFIG).get("base_model_name_or_path")
    return dataclasses.replace(record.base, path=str(path))


def _check_base(written: Identity, base: Identity, where: str) -> None:
    if written.fingerprint != base.fingerprint:
        raise UserError(
            f"adapter was trained on base {written.name!r} from {written.source!r}, "
            f"whose weights differ from those of {base.name!r} from {base.source!r}",
            where,
            "load its own base, or allow any base",
        )


def _naming(record: Record | None, table: RuleTable, tensors: SafetensorsFile) -> str:
    """How experts are named, by the record or else by the tensors."""
    if record is not None and record.naming is not None:
        return record.naming
    fused = {path for paths in table.parameters.values() for path in paths}
    apart = [t for t in targets_of(table, False) if t.parts[0].path in fused]
    names = {name for target in apart for _, name in target.names()}
    stems = {name.rpartition(".lora_")[0].removeprefix(PREFIX) for name in tensors}
    return MODULES if stems & names else FUSED


def _adapted(
    targets: Sequence[Target], fields: Mapping[str, Any], tensors: SafetensorsFile, where: str
) -> list[Target]:
    """The targets that PEFT would adapt, every layer of each and all roles of embeddings."""
    names = {target: [name for _, name in target.names()] for target in targets}
    by_kind = {
        parameter: [n for t in targets if (t.kind == "parameter") == parameter for n in names[t]]
        for parameter in (False, True)
    }
    check_targets_exist(fields, by_kind[False], by_kind[True], where)
    adapted = []
    for target in targets:
        hits = [
            name for name in names[target] if is_target(fields, name, target.kind == "parameter")
        ]
        if not hits and target.kind == "tied head" and fields["ensure_weight_tying"]:
            # It is then no target by name.
            hits = [n for n in names[target] if tensor_names(target, PREFIX + n)[0] in tensors]
        if hits:
            adapted.append(target)
        if hits and len(hits) < len(names[target]):
            raise UserError(
                f"adapter targets {hits[0]!r} but not every layer",
                where,
                "use an adapter of whole stacks of layers",
            )
    paths = {target.parts[0].path: target for target in adapted if target.kind != "linear"}
    for target in targets:
        if target not in adapted and target.parts[0].path in paths:
            raise UserError(
                f"adapter targets {paths[target.parts[0].path].template!r} but not "
                f"{target.template!r}, which has the same weights",
                where,
                "train it with ensure_weight_tying, or on all of them alike",
            )
    return adapted


def _read_pieces(
    target: Target,
    adapted: Sequence[Target],
    fields: Mapping[str, Any],
    tensors: SafetensorsFile,
    held: set[str],
    weights: Path,
) -> dict[tuple[int, ...], Piece]:
    """The pieces of a target by their places; takes the names of their tensors out of `held`."""
    pieces: dict[tuple[int, ...], Piece] = {}
    dtypes: dict[int, np.dtype[Any]] = {}
    for index, name in target.names():
        rank = rank_of(fields, name, str(weights.parent / CONFIG))
        names = tensor_names(target, stem(target, name, adapted))
        shapes, arrays = tensor_shapes(target, rank), []
        for side in range(3 if fields["use_dora"] else 2):
            wanted = names[side]
            if wanted not in held:
                raise UserError(
                    f"missing tensor {wanted!r}", str(weights), "fetch the adapter again"
                )
            held.remove(wanted)
            arrays.append(tensors[wanted])
            check_tensor(arrays[side], wanted, shapes[side], str(weights))
            if dtypes.setdefault(side, arrays[side].dtype) != arrays[side].dtype:
                raise UserError(
                    f"tensor {wanted!r} is {arrays[side].dtype}, that of other layers "
                    f"{dtypes[side]}",
                    str(weights),
                    "save the adapter in one dtype",
                )
        a, b = from_tensors(target, *arrays[:2])
        pieces[index] = Piece(a, b, scale_of(fields, name, rank), *arrays[2:])
    return pieces


def _equal(one: LowRank | DoRA, other: LowRank | DoRA) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def _reference(base: Identity) -> str:
    """What other tools load the base by."""
    known = base.source != "local" and base.name in PRESETS
    if known:
        return PRESETS[base.name].hub_id
    return base.path if base.source == "local" else base.name


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            "adapter weights in the format of 'adapter_model.bin' are not read",
            str(folder),
            "save it with peft's save_pretrained, which writes safetensors",
        )
    raise UserError(f"missing {WEIGHTS}", str(folder), "check the path")
