"""What of a model is trained, what is written of it, and how it is read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecomjax import placement, sharding, trees
from ecomjax.adapters import lora
from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from ecomjax.experiments.assembly import Base, load_base
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.initial import init_adapter, make_rules
from ecomjax.experiments.learners import with_head
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.checkpoints import save_pretrained
from ecomjax.hf.peft import read_adapter, write_adapter
from ecomjax.hf.safetensors_io import SafetensorsFile, write_file
from ecomjax.models.heads import ClassifierConfig
from ecomjax.tasks.base import Task
from ecomjax.training import losses
from ecomjax.training.losses import VariablesOf
from ecomjax.typing import Adapter, Params


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
    """What the config says is trained.

    All parameters are written as a folder of Hugging Face; an adapter (see `adapters.lora.init`)
    in the layout of PEFT, and the head of an encoder, which is trained with it, beside it.
    """
    if config.training.tune == "all":
        return _all(base)
    mesh = base.mesh
    params, adapter = init_adapter(base.params, base.axes, make_rules(config.adapter), key, mesh)
    start = jax.device_get(placement.gather(adapter, mesh))  # Training takes over the arrays.
    trained, fixed = lora.split(adapter)

    def write(best: Any, folder: Workdir) -> None:
        # To the base as it was loaded.
        whole = lora.since(lora.join(best, placement.gather(fixed, mesh)), start)
        hosts.on_main(lambda: write_adapter(folder.adapter, whole, base.config, base.identity))

    if not isinstance(base.config, ClassifierConfig):
        return Tuning(trained, {"params": params, "fixed": fixed}, losses.adapted, write)

    def write_both(best: Any, folder: Workdir) -> None:
        hosts.on_main(lambda: write_head(folder, best["head"]))
        write(best["adapter"], folder)

    # Training takes over these arrays too, and the base is used again.
    both = {"adapter": trained, "head": jax.tree.map(jnp.copy, params["head"])}
    frozen = {"params": {"encoder": params["encoder"]}, "fixed": fixed}
    return Tuning(both, frozen, losses.adapted_under_head, write_both)


def _all(base: Base) -> Tuning:
    """Every parameter of the base, which itself stays as it is."""

    def write(best: Any, folder: Workdir) -> None:
        hosts.on_main(lambda: save_pretrained(folder.model, base.config, best, base.tokenizer))

    return Tuning(jax.tree.map(jnp.copy, base.params), {}, losses.whole, write)


def write_head(folder: Workdir, head: Params) -> None:
    """Writes the parameters of a head into the run folder, all or nothing."""
    arrays = {path: np.asarray(leaf) for path, leaf in trees.flatten(head).items()}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    write_file(folder.head, shapes, arrays.items())


def read_head(folder: Workdir, base: Base) -> Params:
    """The parameters of the head in a run folder, on their devices.

    Raises:
        UserError: there is none, or it is no head of this base.
    """
    if not folder.head.is_file():
        raise UserError("no head", str(folder.head), "train again, in another --workdir")
    own = trees.flatten(base.params["head"])
    file = SafetensorsFile(folder.head)
    if {path: leaf.shape for path, leaf in own.items()} != {p: file[p].shape for p in file}:
        raise UserError(
            "the head has other shapes than the task's", str(folder.head), "use its own config"
        )
    head = {path: file[path] for path in own}
    lies = {path: leaf.sharding for path, leaf in own.items()}
    return placement.shard_params(trees.unflatten(head), trees.unflatten(lies))


def load_trained(
    config: FinetuneConfig, tasks: Mapping[str, Task], folder: Workdir
) -> tuple[Base, dict[str, Any]]:
    """The model of a run, with its head if it has one, and its variables."""
    if config.training.tune == "all":
        model = dataclasses.replace(config.model, path=str(folder.model))
        base = load_base(model, config.mesh, any_kind=True)
        return base, {"params": base.params}
    base = load_base(config.model, config.mesh, any_kind=True)
    base = with_head(base, tasks, config.training)
    if isinstance(base.config, ClassifierConfig):
        head = read_head(folder, base)
        base = dataclasses.replace(base, params=base.params | {"head": head})
    return base, with_adapter(base, read_adapter(folder.adapter, base.config, base.identity))


def with_adapter(base: Base, adapter: Adapter) -> dict[str, Any]:
    """The weights of a base and an adapter, on their devices."""
    lora.check_paths(base.params, adapter)
    specs = sharding.adapter_specs(adapter, base.axes, base.params, base.mesh)
    placed = placement.shard_params(adapter, sharding.shardings(specs, base.mesh))
    return {"params": base.params, "lora": placed}
