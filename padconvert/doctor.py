"""What this machine offers: versions, devices, and which extras are installed."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from padconvert.results import Diagnosis, Extra

PURPOSES = {
    "hf": "transformers directories",
    "data": "parquet, CSV, JSONL and image folders",
    "onnx": "export to ONNX",
    "report": "charts in the HTML report",
}


def examine() -> Diagnosis:
    """Versions of padconvert and what it requires, torch's devices and threads, and every extra."""
    import torch

    wanted = [(name, extra) for name, extra in _requirements() if extra is None or extra in PURPOSES]
    extras = {extra: [name for name, of in wanted if of == extra] for extra in PURPOSES}
    return Diagnosis(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in ["padconvert", *(name for name, _ in wanted)]},
        devices=_devices(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        extras=tuple(_extra(name, packages) for name, packages in extras.items()),
    )


def _extra(name: str, packages: list[str]) -> Extra:
    missing = tuple(package for package in packages if _version(package) is None)
    return Extra(name, PURPOSES[name], missing, f"pip install 'padconvert[{name}]'")


def _requirements() -> Iterator[tuple[str, str | None]]:
    """(package, the extra it belongs to or None) from padconvert's own metadata."""
    for line in requires("padconvert") or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        assert name is not None
        yield name[0], extra[1] if extra else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[str, ...]:
    import torch

    found = ["cpu"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return tuple(found)
