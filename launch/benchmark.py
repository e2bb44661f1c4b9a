"""Measures ecomjax beside a peer that does the same work, after showing that it is the same.

python -m launch.benchmark packing [--data=DIR] [--json]
"""

import json
import sys

from absl import app, flags, logging

from ecomjax.errors import UserError
from launch.command import errors_in_one_line

DATA = flags.DEFINE_string(
    "data", "../shared/data", "Folder of real data, DIR/<task>/train.jsonl; or synthetic."
)
JSON = flags.DEFINE_bool("json", False, "Whether the last line is one JSON object.")


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
        from ecomjax.experiments import benchmark

        for result in benchmark.run(argv[1:], DATA.value):
            print(
                f"{result.name}: ours {result.ours:.4g}, peer {result.peer:.4g} {result.unit}; "
                f"ratio {result.ours / result.peer:.3f}, target at most {result.target}"
            )
            if JSON.value:
                print(json.dumps(result.to_dict()))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
