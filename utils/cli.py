"""The command line that all mains share, published flags included, and one way to report errors.

Imports nothing heavy: ``--help`` answers at once.
"""

import argparse
import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, NoReturn, cast

from utils.limits import LIMITS, error_number, first_line, worker_failure
from utils.names import visible
from utils.streams import guard_streams

# flag -> configuration key; a flag that is not given leaves the configuration alone
_VALUES: dict[str, tuple[str, type, str]] = {
    "--batch-size": ("TRAIN.BATCH_SIZE", int, "images per process and micro-batch"),
    "--data-path": ("DATA.PATH", str, "root folder of the data set"),
    "--dataset": (
        "DATA.DATASET",
        str,
        "imagefolder, folder, folder_split, zip, packed, cifar10, cifar100, stl10, tinyimagenet, "
        "pets, digits, mnist5k",
    ),
    "--cache-mode": ("DATA.CACHE_MODE", str, "zip only: no, full or part"),
    "--resume": (
        "RESUME",
        str,
        "checkpoint to go on from, instead of the newest of the run's folder",
    ),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", int, "micro-batches per optimiser step"),
    "--epochs": ("TRAIN.EPOCHS", int, "epochs of the whole run"),
    "--output": ("OUTPUT", str, "output root; a run writes to OUTPUT/NAME/TAG"),
    "--tag": ("TAG", str, "name of this run"),
    "--seed": ("SEED", int, "seed of everything random"),
    "--precision": (
        "TRAIN.PRECISION",
        str,
        "auto (what the device is fast at), fp32, bf16 or fp16",
    ),
    "--device": ("DEVICE", str, "auto, cpu or cuda"),
}
_SWITCHES = {
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        True,
        "recompute activations of the online network to save memory",
    ),
    "--zip": ("DATA.DATASET", "zip", "data set as zip files with maps"),
    "--download": ("DATA.DOWNLOAD", True, "let torchvision download the data set"),
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written: an example stays one line to copy."""


class Parser(argparse.ArgumentParser):
    """Refuses what it does not know, in two lines."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; the usage, which may fill a page, is left to --help."""
        self.exit(2, f"error: {message}\nSee {self.prog} --help\n")

    def parse_strictly(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse, refusing an unknown flag with the nearest known one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.5)
            self.error(
                f"unknown argument {unknown[0]!r}"
                + (f"; did you mean {close[0]}?" if close else "")
            )
        return args


def make_parser(
    description: str,
    renamed: dict[str, str] | None = None,
    flags: Collection[str] | None = None,
) -> Parser:
    """Return the parser of the shared flags; with `flags` of --cfg, --opts and those only.

    `renamed` maps a flag to another key (the probe's epochs).
    """
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--cfg", metavar="FILE", help="yaml configuration, see configs/")
    parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY VALUE",
        help="override any configuration key",
    )
    for flag, (key, kind, text) in _VALUES.items():
        if flags is not None and flag not in flags:
            continue
        key = (renamed or {}).get(flag, key)
        parser.add_argument(
            flag, dest=key, type=kind, default=argparse.SUPPRESS, help=f"{text} [{key}]"
        )
    if flags is not None:
        return parser
    for flag, (key, value, text) in _SWITCHES.items():
        parser.add_argument(
            flag,
            dest=key,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=f"{text} [{key}={value}]",
        )
    parser.add_argument(
        "--amp-opt-level",
        choices=["O0", "O1", "O2"],
        default=argparse.SUPPRESS,
        help="published spelling of --precision: O0 fp32, O1 and O2 mixed (bf16 where possible)",
    )
    parser.add_argument(
        "--eval", action="store_true", help="evaluate the newest checkpoint and stop"
    )
    parser.add_argument(
        "--throughput", action="store_true", help="measure the backbone's images/s and stop"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    return parser


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which network of a file of several is meant."""
    parser.add_argument(
        "--which",
        choices=["online", "target", "student", "teacher"],
        default="",
        help="network of a file of several (student is online, teacher target); default: the one "
        "that the original evaluates",
    )


def answer_at_once(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Answer --help and a mistyped flag, before the program imports anything slow.

    `argv` are the words, by default those of the command line. An error in the imports that
    follow, Ctrl-C too, ends as one in `run_main` does.
    """
    guard_streams()
    sys.excepthook = _end_of_import
    if isinstance(parser, Parser):
        parser.parse_strictly(argv)
    else:
        parser.parse_args(argv)


def _end_of_import(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    explained = _explain(error)
    if explained is None:
        sys.__excepthook__(kind, error, trace)
        return
    code, message = explained
    _report(error, message)
    # Python takes the exit code of a SystemExit that the hook raises
    sys.exit(code)


def parse(
    parser: Parser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments and the configuration keys that flags set.

    ``--local_rank`` (old launchers) becomes the environment variable that torchrun sets.
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
    import torch

    no_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return "fp16" if no_bf16 else "bf16"


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a main and exit: one line for what the user can mend, a traceback for what only we can.

    Exit codes: 0 done, 1 a fault of ours, 2 bad input or a full disk, 3 gradients not finite, 4 out
    of memory, 5 a loader worker or another process failed, 75 preempted (start the same command
    again), 130 stopped at once. With ``SYNCO_DEBUG=1`` the one line is preceded by its traceback.
    """
    guard_streams()
    try:
        code = _recorded(main)()
    except (Exception, KeyboardInterrupt) as error:
        explained = _explain(error)
        if explained is None:
            raise
        code, message = explained
        _report(error, message)
    else:
        _leave_processes()
    sys.exit(code)


def _recorded(main: Callable[[], int]) -> Callable[[], int]:
    """Under torchrun, let its own report name an error that ``main`` raises."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record  # takes seconds: torch

    return cast("Callable[[], int]", record(main))


_CODES = {"NonFiniteError": 3, "LoaderError": 5}
_MEMORY_REMEDY = "lower --batch-size and raise --accumulation-steps, or add --use-checkpoint"


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and line of an error that a person can mend, None of a fault of ours.

    Types of other modules go by name, since nothing heavy is imported here.
    """
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
        import traceback

        with contextlib.suppress(OSError):  # as below
            traceback.print_exception(error)
    rank = os.environ.get("RANK") or "0"
    # An error that all ranks share has one reporter; and all read the same configuration.
    reporter = (
        "0" if type(error).__name__ == "ConfigError" else str(getattr(error, "reporter", rank))
    )
    if rank == reporter and _first_to_say(message):
        text = visible(message, keep="\n").replace("\n", "\n  ")  # no name begins a line of its own
        with contextlib.suppress(OSError):  # a log on a full disk must not change the exit code
            sys.stderr.write(f"error{'' if rank == '0' else f' (rank {rank})'}: {text}\n")


def _first_to_say(message: str) -> bool:
    if "torch" not in sys.modules:
        return True
    from utils.heartbeat import first_to_say

    return first_to_say(message)


def _leave_processes() -> None:
    if "torch" in sys.modules:
        from utils.distributed import close_processes

        close_processes()
