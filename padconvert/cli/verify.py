"""`padconvert verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padconvert.cli import arguments as arg
from padconvert.errors import VerificationError


def verify(
    artefact: Annotated[Path, typer.Argument(help="An artefact of padconvert.")],
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="The saved model it was made from: outputs are held together.")
    ] = None,
    data: arg.Data = None,
    arch: arg.Arch = None,
    arch_arg: arg.ArchArg = None,
    trust: arg.Trust = None,
    device: arg.Device = "cpu",
    as_json: arg.Json = False,
) -> None:
    """Check an artefact: its checksums, that it loads, and that it still computes what was measured at its making.

    Ends with exit code 7 when a check fails.
    """
    from padconvert.cli import parse, run

    parse.allow_own_code([arch, *(trust or ())], data or ())
    arguments = parse.arch_args(arch_arg)
    from padconvert.verify import verify as verify_artefact

    result = verify_artefact(
        artefact, against=against, data=tuple(data or ()), arch=arch, arch_args=arguments, trust=tuple(trust or ()),
        device=device,
    )  # fmt: skip
    run.show(result, as_json=as_json)
    if not result.passed:
        failed = ", ".join(check.name for check in result.checks if not check.passed)
        typer.echo(f"error: {artefact}: does not hold: {failed}. Make it again from its source.", err=True)
        raise typer.Exit(VerificationError.exit_code)
