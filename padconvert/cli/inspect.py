"""`padconvert inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padconvert.cli import arguments as arg


def inspect(
    path: Annotated[Path, typer.Argument(help="A saved model, or an artefact of padconvert.")],
    policy: arg.PolicyFile = None,
    preset: arg.Preset = None,
    settings: arg.Set = None,
    arch: arg.Arch = None,
    arch_arg: arg.ArchArg = None,
    input_shape: arg.InputShape = None,
    trust: arg.Trust = None,
    state_key: arg.StateKey = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Training data: also say how far each layer's inputs fall into kinds that experts can divide.",
        ),
    ] = None,
    text_column: arg.TextColumn = None,
    task: arg.Task = None,
    seed: arg.Seed = 0,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Say whether the file is safe to load, without loading it: exit code 6 if not."),
    ] = False,
    as_json: arg.Json = False,
) -> None:
    """List a file's layers. Of a source: what would be converted, and why not. Of an artefact: what it holds."""
    from padconvert.cli import parse, run
    from padconvert.errors import UsageError
    from padconvert.options import ConvertOptions

    if audit:
        unread = {
            "--data": data, "--text-column": text_column, "--task": task, "--arch": arch, "--arch-arg": arch_arg,
            "--policy": policy, "--preset": preset, "--set": settings, "--input-shape": input_shape,
            "--state-key": state_key,
        }  # fmt: skip
        if asked := [option for option, value in unread.items() if value]:
            raise UsageError(f"{', '.join(asked)}: --audit loads nothing; ask for the two in two calls")
        _audit(path, tuple(trust or ()), as_json)
        return
    parse.allow_own_code([arch, *(trust or ())], data or ())
    options = ConvertOptions(
        policy=policy, preset=preset, sets=tuple(settings or ()), working_file=parse.working_file(), arch=arch,
        arch_args=parse.arch_args(arch_arg), input_shape=parse.input_shape(input_shape), trust=tuple(trust or ()),
        state_key=state_key, data=tuple(data or ()), text_columns=tuple(text_column or ()), task=task, seed=seed,
    )  # fmt: skip
    from padconvert.listing import list_tensors

    if not (options.arch or data or task or text_column) and (listed := list_tensors(path)) is not None:
        run.show(listed, as_json=as_json)
        return
    from padconvert.inspection import inspect_file

    run.show(inspect_file(path, options), as_json=as_json)


def _audit(path: Path, trust: tuple[str, ...], as_json: bool) -> None:
    from padconvert.cli import run
    from padconvert.load.examine import examine

    result = examine(path, trust)
    run.show(result, as_json=as_json)
    if result.exit_code:
        typer.echo(f"error: {result.detail}", err=True)
        raise typer.Exit(result.exit_code)
