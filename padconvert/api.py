"""The steps of a conversion, one call each, for models in memory and training loops of one's own.

plan = padconvert.plan(model)                        # what would be done to which layer, and what it costs
padconvert.rewrite_(model, plan)                     # the same function, fully dynamic
partitioner = padconvert.Partitioner(model, plan)    # .round_(t, losses) between training steps
padconvert.save(padconvert.fold(model), "model.pad.safetensors")
model = padconvert.load("model.pad.safetensors")
padconvert.export("model.pad.safetensors", "model.pt2")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.save import provenance_of, save_model
from padconvert.checkpoint.write import WrittenFile, check_target
from padconvert.errors import FileError, UsageError
from padconvert.export.pt2 import write_pt2
from padconvert.fold import fold_
from padconvert.load import describe
from padconvert.load.artefact import load_checkpoint
from padconvert.load.exported_lift import ExportedModule
from padconvert.load.opened import static_twin
from padconvert.load.source import own_tensors
from padconvert.plan import Plan, Route, make_plan
from padconvert.policy import Policy, Resolved, did_you_mean, load_policy, preset_names
from padconvert.results import Verification
from padconvert.rewrite import pad_layers
from padconvert.verify import spec_of
from padconvert.walk import walk, walk_trying
from padconvert.walk.probe import find_probe, probe_of_batch
from padconvert.walk.quiet import device_of

Inputs = Tensor | dict[str, Tensor]


def plan(
    model: nn.Module,
    policy: Policy | Resolved | str | os.PathLike[str] | None = None,
    *,
    inputs: Inputs | None = None,
    route: Route = "trained",
    seed: int = 0,
) -> Plan:
    """The plan for a model in memory, which is not changed.

    `policy` is a policy, a YAML file or a preset's name (default: `paper`). `inputs` is an example batch; without
    one, inputs are found by trying. Raises PolicyError, NothingEligibleError where no layer can be converted, and
    UsageError for a `model` or `policy` that is none.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"padconvert.plan: {_named(model)} is no nn.Module. Give the model itself; "
            "for a saved one there is padconvert.convert(path)."
        )
    resolved = _policy(policy)
    walked = walk_trying(model) if inputs is None else walk(model, probe_of_batch(inputs))
    tensors = {name: (tuple(tensor.shape), tensor.element_size()) for name, tensor in own_tensors(model).items()}
    return make_plan(walked, resolved, route=route, seed=seed, tensors=tensors)


def _policy(policy: Policy | Resolved | str | os.PathLike[str] | None) -> Policy | Resolved:
    match policy:
        case Policy() | Resolved():
            return policy
        case None:
            return load_policy()
        case str() if policy in preset_names():
            return load_policy(preset=policy)
        case str() if not Path(policy).suffix:
            raise UsageError(
                f"policy={policy!r}: there is no such preset; there are {', '.join(preset_names())}."
                f"{did_you_mean(policy, list(preset_names()))} A policy file is named with its ending, or as a Path."
            )
        case str() | os.PathLike():
            return load_policy(Path(policy))
        case _:
            raise UsageError(
                f"policy={_named(policy)}: give a preset's name, a policy file or a Policy. Single settings go through "
                "padconvert.policy.load_policy(overrides={'train.steps': 5})."
            )


def _named(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def fold(model: nn.Module) -> nn.Module:
    """A folded copy: scales, temperatures and standardisation in the weights, all-static layers plain again."""
    return fold_(copy.deepcopy(model))


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Inputs | None = None,
    trust: Sequence[str] = (),
    force: bool = False,
) -> WrittenFile:
    """Write a converted model in checkpoint format 1; it is folded first (in a copy) if it is not.

    `inputs`, an example batch, lets the file carry a probe that `verify` can hold; without one it is found by trying.
    `trust` names packages of your own whose classes the file may name, to be rebuilt by a `load` that trusts them
    too; a model of other classes is written all the same, and loaded by `into=`.
    Raises UsageError where `path` exists without `force`, FileError where it cannot be written.
    """
    folded = fold(model).eval()
    twin = static_twin(folded)
    twin.__dict__.pop("hf_quantizer", None)  # what saves a model of transformers is no part of the network
    # before any forward: some models hang hooks on themselves then, which cannot be described
    architecture, extra = describe(twin, trust)
    probe = find_probe(twin, None) if inputs is None else probe_of_batch(inputs)
    trained = not all(layer.experts_are_equal for layer in pad_layers(folded).values())
    provenance = provenance_of(
        source_sha256=None, source_kind="module", device=str(device_of(folded)), seed=0, trained=trained
    )
    return save_model(
        folded,
        Path(path),
        architecture=architecture,
        provenance=provenance,
        policy={},
        trained=trained,
        probe=probe,
        extra_tensors=extra,
        force=force,
    )


def export(
    artefact: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "pt2",
    into: nn.Module | None = None,
    trust: Sequence[str] = (),
    force: bool = False,
) -> Verification:
    """Write an artefact as an exported program (`.pt2`), which torch.export.load reads without padconvert.

    Returns the checks of the written file against the artefact's model, among them which sizes are dynamic: those of
    the program that the artefact came from, or of a module all that torch.export can leave open.
    `into` and `trust` are as for `load`. Raises VerificationError where the program computes something else (nothing
    is written then), UsageError where `output` exists without `force`, FileError where the artefact holds no probe
    to call it with, or torch cannot export it.
    """
    if format != "pt2":
        raise UsageError(f"--format {format}: 'pt2' is the format that can be written.")
    source, target = Path(artefact), Path(output)
    check_target(target, force=force, source=source)
    checkpoint = read_checkpoint(source)
    record = checkpoint.manifest.probe
    if record is None:
        raise FileError(
            f"{source}: holds no inputs to export it with, for its network could not be called when it was made. "
            "Convert the source again with --input-shape."
        )
    model = load_checkpoint(checkpoint, into=into, trust=trust)
    probe = spec_of(record)
    # of a program, the sizes that it left open; of a module, all that torch can leave open
    promised = model.promised(probe) if isinstance(model, ExportedModule) else None
    checks = write_pt2(model, probe, target, promised=promised, force=force, source=source)
    return Verification(str(target), checks, True, schema="padconvert.export/1")
