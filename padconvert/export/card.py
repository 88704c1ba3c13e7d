"""The model card of a transformers directory: what it is, how it is loaded, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from padconvert.checkpoint.manifest import LayerEntry, Manifest
from padconvert.layers.packed import UnitView
from padconvert.plan.cost import active_copies

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class CardNumbers:
    """Bytes of tensors in the source's files and in ours; parameters stored in ours (indices and bitmasks apart)."""

    bytes_source: int
    bytes_output: int
    params_output: int


def model_card(manifest: Manifest, numbers: CardNumbers, notes: Sequence[str] = (), *, has_source_card: bool) -> str:
    """README.md as Markdown. Its first line holds the import that transformers needs where layers are converted.
    `notes` are lines on what was measured."""
    name = manifest.architecture["class"]
    lines = [
        *(_what_it_is if manifest.layers else _what_it_is_without_layers)(name, manifest.padconvert),
        *(_loading(name) if manifest.layers else []),
        "## What it costs",
        "",
        *_costs(manifest, numbers),
        "",
        *_state(manifest, notes),
    ]
    if has_source_card:
        lines += ["", "The source's own card is in README.source.md. What it measured is not what this model does."]
    return "\n".join(lines) + "\n"


def _what_it_is(name: str, version: str) -> list[str]:
    return [
        f"> **Load it only after `import padconvert.hf`**: `import padconvert.hf; "
        f"{name}.from_pretrained(path)`, with `{name}` of transformers. Without that import it does not load.",
        "",
        f"# A partially dynamic {name}",
        "",
        f"This model was made by padconvert {version}. "
        "Some of its layers are partially dynamic: of the entries of their weights some are the same for all inputs, "
        "the others are there once for each expert, and a router chooses or mixes the experts for each input "
        "(He et al., PAD-Net, ACL 2023). The rest of the network is the source's.",
        "",
    ]


def _what_it_is_without_layers(name: str, version: str) -> list[str]:
    return [
        f"> **No layer is converted**: `{name}.from_pretrained(path)` of transformers loads it as any other directory. "
        "Without `import padconvert.hf` it says that it does not know `quant_method: padconvert`, and goes on.",
        "",
        f"# A {name}",
        "",
        f"This model was made by padconvert {version}, with all of its layers static.",
        "",
    ]


def _loading(name: str) -> list[str]:
    return [
        "## Loading",
        "",
        "```python",
        "import padconvert.hf",
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("PATH")',
        "```",
        "",
        "or without transformers' loader:",
        "",
        "```python",
        "import padconvert",
        "",
        'model = padconvert.load("PATH")',
        "```",
        "",
        "Both need `pip install 'padconvert[hf]'`. transformers alone cannot know the converted layers. So that it "
        "does not make up weights for them, the files hold an empty tensor in the place of each, and `from_pretrained` "
        "ends with an error on sizes that do not match. Do not silence it with `ignore_mismatched_sizes=True`: the "
        "layers would be random.",
        "",
        "`padconvert verify PATH --loader hf` checks all of this.",
        "",
    ]


def _costs(manifest: Manifest, numbers: CardNumbers) -> list[str]:
    ratio = numbers.bytes_output / max(numbers.bytes_source, 1)
    size = f"{numbers.bytes_output / _MIB:.1f} MiB of tensors, {ratio:.2f} times the source's"
    lines = [f"- Stored: {numbers.params_output:,} parameters, {size} ({numbers.bytes_source / _MIB:.1f} MiB)."]
    if any(entry.facts.top_k or entry.facts.group for entry in manifest.layers):
        lines.append(f"- Computed with for one token: {numbers.params_output - _idle(manifest):,} parameters.")
    kinds: dict[str, list[LayerEntry]] = {}
    for entry in manifest.layers:
        kinds.setdefault(_describe(entry), []).append(entry)
    lines += [
        f"- {len(entries)} layer{'s' * (len(entries) > 1)}: {what.format(dynamic=_shares(entries))}."
        for what, entries in sorted(kinds.items())
    ]
    return lines


def _idle(manifest: Manifest) -> int:
    """Stored numbers of the experts that one token is not computed with."""
    idle = 0
    for entry in manifest.layers:
        facts = entry.facts
        size = UnitView(facts.weight_shape, facts.granularity, facts.unit_dim).size
        copies = entry.stored_experts - active_copies(entry.stored_experts, facts.top_k)
        idle += copies * (facts.n_dynamic * size + facts.n_bias_dynamic)
    return idle


def _describe(entry: LayerEntry) -> str:
    facts = entry.facts
    chosen = f"{facts.top_k} of {facts.num_experts} experts computed" if facts.top_k else f"{facts.num_experts} experts"
    level = "in feed-forward blocks, " if facts.group else ""
    return f"{level}{facts.dtype}, {facts.granularity}, {{dynamic}} dynamic, {chosen}"


def _shares(entries: Sequence[LayerEntry]) -> str:
    """How much of these layers is dynamic, and of each where they differ: `50% (26% to 77% of a layer)`."""
    counts = [
        (entry.facts.n_dynamic, UnitView(entry.facts.weight_shape, entry.facts.granularity, entry.facts.unit_dim))
        for entry in entries
    ]
    each = [n / view.units for n, view in counts]
    whole = sum(n * view.size for n, view in counts) / sum(math.prod(view.shape) for _, view in counts)
    low, high = f"{min(each):.0%}", f"{max(each):.0%}"
    return f"{whole:.0%}" if low == high else f"{whole:.0%} ({low} to {high} of a layer)"


def _state(manifest: Manifest, notes: Sequence[str]) -> list[str]:
    if not manifest.layers and not manifest.trained:
        lines = ["It computes what its source computes."]
    elif not manifest.layers:
        lines = ["It was fine-tuned."]
    elif not manifest.trained:
        lines = ["It was **not fine-tuned**: all experts are still equal, and it computes what its source computes."]
    else:
        lines = ["It was fine-tuned after the conversion."]
    return lines + ([""] if notes else []) + [f"- {note}" for note in notes]
