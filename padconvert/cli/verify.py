"""`padconvert verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padconvert.cli import arguments as arg
from padconvert.errors import VerificationError
from padconvert.results import Verification


def verify(
    artefact: Annotated[Path, typer.Argument(help="An artefact of padconvert.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="SOURCE",
            help="The file it was made from: its sha256 is held against the recorded one; of an artefact that was "
            "not trained the outputs too, of a trained one the metrics, with --data.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Labelled data to measure on, read as the artefact's policy says (layout, scale …). Repeatable.",
        ),
    ] = None,
    loader: Annotated[
        str | None,
        typer.Option(
            metavar="hf",
            help="Load a transformers directory by transformers too: the same outputs after 'import padconvert.hf', "
            "an error without it.",
        ),
    ] = None,
    arch: arg.Arch = None,
    arch_arg: arg.ArchArg = None,
    trust: arg.Trust = None,
    state_key: arg.StateKey = None,
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
        state_key=state_key, device=device, loader=loader,
    )  # fmt: skip
    run.show(result, as_json=as_json)
    if not result.passed:
        failed = ", ".join(check.name for check in result.checks if not check.passed)
        typer.echo(f"error: {artefact}: does not hold: {failed}. {_advice(result)}", err=True)
        raise typer.Exit(VerificationError.exit_code)


def _advice(result: Verification) -> str:
    """The next step: the artefact may be right and the file it was held against the wrong one."""
    if all(check.passed or check.name == "source sha256" for check in result.checks):
        return "Name the file it was made from with --against."
    return "Make it again from its source."
