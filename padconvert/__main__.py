"""The command `padconvert`: runs the app, turns every error into one line on stderr and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from padconvert.cli.interrupts import interruptible
from padconvert.cli.stdout import named, require_streams
from padconvert.errors import FileError, GateError, Interrupted, PadconvertError, UsageError

BROKEN_PIPE = 141  # what a shell reports for a writer whose reader has left
_INTERRUPTED = "interrupted; no file is half-written (a run with --work-dir can be resumed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (`padconvert.errors`); `arguments` default to `sys.argv`.

    An error is a line on stderr; with `--json` it is one JSON document on stdout as well. An exception nobody
    raised on purpose is exit code 1, and PADCONVERT_DEBUG=1 lets its traceback through. SIGTERM ends as Ctrl-C does.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with interruptible(main.__code__):
        return _main(words)


def _main(words: list[str]) -> int:
    try:
        require_streams()
        exit_code = _run(words)
        with named():
            sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:  # before or after typer, which hands its own on
        return _fail(words, Interrupted(_INTERRUPTED))
    except PadconvertError as error:
        return _fail(words, error)
    except SystemExit as error:  # not typer's way out: somebody's code called sys.exit, and the work is not done
        if isinstance(error.__context__, BrokenPipeError):  # but this one is typer's
            return BROKEN_PIPE
        return _fail(words, PadconvertError(f"internal: code that was run called sys.exit({error.code!r})"))
    except Exception as error:
        if os.environ.get("PADCONVERT_DEBUG"):
            raise
        return _fail(words, _deliberate(error))


def _abandon_stdout() -> None:
    # Python flushes stdout once more on its way out: give it somewhere to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    from padconvert.cli.app import app

    returned = app(words, prog_name="padconvert", standalone_mode=False)
    if returned == Interrupted.exit_code:  # how typer hands on a Ctrl-C
        raise Interrupted(_INTERRUPTED)
    return returned if isinstance(returned, int) else 0


def _deliberate(error: Exception) -> PadconvertError:
    """The error of our own that says the same as `error`."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own, which it keeps private
        return _usage(error)
    if isinstance(error, OSError) and error.strerror:
        return FileError(f"{error.filename or 'a file or the standard output'}: {error.strerror}")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return PadconvertError("there is not enough memory. Take fewer experts, smaller batches, or a larger machine.")
    if isinstance(error, RecursionError):
        return FileError(
            "modules or attributes are nested too deeply to be copied or called. Save the state dict of a flatter "
            "network, and name a factory with --arch."
        )
    first_line = (str(error).splitlines() or [""])[0]
    return PadconvertError(
        f"internal: {type(error).__name__}: {first_line} (PADCONVERT_DEBUG=1 shows the traceback; please report it)"
    )


def _usage(error: Exception) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "padconvert"
    said = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    return UsageError(f"{said or 'a command is missing'} ('{command} --help' lists what there is)")


def _fail(words: list[str], error: PadconvertError) -> int:
    try:
        _say(words, error)
        sys.stdout.flush()
    except OSError:  # it is stdout or stderr that cannot be written to; the exit code still says it
        _abandon_stdout()
    return error.exit_code


def _say(words: list[str], error: PadconvertError) -> None:
    print(f"error: {error}", file=sys.stderr)
    if "--json" in words and not (isinstance(error, Interrupted) and error.reported):
        document: dict[str, object] = {
            "schema": "padconvert.error/1",
            "error": str(error),
            "exit_code": error.exit_code,
        }
        if isinstance(error, GateError):
            document["gates"] = error.gates
        print(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    # `python -m` searches the working directory first; what lies there must not stand in for an installed package.
    sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    sys.exit(main())
