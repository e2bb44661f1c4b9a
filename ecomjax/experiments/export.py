"""An adapter for other programs: fused into its base, or alone in PEFT layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from ecomjax.experiments.assembly import say
from ecomjax.experiments.config import ExportConfig
from ecomjax.experiments.files import write_json
from ecomjax.experiments.given import check_unchanged, common_base, find_adapter, read_given
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.checkpoints import load_config, open_pretrained, save_fused
from ecomjax.hf.files import remove_leftovers
from ecomjax.hf.peft import write_adapter
from ecomjax.hf.vllm import refusals


def run(config: ExportConfig, workdir: str) -> None:
    """Writes `model/`, which transformers loads, or `adapter/`, which PEFT does, and export.json.

    Raises:
        UserError: no adapter, or one of another base; what vLLM could not serve, where it is to.
    """
    if hosts.several():
        raise UserError("exporting is the work of one process", workdir, "start the command once")
    if not config.adapter:
        raise UserError("no adapter", "config.adapter", "name its folder, or a run folder")
    if config.model.quantization != "none":
        raise UserError(
            "adapters are fused into weights that are not quantized",
            "config.model.quantization",
            "leave it at none",
        )
    found, folder = find_adapter(config.adapter), Workdir(workdir)
    target = folder.adapter if config.output == "adapter" else folder.model
    if target.exists() and not folder.run.exists():
        raise UserError(
            "the folder holds what no export has made", str(target), "use another --workdir"
        )
    with folder.writing(config):
        if folder.export.exists() and target.exists():
            check_unchanged(folder.export, [found])
            say(f"exported before: {target}")
            return
        remove_leftovers(target)
        _export(config, found, folder, target)


def _export(config: ExportConfig, found: Path, folder: Workdir, target: Path) -> None:
    model = config.model
    opened = None
    if config.output == "model":
        opened = open_pretrained(model.name, model.path, model.param_dtype)
    shape = opened.config if opened else load_config(model.name, model.path)
    base = common_base([found], opened.identity() if opened else None, config.any_base)
    given = read_given(found, shape)
    source = {"path": found, "sha256": given.sha256, "ranks": given.ranks, "base": given.base}
    folder.record_start(base=base, adapters=[source])
    if opened is None:
        adapter = lora.uniform(given.adapter) if config.vllm else given.adapter
        write_adapter(target, adapter, shape, base)
        _check_vllm(config, target)
    else:
        save_fused(target, opened, trees.flatten(given.adapter))
    # Last, since it marks the export as done.
    write_json(folder.export, {"output": config.output, "base": base, "adapters": [source]})
    say(f"exported {given.name} as {config.output}: {target}")


def _check_vllm(config: ExportConfig, target: Path) -> None:
    """Tells what vLLM would refuse; UserError, and no adapter, where vLLM is to serve it."""
    reasons = refusals(target, config.vllm_rank)
    if config.vllm and reasons:
        shutil.rmtree(target)
        raise UserError(
            f"vLLM would not serve it: {'; '.join(reasons)}",
            config.adapter,
            "raise config.vllm_rank with vLLM's --max-lora-rank, or set config.vllm=False and "
            "config.output=model",
        )
    say("vLLM: " + ("; ".join(reasons) or "nothing is known against it"))
