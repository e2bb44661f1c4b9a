"""Plans a step ahead of time, for a machine that is not at hand: does it fit, how fast may it be?

python -m launch.plan --all [--json]
python -m launch.plan llama2_7b_lora [--topology=v6e:2x4]        plans of configs/plans.py
python -m launch.plan --config=configs/finetune.py:queryner,llama2_7b --topology=v5e:2x4 \\
    --config.mesh.data=1 --config.mesh.fsdp=8
python -m launch.plan --config=configs/icl.py:esci,mixtral_8x7b --topology=v5e:4x4 \\
    --slots=512 --prefix=1024

A config of finetune plans a training step: one microbatch of config.training.rows rows on each
device that rows are split over, all slots full, and the update. A config of icl plans the scoring
of config.evaluation.batch_size prompts, or one decoding step with config.task.method=generate.

The real step is compiled, from shapes alone, by the compiler of the machine: for TPUs that is
libtpu (bash launch/setup.sh tpu), on any CPU; --topology=cuda compiles for the GPU that is here.
Memory is what the compiled program holds. Operations (2 M N K of every matrix product), bytes of
memory traffic and bytes sent in collectives are counted from its text: the compiler's own
analysis counts the body of a loop once, so here each counts as often as the loop runs, by the
trip count that stands beside the loop or the constant in its condition, nested loops multiplied;
each branch of a conditional counts once; each expert is taken to get as many tokens as the others.
Seconds are a roofline, at the peaks of ecomjax/experiments/chips.py: instructions one after
another, each bound by operations or memory, while collectives travel along one axis of the torus;
a real step takes longer. MFU counts as useful 4 N + 6 N_lora a token in training (2 N in scoring
and decoding) and causal attention; recomputation costs and is not useful. In --json, flops are
those of all chips, bytes those of one.

Exit status 0, whether or not all plans fit (the table tells); 2: a mistake of the user.
"""

import json

from absl import app, flags, logging

from ecomjax.errors import UserError
from launch import command

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice by its chips, such as v5e:2x4 or v5p:2x2x4; or cuda."
)
ALL = flags.DEFINE_bool("all", False, "Whether all plans of configs/plans.py are made.")
JSON = flags.DEFINE_bool("json", False, "One object a line, in place of the table.")
SLOTS = flags.DEFINE_integer("slots", 512, "Of few-shot prompts: slots of the part that differs.")
PREFIX = flags.DEFINE_integer("prefix", 1024, "Of few-shot prompts: slots that all open with.")


def wishes(names):
    """What the command line asks for."""
    from configs.plans import PLANS, get_config
    from ecomjax.experiments.config import from_config
    from ecomjax.experiments.plan import Prompts, Wish

    if command.CONFIG.value is not None:
        if names or ALL.value or not TOPOLOGY.value:
            raise UserError("a config is planned alone", "--config", "give it a --topology")
        config = command.checked_config(["finetune", "icl"])
        prompts = Prompts(SLOTS.value, PREFIX.value)
        return [Wish(config.model.name, config, TOPOLOGY.value, prompts)]
    for name in names:
        if name not in PLANS:
            raise UserError(
                f"unknown plan {name!r}", "configs/plans.py", f"choose of {', '.join(PLANS)}"
            )
    if ALL.value:
        names = list(PLANS)
    if not names:
        raise UserError("nothing to plan", "launch.plan", "see --help")
    found = []
    for name in names:
        plan, config = PLANS[name], from_config(get_config(name))
        prompts = Prompts(plan.length, plan.prefix)
        for topology in [TOPOLOGY.value] if TOPOLOGY.value else plan.topologies:
            found.append(Wish(name, config, topology, prompts))  # pyright: ignore[reportArgumentType]
    return found


def main(argv):
    logging.set_verbosity(logging.WARNING)
    with command.errors_in_one_line():
        from ecomjax.experiments import plan

        plans = []
        for found in plan.run(wishes(argv[1:])):
            plans.append(found)
            if JSON.value:
                print(json.dumps(found.to_dict()), flush=True)
        if not JSON.value:
            print(plan.table(plans))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command.parse(argv, (), words=True))
