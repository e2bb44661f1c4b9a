"""The peer's side of a recipe: what a config of finetune says, done by the Trainer of transformers.

Examples come tokenized by us, and learning rates from our schedule. All else is the peer's own:
model, new weights, order of the examples, padding, loss, clipping, AdamW.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from typing import Any

import numpy as np

from ecomjax.data.encoded import NO_CLASS, Encoded, EncodedSet
from ecomjax.experiments.assembly import (
    Base,
    load_base,
    load_examples,
    make_predictor,
    make_tasks,
)
from ecomjax.experiments.benchmarks.peer import imported, load_peer
from ecomjax.experiments.benchmarks.training import NO_LABEL
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.finetune import NO_MATTER
from ecomjax.experiments.initial import make_optimizer
from ecomjax.experiments.learners import with_head
from ecomjax.experiments.task_data import prepare
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.files import replace_folder
from ecomjax.hf.tokenizer import Tokenizer

AT_ONCE = 4
"""Examples of a decoder computed at once, at most, since its logits are large. Gradients of a step
are added up, and its loss is divided by the targets of all of it, so this changes but rounding."""

TOLD_EVERY = 20
"""Steps after which the loss is told."""


def train(config: FinetuneConfig, folder: Workdir) -> None:
    """Trains to the last step, unless that is done, and keeps what is trained in the folder.

    It lies where our own training puts it, `folder.adapter` or `folder.model`, and is scored by
    the same command.

    Raises:
        UserError: the folder is that of another config, or a package of the peer is missing.
    """
    whole = config.training.tune == "all"
    kept = folder.model if whole else folder.adapter
    with folder.writing(config, ignore=NO_MATTER):
        if kept.is_dir():
            return
        base = load_base(config.model, config.mesh, any_kind=True)
        model = start(config, base)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(
                config, base.tokenizer, model, examples_of(config, base), scratch
            )
            # Its progress bar writes losses to stdout, where results are.
            with contextlib.redirect_stdout(sys.stderr):
                trainer.train()
        with replace_folder(kept) as new:
            # No embeddings are trained; PEFT would ask the Hub whether they have grown.
            model.save_pretrained(new, **({} if whole else {"save_embedding_layers": False}))
            if whole:
                base.tokenizer.save(new)


def examples_of(config: FinetuneConfig, base: Base) -> EncodedSet:
    """The examples that our own training learns from."""
    tasks = make_tasks(config.tasks)
    ((label, task),) = tasks.items()
    asked = with_head(base, tasks, config.training)
    predictor = make_predictor(asked, task, config.tasks[label], config.evaluation)
    validation = load_examples(task, config.data, "validation")
    return prepare(label, predictor, validation, config).train


def row_of(example: Encoded) -> dict[str, list[int]]:
    """What the peer reads of an example, with a label at each token that has a loss."""
    row = {"input_ids": list(example.tokens)}
    if not example.marks:
        unlearnt, learnt = example.prompt, example.tokens[example.prompt :]
        return row | {"labels": [NO_LABEL] * unlearnt + list(learnt)}
    types, classes = zip(*example.marks, strict=True)
    labels = [NO_LABEL if number == NO_CLASS else number for number in classes]
    return row | {"token_type_ids": list(types), "labels": labels}


def start(config: FinetuneConfig, base: Base) -> Any:
    """The model of the peer before its first step, new weights drawn by the seed.

    An encoder gets a head for the words of the one task, a decoder adapters of PEFT.
    """
    imported("torch")
    transformers = imported("transformers")
    transformers.set_seed(config.training.seed)
    if config.training.tune == "all":
        (task,) = make_tasks(config.tasks).values()
        named = dict(enumerate(task.tags or ()))
        return load_peer(
            base,
            "TokenClassification",
            id2label=named,
            label2id={tag: number for number, tag in named.items()},
            # Where ours drops too, and nowhere else.
            hidden_dropout_prob=config.training.dropout,
            attention_probs_dropout_prob=0.0,
            classifier_dropout=0.0,
        )
    peft = imported("peft")
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
    )
    return peft.get_peft_model(load_peer(base), adapter)


def make_trainer(
    config: FinetuneConfig, tokenizer: Tokenizer, model: Any, examples: EncodedSet, scratch: str
) -> Any:
    """The Trainer of a model, by the recipe of the config.

    Args:
        config: of the run.
        tokenizer: of the model, for padding.
        model: of the peer, as it starts.
        examples: see `examples_of`.
        scratch: an empty folder.
    """
    torch, transformers = imported("torch"), imported("transformers")
    settings, recipe = config.training, config.optimizer
    at_once = settings.batch_size
    if settings.tune == "lora":
        at_once = math.gcd(settings.batch_size, AT_ONCE)
    tokenizer.save(scratch)
    padding = transformers.PreTrainedTokenizerFast.from_pretrained(scratch, padding_side="right")
    padding.pad_token = padding.convert_ids_to_tokens(tokenizer.pad_id)
    _, schedule = make_optimizer(
        recipe, settings.epochs * math.ceil(len(examples) / settings.batch_size)
    )
    peak = recipe.learning_rate
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=peak,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.asarray(schedule(step))) / peak
    )
    arguments = transformers.TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=settings.batch_size // at_once,
        max_grad_norm=recipe.clip_norm,
        seed=settings.seed,
        logging_steps=TOLD_EVERY,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[row_of(example) for example in examples],
        data_collator=transformers.DataCollatorForTokenClassification(padding),
        optimizers=(optimizer, rates),
    )
