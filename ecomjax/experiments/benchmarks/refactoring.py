"""Bringing a merge of adapters back to their rank, beside PEFT's `svd` on the same adapters."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.lowrank import Factors, decompose
from ecomjax.adapters.merge import merge
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import say
from ecomjax.experiments.benchmarks.peer import imported
from ecomjax.experiments.benchmarks.result import Result, alternate
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity, load_config
from ecomjax.hf.peft import read_adapter, write_adapter
from ecomjax.models import registry
from ecomjax.typing import Adapter

MODEL, RANK, WEIGHTS = "smollm2_135m", 16, (0.4, 0.3, 0.2, 0.1)
SINGULAR_TOLERANCE = 1e-4
"""Of the largest of a matrix: both decompose in float32."""


def refactoring() -> Result:
    """Seconds to bring the sum of four adapters to a rank, beside PEFT at its fastest."""
    found = refactor_beside_peft()
    medians = {name: statistics.median(found[name]) for name in ("ours", "peft", "peft_small")}
    return Result(
        name="merge",
        unit="seconds to re-factor four rank-16 adapters of SmolLM2-135M",
        ours=medians["ours"],
        peer=min(medians["peft"], medians["peft_small"]),
        target=1 / 8,
        samples=len(found["ours"]),
        details=found | {"medians": medians},
    )


def refactor_beside_peft() -> dict[str, Any]:
    """Seconds of both, and how far their singular values are apart.

    Four random adapters on every linear layer of SmolLM2-135M; both sum their deltas with the
    same weights and bring every matrix to rank 16. PEFT is run as it comes, and with its
    option of smaller decompositions, `svd_full_matrices=False`.

    Returns:
        ours, peft and peft_small: seconds of each round; difference: of singular values, in
        parts of the largest of their matrix.

    Raises:
        UserError: peft or torch is missing; the results differ.
    """
    peft, transformers = imported("peft"), imported("transformers")
    config = load_config(MODEL)
    shapes, axes = registry.describe(registry.build(config))
    base = Identity(MODEL, "none", "", "0" * 64, "0" * 64)
    fields = families.config_to_hf(config)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [str(Path(scratch) / f"a{number}") for number in range(len(WEIGHTS))]
        for seed, folder in enumerate(folders):
            write_adapter(folder, _draw(shapes, axes, seed), config, base)
        ours = [read_adapter(folder, config, base) for folder in folders]
        # The weights of the base are read by neither side.
        shape = transformers.AutoConfig.for_model(**fields)
        model: Any = transformers.AutoModelForCausalLM.from_config(shape)
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for an attribute by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            theirs: Any = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
            for number, folder in enumerate(folders[1:], start=1):
                theirs.load_adapter(folder, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(WEIGHTS))]

    def run_theirs(small: bool) -> None:
        if "merged" in theirs.peft_config:
            theirs.delete_adapter("merged")
        more = {"svd_full_matrices": False} if small else {}
        theirs.add_weighted_adapter(
            names, list(WEIGHTS), "merged", combination_type="svd", svd_rank=RANK, **more
        )

    def run_ours() -> Adapter:
        return merge(ours, list(WEIGHTS), "svd").adapter

    seconds = alternate(run_ours, lambda: run_theirs(False), lambda: run_theirs(True))
    difference = _difference(run_ours(), theirs, config)
    say(f"singular values differ by {difference:.1e} of the largest")
    # Said so, NaN is a difference.
    if not difference <= SINGULAR_TOLERANCE:
        raise UserError(
            f"singular values differ by {difference:.1e} of the largest",
            "merge",
            "this is a defect, please report it",
        )
    kinds = ("ours", "peft", "peft_small")
    return dict(zip(kinds, seconds, strict=True)) | {"difference": difference}


def _draw(shapes: Any, axes: Any, seed: int) -> Adapter:
    """A random adapter on every linear layer."""
    _, adapter = lora.init(shapes, axes, [LoraRule(rank=RANK)], jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return trees.map_leaves(
        lambda leaf: leaf.replace(b=0.02 * rng.standard_normal(leaf.b.shape, np.float32)), adapter
    )


def _difference(merged: Adapter, theirs: Any, config: Any) -> float:
    """The largest difference of a singular value, in parts of the largest of its matrix."""
    table = families.rule_table(config)
    leaves, found = trees.flatten(merged), []
    for rule in table.rules:
        if rule.ours not in leaves:
            continue
        leaf = leaves[rule.ours]
        for index, name in rule.names(table.sizes):
            module = theirs.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
            b, a = (
                getattr(module, part)["merged"].weight.detach().numpy()
                for part in ("lora_B", "lora_A")
            )
            scale = np.float32(module.scaling["merged"])
            expected = decompose(Factors(scale * a.T, b.T)).s
            ours = decompose(Factors(leaf.scale[index] * leaf.a[index], leaf.b[index])).s
            found.append(np.abs(ours - expected).max() / expected.max())
    return float(np.max(found))
