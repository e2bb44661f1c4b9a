"""The command line that all mains share: flags in, one clear line out where they are wrong.

Exit status 0: done; 2: a mistake of the user, told in one line; 75: preempted, and to be started
again with the same command; 130: interrupted; 141: nobody reads the output any more.

Where several processes are one run, each is started with the same flags, but for --process.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from ecomjax import preemption
from ecomjax.errors import UserError
from ecomjax.experiments.config import from_config

# Overrides of unknown keys pass here, so that `from_config` tells them like all other mistakes.
CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Config file and its argument, such as configs/finetune.py:queryner; "
    "--config.a.b=c overrides a key.",
    lock_config=False,
    accept_new_attributes=True,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; the same command resumes there.")
HOSTS = flags.DEFINE_enum(
    "hosts",
    None,
    ["auto"],
    "This is one of several processes, as TPU VM, SLURM, Open MPI or GKE describes them.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes, where nothing does."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many there are, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", None, "Number of this one from 0, with --coordinator.")
JOIN_SECONDS = flags.DEFINE_integer("join_seconds", 300, "How long they wait for each other.")
HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "Silence after which one of them counts as dead, and all end."
)

OF_SEVERAL = ("hosts", "coordinator", "processes", "process", "join_seconds", "heartbeat_seconds")
"""Flags of a command that several processes can run as one."""


def main(run: Callable[[Any, str], Any], experiments: Sequence[str]) -> None:
    """Runs `run(config, workdir)` on the flags; `experiments` are those it can do."""

    def checked(_: Sequence[str]) -> None:
        # Orbax tells every file it writes; what a run has to tell, it prints.
        logging.set_verbosity(logging.WARNING)
        with errors_in_one_line():
            config = checked_config(experiments)
            with preemption.raised():
                together(lambda: run(config, str(WORKDIR.value)))
            sys.stdout.flush()

    app.run(checked, flags_parser=parse)


def together(run: Callable[[], Any]) -> None:
    """Runs what this process and those that its flags name do as one."""
    from ecomjax.experiments import compiled, hosts

    hosts.initialize(
        HOSTS.value == "auto",
        COORDINATOR.value,
        PROCESSES.value,
        PROCESS.value,
        JOIN_SECONDS.value,
        HEARTBEAT_SECONDS.value,
    )
    compiled.keep()
    with (
        hosts.ending_together(),
        errors_in_one_line(),
        hosts.one_voice(),
        preemption.raised_alone(),
    ):
        run()


def checked_config(experiments: Sequence[str]) -> Any:
    """The config that the flag names.

    Raises:
        UserError: a mistake in it, or an experiment that is not one of those.
    """
    config = from_config(CONFIG.value)
    if config.experiment not in experiments:
        known = " or ".join(experiments)
        raise UserError(
            f"experiment {config.experiment}",
            "config.experiment",
            f"this command wants a config of {known}, such as configs/{experiments[0]}.py",
        )
    return config


def parse(
    argv: list[str],
    required: Sequence[str] = ("config", "workdir"),
    words: bool = False,
) -> list[str]:
    """What of `argv` is no flag, the flags set; or one line on what is wrong with it.

    Args:
        argv: the command line.
        required: flags without which there is nothing to do.
        words: whether there may be anything but flags.
    """
    if {"--help", "-help", "-h"} & set(argv):
        print(f"{sys.modules['__main__'].__doc__}\nflags:\n{_help(required)}")
        sys.exit(0)
    with errors_in_one_line():
        try:
            rest = flags.FLAGS(argv)[1:]
            # A config file that could not be read raises when it is first looked into.
            getattr(CONFIG.value, "keys", None)
        except (
            flags.Error,
            OSError,
            KeyError,
            ValueError,
            AttributeError,
            SyntaxError,
        ) as error:
            raise _explain(error, argv) from error
        for name in required:
            if not flags.FLAGS[name].value:
                raise UserError("missing flag", f"--{name}", "see --help")
        if rest and not words:
            raise UserError("not a flag", rest[0], "see --help")
    return [*argv[:1], *rest]


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Tells what a user can mend in one line on stderr; defects keep their traceback."""
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", 2)
    except preemption.Preempted as error:
        _end(str(error), preemption.STATUS)
    except KeyboardInterrupt:
        # All is given back by now. Interrupted twice, a save may still be underway in a thread:
        # it is left behind unfinished, since no thread may begin anything once Python ends.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _tell("interrupted; the same command resumes")
        os._exit(130)
    except BrokenPipeError:
        _discard(sys.stdout)
        _end("nobody reads the output any more; the same command resumes", 141)


def _end(line: str, status: int) -> NoReturn:
    _tell(line)
    sys.exit(status)


def _tell(line: str) -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Lets what a stream still holds go nowhere, rather than fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _help(names: Sequence[str]) -> str:
    own = [f.name for f in flags.FLAGS.get_key_flags_for_module(sys.modules["__main__"])]
    told = dict.fromkeys(["config", *names, *own, *(OF_SEVERAL if "workdir" in names else ())])
    return "\n".join(f"  --{name}: {flags.FLAGS[name].help}" for name in told)


def _explain(error: Exception, argv: Sequence[str]) -> UserError:
    """What to tell of an error that the parsing of flags ended in."""
    if isinstance(error, OSError):
        file = next((a for a in argv if a.startswith("--config=")), "--config")
        return UserError("no such config file", file, "choose one of configs/")
    if isinstance(error, AttributeError | SyntaxError):
        file = next((a for a in argv if a.startswith("--config=")), "--config")
        return UserError("no file with a get_config", file, "choose one of configs/")
    if isinstance(error, KeyError):
        return UserError("unknown key", f"{error.args[0]}", "see the keys in the config file")
    text = str(error)
    if "Traceback" in text:
        # The parser of config files wraps what get_config says in a traceback.
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        text = str(first)
    return UserError("bad flags", text, "see --help")
