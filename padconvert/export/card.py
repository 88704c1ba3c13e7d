"""The model card of a transformers directory: what it is, how it is loaded, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from padconvert.checkpoint.manifest import LayerEntry, Manifest
from padconvert.words import Granularity

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class CardNumbers:
    """Bytes of tensors in the source's files and in ours; parameters stored in ours (indices and bitmasks apart)."""

    bytes_source: int
    bytes_output: int
    params_output: int


def model_card(manifest: Manifest, numbers: CardNumbers, notes: Sequence[str] = (), *, has_source_card: bool) -> str:
    """README.md as Markdown. Its first line holds the import that transformers needs. `notes` are lines on what was
    measured."""
    name = manifest.architecture["class"]
    lines = [
        f"> **Load it only after `import padconvert.hf`**: `import padconvert.hf; "
        f"{name}.from_pretrained(path)`, with `{name}` of transformers. Without that import it does not load.",
        "",
        f"# A partially dynamic {name}",
        "",
        f"This model was made by padconvert {manifest.padconvert}. "
        "Some of its layers are partially dynamic: of the entries of their weights some are the same for all inputs, "
        "the others are there once for each expert, and a router chooses or mixes the experts for each input "
        "(He et al., PAD-Net, ACL 2023). The rest of the network is the source's.",
        "",
        *_loading(name),
        "## What it costs",
        "",
        *_costs(manifest, numbers),
        "",
        *_state(manifest, notes),
    ]
    if has_source_card:
        lines += ["", "The source's own card is in README.source.md. What it measured is not what this model does."]
    return "\n".join(lines) + "\n"


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
    kinds = Counter(_describe(entry) for entry in manifest.layers)
    lines += [f"- {count} layer{'s' * (count > 1)}: {what}." for what, count in sorted(kinds.items())]
    return lines


def _describe(entry: LayerEntry) -> str:
    facts = entry.facts
    entries = facts.weight_shape[0] * facts.weight_shape[1] if len(facts.weight_shape) == 2 else 0
    units = entries if facts.granularity is Granularity.ELEMENT and entries else facts.weight_shape[facts.unit_dim]
    chosen = f"{facts.top_k} of {facts.num_experts} experts computed" if facts.top_k else f"{facts.num_experts} experts"
    level = "in feed-forward blocks, " if facts.group else ""
    return f"{level}{facts.dtype}, {facts.granularity}, {facts.n_dynamic / units:.0%} dynamic, {chosen}"


def _state(manifest: Manifest, notes: Sequence[str]) -> list[str]:
    if not manifest.trained:
        lines = ["It was **not fine-tuned**: all experts are still equal, and it computes what its source computes."]
    else:
        lines = ["It was fine-tuned after the conversion."]
    return lines + ([""] if notes else []) + [f"- {note}" for note in notes]
