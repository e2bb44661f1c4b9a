"""Measures ecomjax, after showing that it does what it should: beside a peer, or beside limits.

python -m launch.benchmark packing [--data=DIR] [--json]
python -m launch.benchmark train train_esci raw_step [--data=DIR] [--json]
python -m launch.benchmark memory startup [--json]
python -m launch.benchmark growth [--figure=growth.svg] [--json]
python -m launch.benchmark decode decode_free decode_plain icl icl_onepass [--data=DIR] [--json]
python -m launch.benchmark merge [--json]
python -m launch.benchmark merge_7b [--methods=linear,concatenation,svd,ties,dare_ties] [--json]
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging

from ecomjax.errors import UserError
from launch.command import errors_in_one_line

DATA = flags.DEFINE_string(
    "data", "../shared/data", "Folder of real data, DIR/<task>/train.jsonl; or synthetic."
)
METHODS = flags.DEFINE_list("methods", [], "Of merge_7b; all of them if none is named.")
FIGURE = flags.DEFINE_string("figure", "growth.svg", "Of growth; ends in .png or .svg.")
JSON = flags.DEFINE_bool("json", False, "Whether each result is told as a line of JSON too.")


def parse(argv):
    """The names of benchmarks from the command line."""
    if {"--help", "-help", "-h"} & set(argv):
        print(__doc__)
        sys.exit(0)
    with errors_in_one_line():
        try:
            names = flags.FLAGS(argv)
        except flags.Error as error:
            raise UserError("bad flags", str(error), "see --help") from error
        if not names[1:]:
            raise UserError("no benchmark named", "launch.benchmark", "see --help")
        return names


def main(argv):
    logging.set_verbosity(logging.WARNING)
    with errors_in_one_line():
        from ecomjax.experiments.benchmarks import registry

        given = registry.Given(DATA.value, figure=Path(FIGURE.value))
        if METHODS.value:
            given = given._replace(methods=METHODS.value)
        for result in registry.run(argv[1:], given):
            print(result, flush=True)
            if JSON.value:
                print(json.dumps(result.to_dict()), flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
