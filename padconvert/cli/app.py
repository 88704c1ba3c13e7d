"""The app: one command a file. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from padconvert.cli import bench, convert, doctor, export, inspect, policy, verify

app = typer.Typer(
    name="padconvert",
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.add_typer(policy.app, name="policy")
app.command("doctor")(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"padconvert {version('padconvert')}")
        raise typer.Exit


@app.callback()
def main(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Turn a trained, saved, static PyTorch model into a partially dynamic one (PAD-Net).

    A first look: [bold]padconvert inspect model.pt[/bold]

    The whole line: [bold]padconvert convert model.pt --data train.npz[/bold]
    """
    del asked
