"""Words of the command line that typer leaves as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from padconvert.errors import UsageError
from padconvert.gates import parse_size
from padconvert.policy import WORKING_FILE, names_function


def input_shape(text: str | None) -> tuple[int, ...] | None:
    """`1,3,32,32` as the shape of one sample, (3, 32, 32). Raises UsageError for anything else."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) < 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape {text}: write the batch and then the shape of one input, as in 1,3,32,32")
    return tuple(int(part) for part in parts[1:])


def arch_args(pairs: Sequence[str] | None) -> dict[str, object]:
    """`["depth=20"]` as `{"depth": 20}`; values are read as YAML. Raises UsageError without an `=`."""
    import yaml

    arguments: dict[str, object] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UsageError(f"--arch-arg {pair}: write it as KEY=VALUE, for example --arch-arg depth=20")
        try:
            arguments[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--arch-arg {pair}: the value is not YAML: {error}".replace("\n", " ")) from None
    return arguments


def size(option: str, text: str | None) -> int | None:
    """`25MB` in bytes. Raises UsageError for anything but a size."""
    return None if text is None else parse_size(option, text)


def working_file() -> Path | None:
    """`padconvert.yaml` of the working directory, when there is one."""
    path = Path(WORKING_FILE)
    return path if path.is_file() else None


def allow_own_code(code: Sequence[str | None], places: Sequence[str] = ()) -> None:
    """Put the working directory on `sys.path`, last, when something in `code` is named or a place is a function.

    Last, so that no file that happens to lie there stands in for an installed package.
    """
    here = os.getcwd()
    if (any(code) or any(names_function(place) for place in places)) and here not in sys.path:
        sys.path.append(here)
