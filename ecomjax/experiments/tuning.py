"""What of a model is trained, and what is written of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ecomjax import placement
from ecomjax.adapters import lora
from ecomjax.experiments import hosts
from ecomjax.experiments.assembly import Base
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.initial import init_adapter, make_rules
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.peft import write_adapter
from ecomjax.training.losses import VariablesOf, adapted
from ecomjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What of a model is trained.

    Attributes:
        trained: what the optimizer changes, as training starts from it; on the mesh.
        frozen: the rest of what the loss reads.
        variables_of: (trained, frozen) -> the variables of the model.
        write: (trained, run folder), once the best is known: what is kept of the run.
    """

    trained: Any
    frozen: dict[str, Params]
    variables_of: VariablesOf
    write: Callable[[Any, Workdir], None]


def make_tuning(config: FinetuneConfig, base: Base, key: jax.Array) -> Tuning:
    """An adapter to the base, see `adapters.lora.init`; it is written in the layout of PEFT."""
    mesh = base.mesh
    params, adapter = init_adapter(base.params, base.axes, make_rules(config.adapter), key, mesh)
    start = jax.device_get(placement.gather(adapter, mesh))  # Training takes over the arrays.
    trained, fixed = lora.split(adapter)

    def write(best: Any, folder: Workdir) -> None:
        # To the base as it was loaded.
        whole = lora.since(lora.join(best, placement.gather(fixed, mesh)), start)
        hosts.on_main(lambda: write_adapter(folder.adapter, whole, base.config, base.identity))

    return Tuning(trained, {"params": params, "fixed": fixed}, adapted, write)
