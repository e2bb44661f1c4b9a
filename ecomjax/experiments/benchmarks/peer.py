"""The peer of a benchmark: transformers and torch on the same weights."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import jax

from ecomjax.errors import UserError
from ecomjax.experiments.assembly import Base
from ecomjax.hf.checkpoints import save_pretrained


def imported(package: str) -> Any:
    """A package of the peer; UserError where it is not installed, or ours would not run on the
    CPU, where the peer does."""
    if jax.default_backend() != "cpu":
        raise UserError(
            f"devices of the kind {jax.default_backend()}",
            "the peer of this benchmark, which runs on the CPU",
            "set JAX_PLATFORMS=cpu",
        )
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"no package {error.name!r}", "the peer of this benchmark", "run launch/test.sh first"
        ) from error


def load_peer(base: Base, kind: str = "CausalLM", **changes: Any) -> Any:
    """The model of transformers with the weights of a base, in float32 and for inference.

    Args:
        base: the model.
        kind: of the peer, as its class is called; a head that the base lacks is drawn.
        changes: fields of its config.
    """
    imported("torch")
    transformers = imported("transformers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(folder, base.config, base.params, base.tokenizer)
        return (
            getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, **changes).eval()
        )
