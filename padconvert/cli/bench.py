"""`padconvert bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padconvert.cli import arguments as arg


def bench(
    artefact: Annotated[Path, typer.Argument(help="An artefact of padconvert.")],
    against: Annotated[Path, typer.Option(metavar="SOURCE", help="The file that it was made from.")],
    batch_size: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Samples a call. Repeatable; default 1, 8 and 32 (with --quick 1 and 8)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads to compute on; default: as many as torch takes.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", metavar="", help="Also each converted layer over its static one.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", metavar="", help="A few rounds only: seconds, not minutes.")
    ] = False,
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="1,3,32,32", help="The shape of one input, batch first. Default: as when the artefact was made."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Take inputs from here, read as the artefact's policy says. Repeatable."),
    ] = None,
    arch: arg.Arch = None,
    arch_arg: arg.ArchArg = None,
    trust: arg.Trust = None,
    state_key: arg.StateKey = None,
    device: arg.Device = "cpu",
    as_json: arg.Json = False,
) -> None:
    """Time and memory of an artefact beside the static source and the fully dynamic network (all experts whole).

    The three are called in turn, round by round, so that their ratios hold on a busy machine too. Ctrl-C shows what
    was measured until then.
    """
    from padconvert.cli import parse, run
    from padconvert.errors import Interrupted
    from padconvert.report.progress import shown

    parse.allow_own_code([arch, *(trust or ())], data or ())
    shape, arguments = parse.input_shape(input_shape), parse.arch_args(arch_arg)
    from padconvert.bench import BenchOptions
    from padconvert.bench import bench as measure

    options = BenchOptions(
        batch_sizes=tuple(batch_size or ()), threads=threads, quick=quick, per_layer=layers, input_shape=shape,
        data=tuple(data or ()), arch=arch, arch_args=arguments, trust=tuple(trust or ()), state_key=state_key,
        device=device,
    )  # fmt: skip
    with shown() as progress:
        result = measure(artefact, against, options, progress)
    run.show(result, as_json=as_json)
    if not result.complete:
        raise Interrupted("interrupted; above is what was measured until then", reported=True)
