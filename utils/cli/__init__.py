"""The command line that all mains share, and one way to report errors.

Imports nothing heavy: `--help` answers at once.
"""

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn, cast

from utils.cli.parser import (
    Parser,
    add_which,
    make_parser,
    make_transfer_parser,
    names_nothing,
)
from utils.cli.reporter import first_of_machine, let_another_report
from utils.cli.streams import guard_streams
from utils.config.key import Program, Value
from utils.config.programs import answer_from_config
from utils.config.schema import Schema
from utils.limits import LIMITS, error_number, first_line, worker_failure
from utils.names import visible

__all__ = [
    "Parser",
    "add_which",
    "answer_at_once",
    "at_failure",
    "lost_processes",
    "make_parser",
    "make_transfer_parser",
    "parse",
    "run_main",
]


def answer_at_once(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    program: Program | None = None,
    schema: Schema | None = None,
) -> None:
    """Answer --help and a mistyped flag, before the program imports anything slow.

    With `program` the configuration is checked too, or shown; its keys are those of `schema`, by
    default those of pretraining and evaluation. `argv` are the words, by default those of the
    command line. An error here or in the imports that follow, Ctrl-C too, ends as one
    in `run_main` does.
    """
    guard_streams()
    sys.excepthook = _end_of_import
    # else a run of the default recipe would start, and leave its folder
    if names_nothing(parser, argv):
        parser.print_help()
        sys.exit(2)
    if not isinstance(parser, Parser):
        parser.parse_args(argv)
        return
    args, flags = parse(parser, argv)
    answer = program and answer_from_config(program, args, flags, schema)
    if answer:
        sys.stdout.write(answer)
        sys.exit()


def _end_of_import(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    explained = _explain(error)
    if explained is None:
        sys.__excepthook__(kind, error, trace)
        return
    code, message = explained
    if isinstance(error, ValueError) and not first_of_machine():
        let_another_report()
    else:
        _report(error, message)
    # Python takes the exit code of a SystemExit that the hook raises
    sys.exit(code)


def parse(
    parser: Parser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Value]]:
    """Return the arguments and the configuration keys that flags set.

    `--local_rank` (old launchers) becomes the environment variable that torchrun sets.
    """
    # Read when torch is loaded: idle threads sleep; spinning ones make a busy machine ten times
    # slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Also read then: without it every rank prints torch's advice to switch off the search for
    # unused parameters, which `Precision.wrap` needs.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = parser.parse_strictly(argv)
    values = vars(args)
    if "local_rank" in values:
        os.environ.setdefault("LOCAL_RANK", str(values["local_rank"]))
    flags = {key: value for key, value in values.items() if key.isupper()}
    if "amp_opt_level" in values and "TRAIN.PRECISION" not in flags:
        flags["TRAIN.PRECISION"] = "fp32" if values["amp_opt_level"] == "O0" else _mixed_precision()
    return args, flags


def _mixed_precision() -> str:
    """Return what a GPU without bf16 needs, once torch is there to be asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "bf16"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# Functions that note the reason of an error that ends the program, for a run before training.
at_failure: list[Callable[[str], None]] = []


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a main and exit: one line for what the user can mend, a traceback for what only we can.

    Exit codes: 0 done, 1 a fault of ours, 2 bad input or a full disk, 3 gradients not finite, 4 out
    of memory, 5 a loader worker or another process failed, 75 preempted (start the same command
    again), 130 stopped at once. With `SYNCO_DEBUG=1` the one line is preceded by its traceback.
    """
    guard_streams()
    try:
        code = _recorded(main)()
    except (Exception, KeyboardInterrupt) as error:
        explained = _explain(error)
        for tell in at_failure if isinstance(error, Exception) else []:
            tell(explained[1] if explained else f"{type(error).__name__}: {error}")
        if explained is None:
            raise
        code, message = explained
        _report(error, message)
    else:
        _leave_processes()
    sys.exit(code)


def _recorded(main: Callable[[], int]) -> Callable[[], int]:
    """Under torchrun, let its own report name an error that `main` raises."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record  # takes seconds: torch

    return cast("Callable[[], int]", record(main))


_CODES = {"NonFiniteError": 3, "LoaderError": 5}
_MEMORY_REMEDY = "lower --batch-size and raise --accumulation-steps, or add --use-checkpoint"


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and line of an error that a person can mend, None for a bug of this code."""
    # Types of other modules go by their names: nothing heavy is imported here.
    name, text = type(error).__name__, str(error)
    number = error_number(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, text or "stopped by Ctrl-C"
    if name in _CODES:
        return _CODES[name], text
    # torch's SIGCHLD handler raises it anywhere in the main thread
    if text.startswith("DataLoader worker"):
        return 5, worker_failure(text)
    if number == errno.ENOMEM or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return 4, f"out of memory; {_MEMORY_REMEDY}: {first_line(text)}"
    # torch's batch norm, at the first step
    if text.startswith("Expected more than 1 value per channel"):
        return 2, "--batch-size 1: batch norm needs at least 2 images on each process; raise it"
    # torch, on a GPU, for example where a map is resized in training (segmentation, local crops)
    operation, found, _ = text.partition(" does not have a deterministic implementation")
    if found:
        return 2, f"TRAIN.DETERMINISTIC: {operation} has no reproducible form; set it to False"
    if isinstance(error, (ValueError, ImportError)):
        return 2, text
    if isinstance(error, OSError) and number in (0, errno.ENOSPC):
        return 2, f"{text}; check the path, its permissions and the free space"
    if lost_processes(error):
        return 5, f"lost the other processes; {_who_is_missing()}: {first_line(text)}"
    return (5, LIMITS[number]) if number else None


def lost_processes(error: BaseException) -> bool:
    """Tell whether a collective failed: another process hangs or is gone."""
    lost = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in lost or "gloo" in str(error)


def _who_is_missing() -> str:
    from utils.heartbeat import missing

    return missing() or "one of them says why, or was killed"


def _report(error: BaseException, message: str) -> None:
    if os.environ.get("SYNCO_DEBUG"):
        with contextlib.suppress(OSError):  # as below
            traceback.print_exception(error)
    rank = os.environ.get("RANK") or "0"
    if type(error).__name__ == "ConfigError":  # all of a machine read the same configuration
        reports = first_of_machine()
    else:  # an error that all ranks share has one reporter
        reports = rank == str(getattr(error, "reporter", rank))
    if not reports or not _first_to_say(message):
        let_another_report()
    else:
        text = visible(message, keep="\n").replace("\n", "\n  ")  # no name begins a line of its own
        with contextlib.suppress(OSError):  # a log on a full disk must not change the exit code
            sys.stderr.write(f"error{'' if rank == '0' else f' (rank {rank})'}: {text}\n")


def _first_to_say(message: str) -> bool:
    if "torch" not in sys.modules:
        return True
    from utils.heartbeat import first_to_say

    return first_to_say(message)


def _leave_processes() -> None:
    if sys.modules.get("torch"):
        from utils.distributed import close_processes

        close_processes()
