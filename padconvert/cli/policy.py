"""`padconvert policy …`: write, check, show and explain policies. Nothing here needs torch or a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from padconvert.cli import stdout
from padconvert.errors import PolicyError

app = typer.Typer(no_args_is_help=True, help="Write, check, show and explain policies (no torch needed).")

Setting = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")]
Preset = Annotated[str | None, typer.Option(help="Start from this preset: paper, small or fast.")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("padconvert.yaml"),
    preset: Annotated[str, typer.Option(help="The preset it extends.")] = "paper",
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented policy file to start from."""
    from padconvert.policy import starter, write_starter

    write_starter(path, starter(preset), force=force)
    stdout.write(f"wrote {path}\n")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The policy file.")],
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON document on stdout.")] = False,
) -> None:
    """Check a policy file: exit code 0 if it is right, 3 with every problem and its line if not."""
    from padconvert.policy import WORKING_FILE, load_policy

    problems: list[str] = []
    try:
        # A padconvert.yaml is checked as it will be used: it may name no code.
        load_policy(working_file=file) if file.name == WORKING_FILE else load_policy(file)
    except PolicyError as error:
        if not as_json:
            raise
        first, *rest = str(error).split("\n  ")  # of several problems the first line only says how many
        problems = rest or [first]
    if as_json:
        document = {"schema": "padconvert.policy-check/1", "file": str(file), "ok": not problems, "problems": problems}
        stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        stdout.write(f"{file}: ok\n")
    if problems:
        raise typer.Exit(PolicyError.exit_code)


@app.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="A policy file; without one, the working directory's.")] = None,
    preset: Preset = None,
    settings: Setting = None,
) -> None:
    """Print the whole policy a run here would use, each value with where it was said."""
    from padconvert.policy import WORKING_FILE, load_policy, render, set_overrides

    here = Path(WORKING_FILE)
    working = here if here.is_file() else None
    if file is not None and file.name == WORKING_FILE:
        file, working = None, file
    stdout.write(render(load_policy(file, preset, set_overrides(settings or []), working)))


@app.command()
def explain(
    layer: Annotated[str, typer.Argument(help="A layer's name, as 'padconvert inspect' lists it.")],
    plan: Annotated[Path, typer.Option(help="A plan written by 'padconvert convert --plan-out FILE'.")],
) -> None:
    """Say which rule or default decided over a layer, and why."""
    from padconvert.plan import explain_layer, read_plan

    stdout.write(explain_layer(read_plan(plan), layer) + "\n")


@app.command()
def schema() -> None:
    """Print the JSON schema of a policy file, for editors."""
    from padconvert.policy import schema as policy_schema

    stdout.write(json.dumps(policy_schema(), indent=2) + "\n")
