"""The parser of all programs: `--help` in groups, and a remedy for each word that it does not know.

Imports nothing heavy: `--help` answers at once.
"""

import argparse
import difflib
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from utils.cli.lists import LISTS, listing
from utils.cli.published import our_spelling
from utils.cli.reporter import first_of_machine, let_another_report
from utils.cli.version import version_line
from utils.config.flags import FLAGS, GROUPS, MACHINE, OF_PRETRAINING, RUN, SPECIAL, Flag

_NEAR = 0.7  # below this similarity a suggestion misleads: `--lr` is not `--help`


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description as it is written: an example stays one line to copy."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 110) - 2
        super().__init__(prog, max_help_position=27, width=width)


class _Version(argparse.Action):
    """Prints the version, which is looked for only then, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(version_line() + "\n")
        parser.exit()


class _List(argparse.Action):
    """Prints what there is of a kind, and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, kind: object, *rest: object
    ) -> None:
        sys.stdout.write(listing(str(kind)))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Refuses unknown flags, and names the nearest one or our spelling of it."""

    section = ""  # of the program in the configuration, for messages: `LINEAR.`

    def __init__(self, **options: Any) -> None:
        # An abbreviated flag would change its meaning with the next flag of the same beginning.
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        typed = sys.argv[0]
        if typed.endswith(".py") and os.path.basename(typed) != "__main__.py":
            options.setdefault("prog", typed)  # so that `See ... --help` can be copied
        super().__init__(**options)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of `--help` with this title."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; the usage, which may fill a page, is left to --help."""
        if not first_of_machine():
            let_another_report()
            self.exit(2)
        self.exit(2, f"error: {message}\nSee {self.prog} --help\n")

    def parse_strictly(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse; refuse unknown words, each with what it is called here."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error("\n  ".join(self._remedies(unknown)))
        return args

    def _remedies(self, unknown: Sequence[str]) -> Iterator[str]:
        shown = {
            option: action
            for action in self._actions
            if action.help is not argparse.SUPPRESS
            for option in action.option_strings
        }
        for given, ours in our_spelling(unknown, self.section):
            if ours.startswith("("):
                yield f"unknown argument {given!r}: {ours[1:-1]}"
            elif ours and ours.split()[0] in shown:
                yield f"unknown argument {given!r}; here it is {ours}"
            elif given.startswith("-") or given == unknown[0]:
                near = difflib.get_close_matches(given.split()[0], shown, n=1, cutoff=_NEAR)
                yield f"unknown argument {given!r}" + (f"; did you mean {near[0]}?" if near else "")


def make_parser(
    description: str,
    renamed: Mapping[str, str] | None = None,
    flags: Collection[str] | None = None,
    idle: Collection[str] = (),
) -> Parser:
    """Return the parser of the shared flags; with `flags` of --cfg, --opts and those only.

    `renamed` maps a flag to another key, such as the number of epochs of a probe. The flags `idle`
    do nothing in this program: accepted, as in the published scripts, but not in --help.
    """
    renamed = renamed or {}
    parser = Parser(
        usage="%(prog)s --cfg FILE [flags]",
        description=description,
        formatter_class=_HelpFormatter,
        conflict_handler="resolve",  # a program may define a shared flag again
    )
    if "--epochs" in renamed:
        parser.section = renamed["--epochs"].partition(".")[0] + "."
    for title in GROUPS:
        parser.group(title)
    run = parser.group(RUN)
    run.add_argument("--cfg", metavar="FILE", help="yaml configuration, see --list recipes")
    for name, flag in FLAGS.items():
        if (flags is None and not (renamed and name in OF_PRETRAINING)) or name in (flags or ()):
            action = _add(parser, name, flag._replace(key=renamed.get(name, flag.key)))
            action.help = argparse.SUPPRESS if name in idle else action.help
    run.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="K=V",
        help="any key of --show-config; also KEY VALUE",
    )
    if flags is None:
        _add_special(parser)
    _add_lists(parser)
    return parser


def _add(parser: Parser, name: str, flag: Flag) -> argparse.Action:
    group = parser.group(flag.group)
    text = f"{flag.text} [{flag.key}]".strip()
    if flag.constant is None:
        return group.add_argument(
            name,
            dest=flag.key,
            type=flag.kind,
            metavar=flag.metavar,
            default=argparse.SUPPRESS,
            help=text,
        )
    return group.add_argument(
        name,
        dest=flag.key,
        action="store_const",
        const=flag.constant,
        default=argparse.SUPPRESS,
        help=text,
    )


def _add_special(parser: Parser) -> None:
    # the published spelling of --precision
    parser.group(MACHINE).add_argument(
        "--amp-opt-level",
        choices=["O0", "O1", "O2"],
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    special = parser.group(SPECIAL)
    special.add_argument("--eval", action="store_true", help="evaluate the newest checkpoint")
    special.add_argument(
        "--throughput", action="store_true", help="measure the backbone's images/s"
    )
    special.add_argument(
        "--show-config", action="store_true", help="each value, and where it comes from"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def _add_lists(parser: Parser) -> None:
    special = parser.group(SPECIAL)
    special.add_argument(
        "--list",
        action=_List,
        choices=list(LISTS),
        metavar="KIND",
        default=argparse.SUPPRESS,
        help=", ".join(LISTS),
    )
    special.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="of code and torch"
    )


def make_transfer_parser(description: str) -> Parser:
    """Return the parser of a program that fine-tunes a backbone for a task."""
    parser = make_parser(description)
    text = "backbone: a file, a run's folder, or none for random weights"
    parser.add_argument("--pretrained", metavar="FILE", help=text)
    add_which(parser)
    return parser


def add_which(parser: argparse._ActionsContainer) -> None:
    """Add the flag that says which network of a file of several is meant."""
    parser.add_argument(
        "--which",
        choices=["online", "target", "student", "teacher"],
        metavar="NET",
        default="",
        help="online or target (student, teacher) of a file",
    )


def names_nothing(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> bool:
    """Tell whether the command line of a program that needs `--cfg` is empty."""
    words = sys.argv[1:] if argv is None else argv
    return not words and any("--cfg" in action.option_strings for action in parser._actions)
