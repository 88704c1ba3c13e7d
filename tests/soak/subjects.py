"""What is soaked: each kind of file, good ones of it, how they are damaged, and what reading one must come to."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random

import numpy as np
import safetensors.torch
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from load_attacks import ATTACKS
from padconvert import ConvertOptions, convert
from padconvert.checkpoint.header import encode_header, read_header
from padconvert.checkpoint.manifest import KEY, manifest_to_json, sealed
from padconvert.checkpoint.read import open_tensors, read_checkpoint
from padconvert.checkpoint.tensor_bytes import view_bytes
from padconvert.errors import VerificationError
from padconvert.finetune.data.examples import Examples
from padconvert.finetune.data.readers import npz, safetensors_file
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.load.audit import audit
from padconvert.plan import plan_from_json, plan_to_json, read_plan
from padconvert.policy import load_policy
from padconvert.policy.model import Data
from padconvert.verify import verify
from soak.mutation import Mutation, mutated, mutated_json, mutated_member


@dataclass(frozen=True, slots=True)
class Subject:
    """`read` returns what the file means, as text; it raises a PadconvertError of one of `codes` for a refusal, and
    AssertionError where it contradicts itself. With `sealed` a checksum covers the file: what it means must be what
    one of the good files means. `cases` is how many of 100,000 there are."""

    name: str
    cases: int
    make: Callable[[Path], list[bytes]]
    read: Callable[[Path], str]
    mutate: Mutation = mutated
    codes: frozenset[int] = frozenset({4, 6})
    sealed: bool = False
    suffix: str = ""
    lines: bool = False  # a message may take several lines, one a problem


def digest(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(bytes(part) if isinstance(part, memoryview) else str(part).encode("utf-8", "surrogatepass"))
        found.update(b"\0")
    return found.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    return digest(*(part for name in sorted(tensors) for part in (name, *_parts(tensors[name]))))


def _parts(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), view_bytes(tensor)


# ---- models ------------------------------------------------------------------------------------------------------


def network(width: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def _saved(folder: Path, *, legacy: bool) -> list[bytes]:
    """Modules, state dicts, a checkpoint, half precision, and files that would run code."""
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    objects = [network(), network(2).half(), network().state_dict(), {"state_dict": tied.state_dict(), "epoch": 3}]
    for number, value in enumerate((*objects, tied)):
        torch.save(value, folder / str(number), _use_new_zipfile_serialization=not legacy)
    hostile = ("system_as_attribute_legacy",) if legacy else ("system_as_attribute", "system_protocol_5", "partial")
    for name in hostile:
        ATTACKS[name][0](folder / name)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _open(path: Path) -> str:
    """Loads, and holds the audit against it: what loads must be what the audit calls loadable."""
    source = open_source(path)
    tensors = {name: source.tensors[name] for name in source.tensors}
    found = audit(path)
    assert found.verdict == "loads", f"it loads, its audit says: {found.verdict}"
    return digest(source.kind, json.dumps(source.architecture, sort_keys=True), digest_of(tensors))


def _exported(folder: Path) -> list[bytes]:
    batch = torch.export.Dim("batch", min=2)
    for number, width in enumerate((2, 3)):
        program = torch.export.export(network(width), (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / f"{number}.pt2")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


# ---- artefacts ---------------------------------------------------------------------------------------------------


def _artefacts(folder: Path) -> list[bytes]:
    """Never trained and trained, element and channel."""
    torch.save(network(), folder / "model.pt")
    x = np.random.RandomState(0).randn(32, 1, 8, 8).astype("float32")
    np.savez(folder / "data.npz", x=x, y=np.arange(32) % 2)
    sets = ("partition.batches=2", "partition.micro_batch=8")
    runs = [
        ConvertOptions(input_shape=(1, 8, 8)),
        ConvertOptions(input_shape=(1, 8, 8), granularity="channel", dynamic_ratio=0.5),
        ConvertOptions(data=(str(folder / "data.npz"),), steps=10, batch_size=8, sets=sets),
    ]
    made = []
    for number, options in enumerate(runs):
        output = folder / f"{number}.pad.safetensors"
        convert(folder / "model.pt", replace(options, output=output, force=True))
        made.append(output.read_bytes())
    return made


def _verified(path: Path) -> str:
    result = verify(path)
    if not result.passed:
        failed = [check for check in result.checks if not check.passed]
        raise VerificationError(f"{path}: {failed[0].name}: {failed[0].detail}")
    checkpoint = read_checkpoint(path)
    return digest(manifest_to_json(checkpoint.manifest), digest_of(load(path).state_dict()))


def _forged(chance: Random, seeds: Sequence[bytes]) -> bytes:
    """A file whose manifest says something else, with checksums that fit it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(chance.choice(seeds))
        file.flush()
        opened = open_tensors(file.name)
    header = opened.header
    text = mutated_json(chance, header.metadata[KEY].encode(), [])
    specs = {name: (slot.dtype, slot.shape) for name, slot in header.tensors.items()}
    said = text.decode("utf-8", "replace")
    encoded, _ = encode_header(specs, sealed(said, specs))
    return encoded + b"".join(view_bytes(opened.tensor(name)) for name in header.tensors)


# ---- safetensors -------------------------------------------------------------------------------------------------


def _tensor_files(folder: Path) -> list[bytes]:
    del folder
    many = {"conv.weight": torch.arange(18.0).view(2, 1, 3, 3), "conv.bias": torch.zeros(2), "n": torch.tensor(3)}
    small = {"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": torch.zeros(0, 2), "é": torch.tensor([True])}
    # one key of metadata: the library writes several in random order
    return [safetensors.torch.save(many, {"format": "pt"}), safetensors.torch.save(small)]


def _header(path: Path) -> str:
    """Reads the header, and holds it against the reference implementation, which may be laxer but not stricter."""
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            theirs = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise AssertionError(f"the reference implementation refuses it: {error}") from error
    ours = {name: list(slot.shape) for name, slot in header.tensors.items()}
    assert ours == theirs
    tensors = open_source(path).tensors
    return digest(ours, header.metadata, digest_of({name: tensors[name] for name in tensors}))


# ---- data --------------------------------------------------------------------------------------------------------


def _arrays(folder: Path) -> list[bytes]:
    x = np.random.RandomState(0).randn(4, 1, 3, 3)
    y = np.array([0, 1, 1, 0])
    np.savez(folder / "0.npz", x=x.astype("float32"), y=y)
    np.savez_compressed(folder / "1.npz", x=(x * 50).astype("uint8"), y=y.astype("int32"))
    np.savez(folder / "2.npz", x=np.asfortranarray(x.astype("float16")))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _tensor_data(folder: Path) -> list[bytes]:
    del folder
    whole = {"x": torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), "y": torch.tensor([0, 1, 1, 0])}
    return [safetensors.torch.save(whole), safetensors.torch.save({"x": whole["x"].half(), "y": whole["y"].int()})]


@cache
def _how() -> Data:
    return load_policy().policy.data


def _examples(path: Path, read: Callable[..., Examples]) -> str:
    examples = read([str(path)], _how())
    batch = examples.batch(torch.arange(len(examples)))
    assert isinstance(batch.inputs, Tensor)
    labels = () if batch.labels is None else _parts(batch.labels)
    return digest(*_parts(batch.inputs), *labels)


# ---- text --------------------------------------------------------------------------------------------------------

_POLICY = """version: 1
extends: paper
defaults: {dynamic_ratio: 0.3, num_experts: 4, granularity: element}
rules:
  - {role: stem, convert: false}   # the first layer
  - {name: "layer4.*", dynamic_ratio: 0.5, optional: true}
  - name: 're:block[0-9]+\\.conv'
    num_experts: 2
    optional: true
partition: {score: taylor, scope: global, rounds: 5, schedule: exponential}
train: {steps: 500, optimizer: sgd, lr: 0.01}
data: {train: [a.npz, b.npz], eval: t.npz, layout: nhwc, scale: 255, mean: [.485, .456], std: [.229, .224]}
"""


def _policies(folder: Path) -> list[bytes]:
    del folder
    block = "version: 1\ntrain:\n  steps: 10\n  optimizer: adamw\n  lr: 2.0e-5\npartition:\n  scope: layer\n"
    anchors = "version: 1\nrules:\n- &a {type: Conv2d, convert: true, router: mlp}\n- *a\n"
    return [_POLICY.encode(), block.encode(), anchors.encode(), b"version: 1\nextends: fast\n"]


def _policy(path: Path) -> str:
    """Reads a policy, and reads what was resolved again: it must be the same."""
    policy = load_policy(path).policy
    said = policy.model_dump(mode="json", exclude_none=True)
    again = path.with_suffix(".again")
    again.write_text(yaml.safe_dump(said, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    assert load_policy(again).policy == policy, "written out it is another policy"
    return digest(json.dumps(said, sort_keys=True))


def _plans(folder: Path) -> list[bytes]:
    torch.save(network(), folder / "model.pt")
    for number, granularity in enumerate(("element", "channel")):
        options = ConvertOptions(granularity=granularity, dry_run=True, plan_out=folder / f"{number}.json")
        convert(folder / "model.pt", options)
    return [path.read_bytes() for path in sorted(folder.glob("*.json"))]


def _plan(path: Path) -> str:
    plan = read_plan(path)
    text = plan_to_json(plan)
    assert plan_from_json(text) == plan, "written out it is another plan"
    return digest(text)


def _plan_mutation(chance: Random, seeds: Sequence[bytes]) -> bytes:
    return mutated_json(chance, chance.choice(seeds), seeds)


_DEFLATED = partial(mutated_member, method=zipfile.ZIP_DEFLATED)

SUBJECTS = (
    Subject("artefact", 14_000, _artefacts, _verified, codes=frozenset({4, 6, 7}), sealed=True),
    Subject("artefact, checksums forged", 9_000, _artefacts, _verified, _forged, frozenset({4, 6, 7})),
    Subject("safetensors header", 16_000, _tensor_files, _header),
    Subject("policy", 9_000, _policies, _policy, codes=frozenset({3}), suffix=".yaml", lines=True),
    Subject("plan", 12_000, _plans, _plan, _plan_mutation, frozenset({3, 4})),
    Subject("pickle, zip", 10_000, partial(_saved, legacy=False), _open),
    Subject("pickle, inside the zip", 8_000, partial(_saved, legacy=False), _open, mutated_member),
    Subject("pickle, legacy", 10_000, partial(_saved, legacy=True), _open),
    Subject("data, npz", 4_000, _arrays, partial(_examples, read=npz.read), sealed=True, suffix=".npz"),
    Subject("data, inside the npz", 4_000, _arrays, partial(_examples, read=npz.read), _DEFLATED, suffix=".npz"),
    Subject("data, safetensors", 3_000, _tensor_data, partial(_examples, read=safetensors_file.read)),
    Subject("exported program", 1_000, _exported, _open),
    Subject("exported program, inside", 1_000, _exported, _open, mutated_member),
)
