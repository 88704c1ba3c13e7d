"""`padconvert export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from padconvert.cli import arguments as arg


class Format(StrEnum):
    PT2 = "pt2"


def export(
    artefact: Annotated[Path, typer.Argument(help="An artefact of padconvert.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the program is written.")],
    format: Annotated[Format, typer.Option(help="pt2: a program for torch.export.load.")] = Format.PT2,
    trust: arg.Trust = None,
    force: arg.Force = False,
    as_json: arg.Json = False,
) -> None:
    """Write an artefact as a program that runs where padconvert is not installed.

    The written file is loaded again and held against the artefact; exit code 7, and no file, where they differ.
    """
    from padconvert.cli import parse, run

    parse.allow_own_code(list(trust or ()))
    from padconvert.api import export as export_artefact

    run.show(
        export_artefact(artefact, output, format=format.value, trust=tuple(trust or ()), force=force), as_json=as_json
    )
