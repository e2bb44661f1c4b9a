"""Models so small that whole experiments run in seconds: folders to give as model.path."""

import contextlib
import socket

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

from configs import finetune, icl, score, study
from ecomjax import trees
from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.experiments import evaluate
from ecomjax.experiments import finetune as finetune_experiment
from ecomjax.experiments.config import from_config
from ecomjax.hf import families
from ecomjax.hf.checkpoints import open_pretrained, save_pretrained
from ecomjax.hf.peft import write_adapter
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.models import registry
from ecomjax.models.bert import BertConfig
from ecomjax.models.llama import LlamaConfig
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.queryner import QueryNer
from ecomjax.typing import LowRank

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIGS = {"finetune": finetune, "icl": icl, "score": score, "study": study}
SMALL = {
    "data.train_size": 24,
    "data.validation_size": 8,
    "data.test_size": 12,
    "adapter.rank": 2,
    "training.epochs": 2,
    "training.batch_size": 4,
    "training.validation_examples": 6,
    "training.checkpoint_every": 2,
    "task.max_new_tokens": 8,
    "mesh.data": 1,
    "evaluation.batch_size": 6,
    "evaluation.resamples": 50,
    "fewshot.shots": (0, 2),
    "fewshot.select_examples": 8,
}
"""Six steps an epoch, of which the second and the fourth are checkpoints."""


def _train_tokenizer() -> Tokenizer:
    """A byte-level BPE of 600 tokens, learnt from the prompts of two tasks and a few rows."""
    tasks = [Esci(), QueryNer()]
    texts = [task.system for task in tasks]
    for task in tasks:
        for example in task.load(SyntheticSource(1, Sizes(train=50)), "train"):
            texts += [task.user(example), task.answer(example)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    return Tokenizer(backend, special, TEMPLATE, "test")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of a random Llama of 2 layers, 16 wide, with its tokenizer."""
    tokenizer = _train_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn=32,
        tied_embeddings=True,
        max_positions=1024,
    )
    shapes, _ = registry.describe(registry.build(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_pretrained(folder, config, params, tokenizer)
    return folder


def _train_words() -> Tokenizer:
    """One of whole words, those of a few rows of two tasks, as BERT takes them."""
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    texts = []
    for task in (Esci(), QueryNer()):
        for example in task.load(SyntheticSource(0, Sizes(train=50)), "train"):
            texts.append(task.user(example))
    special = list(names.values())
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=400, special_tokens=special)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return Tokenizer(backend, names, None, "test")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """The folder of a random BERT of 2 layers, 32 wide, with its tokenizer."""
    tokenizer = _train_words()
    config = BertConfig(tokenizer.vocab_size, 32, 2, 2, 64, max_positions=96)
    params = jax.device_get(registry.init(registry.build(config), jax.random.key(0)))
    folder = tmp_path_factory.mktemp("base") / "encoder"
    save_pretrained(folder, config, params, tokenizer)
    return folder


def _set(config, path, value):
    """Sets a dotted path wherever a config, or a section of a study, has it; task is any task.

    One without a dot is of the config alone.
    """
    section = path.partition(".")[0]
    parts = [config.get(name, {}) for name in ("finetune", "icl", "conventional")]
    nodes = [config, *(section for part in parts for section in part.values())]
    nodes += [config.mixed] if "mixed" in config else []
    nodes = nodes if "." in path else [config]
    if section == "task":
        trained = [node.tasks for node in nodes if node.experiment == "finetune"]
        nodes += [{"task": task} for tasks in trained for task in tasks.values()]
    for node in nodes:
        if section in node:
            *parents, key = path.split(".")
            for parent in parents:
                node = node[parent]
            with node.ignore_type():
                node[key] = value


@pytest.fixture(scope="session")
def make_config(tiny_base):
    """Function (experiment, argument, dotted changes) -> small config on the tiny base.

    Studies have conventional models where the folder of an encoder is given.
    """

    def make(experiment, argument="esci", changes=(), encoder=None):
        raw = CONFIGS[experiment].get_config(argument)
        if experiment == "study" and encoder is None:
            raw.conventional = ConfigDict()
        for path, value in ({"model.path": str(tiny_base)} | SMALL | dict(changes)).items():
            _set(raw, path, value)
        for section in raw.get("conventional", {}).values():
            section.model.path = str(encoder)
        return from_config(raw)

    return make


@pytest.fixture(scope="session")
def base(tiny_base):
    return open_pretrained("tiny", str(tiny_base))


@pytest.fixture
def make_adapter(base, tmp_path):
    """Function (seed, ranks by path, alpha, dtype, dropout) -> folder of a random adapter."""
    table = families.rule_table(base.config)
    rules = {rule.ours: rule for rule in table.rules if rule.transposed}

    def make(seed, ranks=None, alpha=6.0, dtype=np.float32, dropout=0.0):
        rng = np.random.default_rng(seed)
        leaves = {}
        for path, rank in (ranks or dict.fromkeys(rules, 3)).items():
            stack, (d_out, d_in) = rules[path].stack(table.sizes), rules[path].shape(table.sizes)
            a = 0.2 * rng.standard_normal((*stack, d_in, rank), np.float32)
            b = 0.2 * rng.standard_normal((*stack, rank, d_out), np.float32)
            scale = np.full(stack, alpha / rank, np.float32)
            leaves[path] = LowRank(a.astype(dtype), b.astype(dtype), scale, dropout)
        folder = tmp_path / f"adapter-{seed}"
        write_adapter(folder, trees.unflatten(leaves), base.config, base.identity())
        return folder

    return make


@contextlib.contextmanager
def _as_in_production():
    tried = []

    def refuse(*target):
        tried.append(target)
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    assert not tried, f"something asked the network for {tried}"


@pytest.fixture(scope="session")
def as_in_production():
    """Context in which whole experiments run: without a network, and optax mixes dtypes."""
    return _as_in_production


@pytest.fixture(scope="session")
def run():
    """Function (config, folder): trains there and scores, as the commands do."""

    def run(config, folder):
        with _as_in_production():
            finetune_experiment.run(config, str(folder))
            evaluate.run(config, str(folder))

    return run


def _contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("run.json", ".lock", "report.md", "report.html")
        and "tensorboard" not in path.parts
    }


@pytest.fixture(scope="session")
def contents():
    """Function folder -> {file: bytes} of all that must not depend on when it was made."""
    return _contents
