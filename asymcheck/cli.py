"""The command `asymcheck`: look at a run's checkpoints, check, compare, copy, convert, clean up.

Exit codes, for scripts:

0  done, and nothing is wrong; for `diff`: the steps are equal
1  `diff`: the steps differ; every other command: damage was found (missing, wrong or malformed
   bytes), of which the output or the message tells; `import`: the source would run code
2  usage: a wrong flag or argument, no such run, step, leaf or source, another step of the number
   to import or copy exists, an optional library is missing
3  it could not be done: the store or the output file failed, or the step is of a later version;
   for `diff`: damage was found

130 and 141 mean, as in a shell, interrupted from the keyboard and output no longer wanted.

With --json a command writes one JSON document to stdout, and nothing else goes there. Numbers
that JSON does not have (NaN, infinity) are null in it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from logging import Formatter
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
from absl import app, flags, logging

import asymcheck
from asymcheck.commit import committed_steps
from asymcheck.copying import check_distinct
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    SourceError,
    StepExistsError,
    StoreError,
    UnsupportedVersionError,
)
from asymcheck.inspection import importing
from asymcheck.inspection.collection import collect
from asymcheck.inspection.comparison import compare
from asymcheck.inspection.copies import copy_all, copy_newest, copy_step
from asymcheck.inspection.costs import run_costs
from asymcheck.inspection.export import export
from asymcheck.inspection.export import formats as export_formats
from asymcheck.inspection.leaves import describe_leaf, describe_step
from asymcheck.inspection.listing import list_steps
from asymcheck.inspection.optional import MissingLibraryError
from asymcheck.inspection.text import printable
from asymcheck.inspection.timeline import write_chrome_trace
from asymcheck.inspection.verification import verify
from asymcheck.plot import plot_run
from asymcheck.reader import open_step
from asymcheck.stores import open_store
from asymcheck.stores.base import Store
from asymcheck.traces import stored_traces

GOOD, BAD, USAGE, FAILED = 0, 1, 2, 3
_INTERRUPTED, _BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class UsageError(Exception):
    """The command line asks for nothing that there is."""


_USAGE_ERRORS = (
    *(UsageError, flags.Error, MissingLibraryError),
    *(CheckpointNotFoundError, StepExistsError),
)


class Report(Protocol):
    """What a command found."""

    def text(self) -> Iterable[str]:
        """Lines for people."""
        ...


@dataclass(frozen=True)
class Options:
    """The flags and arguments of one call."""

    flags: flags.FlagValues
    arguments: list[str]

    @property
    def url(self) -> str:
        """The run."""
        return self.arguments[0]

    @property
    def progress(self) -> bool | None:
        """Whether to show progress; None: on a terminal."""
        return self.flags.progress

    def show(self, report: Report) -> None:
        """Write a report to stdout."""
        if self.flags.json:
            plain = _without_nan(msgspec.to_builtins(report))
            print(json.dumps(plain, indent=2, allow_nan=False))
        else:
            for line in report.text():
                print(printable(line))


@dataclass(frozen=True)
class Command:
    """A command: how it is called, which flags it has, and what it does (an exit code)."""

    name: str
    arguments: str
    summary: str
    counts: range
    define: Callable[[flags.FlagValues], None]
    run: Callable[[Options], int]


# -- the commands ------------------------------------------------------------------------------


def _ls(options: Options) -> int:
    with _open(options.url) as store:
        _newest(store)
        listing = list_steps(store, options.progress)
    options.show(listing)
    return GOOD if listing.good else BAD


def _show(options: Options) -> int:
    with _open(options.url) as store:
        checkpoint = open_step(store, _step(store, options.flags.step))
        if len(options.arguments) == 1:
            options.show(describe_step(checkpoint, store.url))
        else:
            leaf = options.arguments[1]
            options.show(describe_leaf(checkpoint, store.url, leaf, options.progress))
    return GOOD


def _verify(options: Options) -> int:
    _check_step_or_all(options)
    with _open(options.url) as store:
        newest = _step(store, options.flags.step)
        steps = committed_steps(store) if options.flags.all else [newest]
        verification = verify(store, steps, options.progress)
    options.show(verification)
    return GOOD if verification.good else BAD


def _diff(options: Options) -> int:
    first, second = (_number(text) for text in options.arguments[1:])
    with _open(options.url) as store, _open(options.flags.other or options.url) as other:
        comparison = compare(
            open_step(store, _step(store, first)),
            open_step(other, _step(other, second)),
            options.progress,
        )
    options.show(comparison)
    return GOOD if comparison.same else BAD


def _copy(options: Options) -> int:
    _check_step_or_all(options)
    step, progress = options.flags.step, options.progress
    with _open(options.url) as source, _open(options.arguments[1]) as target:
        try:
            check_distinct(source, target)
        except StoreError as error:
            raise UsageError(str(error)) from error
        _step(source, step)
        if step is not None:
            copies = copy_step(source, target, step, progress)
        else:
            copies = (copy_all if options.flags.all else copy_newest)(source, target, progress)
    options.show(copies)
    return GOOD if copies.good else BAD


def _export(options: Options) -> int:
    values = options.flags
    if values.to is None or values.output is None:
        raise UsageError("export needs --to and --output")
    with _open(options.url) as store:
        checkpoint = open_step(store, _step(store, values.step))
        options.show(export(checkpoint, values.to, values.output, options.progress))
    return GOOD


def _import(options: Options) -> int:
    source, url = options.arguments
    format, step = cast("Any", options.flags)["from"].value, options.flags.step
    if format is None:
        raise UsageError("import needs --from")
    if not Path(source).exists():
        raise UsageError(f"there is nothing at {source}")
    with _open(url):
        options.show(importing.import_checkpoint(source, format, url, step))
    return GOOD


def _gc(options: Options) -> int:
    with _open(options.url) as store:
        if not store.list(""):
            raise UsageError(f"there is no run in {store.url}")
        collection = collect(store, dry_run=options.flags.dry_run)
    options.show(collection)
    return BAD if collection.damaged_steps else GOOD


def _stats(options: Options) -> int:
    values = options.flags
    with _open(options.url) as store:
        _step(store, values.step)
        traces = stored_traces(store)
        if values.trace is not None and not traces:
            raise UsageError(
                f"there is no trace in {store.url}: a run keeps one with keep_trace=True"
            )
        costs = run_costs(store, values.step, options.progress, traces)
    if values.trace is not None:
        write_chrome_trace(traces, values.trace, values.step)
    if values.plot is not None:
        plot_run(costs.steps, values.plot)
    options.show(costs)
    return GOOD if costs.good else BAD


def _step_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("step", None, "which step; by default the newest", flag_values=values)


def _verify_flags(values: flags.FlagValues) -> None:
    _step_flag(values)
    flags.DEFINE_bool("all", False, "all committed steps", flag_values=values)


def _diff_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("other", None, "the run of STEP_B, if not URL", flag_values=values)


def _copy_flags(values: flags.FlagValues) -> None:
    help = "which step; by default the newest that is whole"
    flags.DEFINE_integer("step", None, help, flag_values=values)
    flags.DEFINE_bool("all", False, "all committed steps", flag_values=values)


def _export_flags(values: flags.FlagValues) -> None:
    _step_flag(values)
    flags.DEFINE_enum("to", None, export_formats(), "format (required)", flag_values=values)
    help = "the file or directory to write (required)"
    flags.DEFINE_string("output", None, help, flag_values=values)


def _import_flags(values: flags.FlagValues) -> None:
    help = "format of SOURCE (required)"
    flags.DEFINE_enum("from", None, importing.formats(), help, flag_values=values)
    help = "the step that it becomes; by default 0"
    flags.DEFINE_integer("step", 0, help, lower_bound=0, flag_values=values)


def _gc_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("dry_run", False, "say what would go, remove nothing", flag_values=values)


def _stats_flags(values: flags.FlagValues) -> None:
    _step_flag(values)
    help = "draw bytes by codec, times and window shares of the steps to this PNG (or PDF, SVG)"
    flags.DEFINE_string("plot", None, help, flag_values=values)
    help = "write what happened when to this JSON file, for Perfetto or chrome://tracing"
    flags.DEFINE_string("trace", None, help, flag_values=values)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "ls", "URL", "List the committed steps of a run.", range(1, 2), lambda _: None, _ls
        ),
        Command(
            "show",
            "URL [LEAF]",
            "Show the leaves of a step, or statistics and first values of one leaf.",
            range(1, 3),
            _step_flag,
            _show,
        ),
        Command(
            "verify",
            "URL",
            "Read and check every byte of a step, or of all; name what is damaged or not exact.",
            range(1, 2),
            _verify_flags,
            _verify,
        ),
        Command(
            "diff",
            "URL STEP_A STEP_B",
            "Compare two steps leaf by leaf: elements changed, largest and RMS difference.",
            range(3, 4),
            _diff_flags,
            _diff,
        ),
        Command(
            "copy",
            "SOURCE TARGET",
            "Copy a step, or all, with what they decode from, to another store; checks every byte.",
            range(2, 3),
            _copy_flags,
            _copy,
        ),
        Command(
            "export",
            "URL",
            "Write a step for other programs: safetensors, npz, or a checkpoint of Orbax or torch.",
            range(1, 2),
            _export_flags,
            _export,
        ),
        Command(
            "import",
            "SOURCE URL",
            "Bring a checkpoint of Orbax or torch into a run, as a step; runs no code of it.",
            range(2, 3),
            _import_flags,
            _import,
        ),
        Command(
            "gc",
            "URL",
            "Remove what dead runs left unfinished; never touches a run that lives.",
            range(1, 2),
            _gc_flags,
            _gc,
        ),
        Command(
            "stats",
            "URL",
            "Show what each checkpoint cost, and what which codec made of which leaves, and why.",
            range(1, 2),
            _stats_flags,
            _stats,
        ),
    )
}


# -- what they share ---------------------------------------------------------------------------


def _open(url: str) -> closing[Store]:
    try:
        return closing(open_store(url))
    except StoreError as error:
        raise UsageError(str(error)) from error


def _newest(store: Store) -> int:
    steps = committed_steps(store)
    if not steps:
        raise UsageError(f"there is no checkpoint in {store.url}")
    return steps[-1]


def _step(store: Store, step: int | None) -> int:
    """The step asked for, by default the newest, whether or not it is whole."""
    newest = _newest(store)
    if step is None:
        return newest
    steps = committed_steps(store)
    if step not in steps:
        shown = ", ".join(map(str, steps[-8:]))
        raise UsageError(f"there is no step {step} in {store.url}; the newest are {shown}")
    return step


def _check_step_or_all(options: Options) -> None:
    if options.flags.all and options.flags.step is not None:
        raise UsageError("--step and --all exclude each other")


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{text!r} is not the number of a step") from None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- calling them ------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run one command line (`argv[0]` is the program's name) and return its exit code.

    Errors become one line on stderr; `BrokenPipeError` and `KeyboardInterrupt` pass.
    """
    try:
        return _dispatch(list(argv[1:]))
    except _USAGE_ERRORS as error:
        return _fail(error, USAGE)
    except UnsupportedVersionError as error:
        return _fail(error, FAILED)
    except (CorruptionError, FormatError, SourceError) as error:
        return _fail(error, FAILED if argv[1:2] == ["diff"] else BAD)
    except BrokenPipeError:
        raise
    except (AsymCheckError, OSError, MemoryError) as error:
        return _fail(error, FAILED)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] in (["--help"], ["-h"], ["help"]):
        print(_overview())
        return GOOD
    if arguments == ["--version"]:
        print(asymcheck.__version__)
        return GOOD
    if not arguments:
        raise UsageError(f"a command is missing: one of {', '.join(COMMANDS)}; see --help")
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise UsageError(
            f"there is no command {arguments[0]!r}, only {', '.join(COMMANDS)}; see --help"
        )
    values = _flags_of(command)
    if {"--help", "-h"} & set(arguments):
        print(_help(command, values))
        return GOOD
    return command.run(_parse(command, values, arguments))


def _flags_of(command: Command) -> flags.FlagValues:
    values = flags.FlagValues()
    command.define(values)
    flags.DEFINE_bool("json", False, "write JSON to stdout", flag_values=values)
    flags.DEFINE_bool(
        "progress", None, "progress on stderr; by default on a terminal", flag_values=values
    )
    return values


def _parse(command: Command, values: flags.FlagValues, arguments: list[str]) -> Options:
    """The command's flags first; what they leave may be flags of absl, such as --verbosity."""
    try:
        rest = flags.FLAGS(values(arguments, known_only=True))[1:]
    except flags.UnrecognizedFlagError as error:
        known = ", ".join(f"--{name}" for name in values)
        raise UsageError(f"{command.name} has no flag --{error.flagname}, only {known}") from error
    if len(rest) not in command.counts:
        raise UsageError(f"usage: asymcheck {command.name} {command.arguments} [flags]; see --help")
    return Options(values, rest)


def _overview() -> str:
    names = "\n".join(f"  {c.name:7} {c.summary}" for c in COMMANDS.values())
    return (
        f"usage: asymcheck COMMAND URL [flags]\n\n{names}\n\n"
        "URL is a path, or a URL (in quotes), of the place that the run saves to.\n"
        f"'asymcheck COMMAND --help' tells more.\n\n{_exit_codes()}"
    )


def _help(command: Command, values: flags.FlagValues) -> str:
    lines = [f"usage: asymcheck {command.name} {command.arguments} [flags]", "", command.summary]
    lines += ["", "flags:"]
    for name in values:
        lines.append(f"  --{name:9} {cast('Any', values[name]).help}")
    return "\n".join([*lines, "", _exit_codes()])


def _exit_codes() -> str:
    assert __doc__ is not None
    begin, end = __doc__.index("Exit codes"), __doc__.index("With --json")
    return textwrap.dedent(__doc__[begin:end]).rstrip()


def _fail(error: BaseException, code: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"asymcheck: {printable(message)}\n")
    return code


def _guarded(argv: list[str]) -> int:
    """`main`, for a process: with an exit code for whatever happens."""
    handler = logging.get_absl_handler()
    handler.setFormatter(Formatter("asymcheck: %(message)s"))
    logging.set_verbosity(logging.WARNING)  # until the command's own --verbosity is parsed
    for stream in (sys.stdout, sys.stderr):
        cast("Any", stream).reconfigure(errors="backslashreplace")
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), _INTERRUPTED)
    except Exception:  # a bug: shown as one, but not with the exit code for damage
        traceback.print_exc()
        return FAILED


def run() -> None:
    """The entry point of the command."""
    app.run(_guarded, flags_parser=_parse_later)


def _parse_later(argv: list[str]) -> list[str]:
    flags.FLAGS(argv[:1])
    return argv
