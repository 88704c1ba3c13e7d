"""What a run trains on, read as its source reads it; and a head for the task, where the source has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padconvert.checkpoint.save import PROBE_SAMPLES
from padconvert.errors import FileError, UsageError
from padconvert.finetune.data.readers import table
from padconvert.finetune.data.sources import Data, open_data
from padconvert.finetune.data.tokenizer import Tokenizer, tokenizer_of
from padconvert.finetune.head import train_head_
from padconvert.finetune.objectives import dtype_of
from padconvert.load.directory_files import read_config
from padconvert.load.directory_head import has_head, with_head
from padconvert.load.opened import Opened
from padconvert.options import ConvertOptions
from padconvert.policy import Policy
from padconvert.progress import Progress
from padconvert.walk import walk, walk_trying
from padconvert.walk.info import Walk
from padconvert.walk.probe import probe_of_batch
from padconvert.walk.quiet import device_of

#: networks whose table of positions begins after the padding's number, as RoBERTa's does
_OFFSET = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "ibert", "esm"})
#: a config with one of these has positions that are computed, and no end to them
_COMPUTED = ("rope_theta", "global_rope_theta", "rope_parameters", "rope_scaling")


def open_task(
    opened: Opened, policy: Policy, options: ConvertOptions, progress: Progress
) -> tuple[Opened, Data | None]:
    """The run's data, or None; and the source, with a new head trained on that data where the task needs one.

    Raises UsageError for a task without data, or for a network that cannot have a head; FileError for the data.
    """
    if not policy.data.train:
        if policy.data.task is not None:
            raise UsageError(f"--task {policy.data.task}: there is nothing to train on. Name data with --data.")
        return opened, None
    tokenizer = tokenizer_for(opened.path, policy, (*policy.data.train, *policy.data.eval))
    headless = _is_headless(opened, policy)
    words = None if headless else label_numbers(opened.architecture)
    data = open_data(policy.data, seed=options.seed, tokenizer=tokenizer, label2id=words)
    return (_with_trained_head(opened, data, policy, options, tokenizer, progress) if headless else opened), data


def walk_with(model: nn.Module, options: ConvertOptions, data: Data | None) -> Walk:
    """The walk, called with inputs as told, as the data has them, or found by trying; with the samples of a record, so
    that its outputs are the record's."""
    if options.input_shape is not None:
        walked = walk_trying(model, (1, *options.input_shape), PROBE_SAMPLES)
        if walked.probe is None:
            shape = ",".join(map(str, (1, *options.input_shape)))
            raise UsageError(
                f"--input-shape {shape}: the model's forward does not take it. Leave it out to have one found."
            )
        return walked
    if data is not None:
        some = data.train.batch(torch.arange(min(8, len(data.train))))
        return walk(model, probe_of_batch(some.to("cpu", dtype_of(model)).inputs), PROBE_SAMPLES)
    return walk_trying(model, None, PROBE_SAMPLES)


def tokenizer_for(path: Path, policy: Policy, data: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of a transformers directory where `data` may be text, else None."""
    wanted = policy.data.text_columns or any(map(table.matches, data))
    if not (wanted and (path / "config.json").is_file() and _reads_text(path)):
        return None
    tokenizer = tokenizer_of(path)
    limit = positions_of(read_config(path))
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def _reads_text(path: Path) -> bool:
    """A network of images has a preprocessor's settings and no tokenizer."""
    return not ((path / "preprocessor_config.json").is_file() and not (path / "tokenizer_config.json").is_file())


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens a transformers network takes at once, where it looks their positions up in a table."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(positions, int) or any(config.get(key) for key in _COMPUTED):
        return None
    padding = config.get("pad_token_id")
    offset = padding + 1 if config.get("model_type") in _OFFSET and isinstance(padding, int) else 0
    return positions - offset if positions > offset else None


def label_numbers(architecture: Mapping[str, Any]) -> dict[str, int] | None:
    """How a transformers network's own head numbers its classes, where it has one."""
    config = architecture.get("config")
    if not has_head(architecture) or not isinstance(config, dict):
        return None
    found = config.get("label2id")
    return dict(found) if isinstance(found, dict) and found else None


def _is_headless(opened: Opened, policy: Policy) -> bool:
    architecture = opened.architecture
    asked = policy.data.task is not None and architecture.get("kind") == "transformers"
    return asked and not has_head(architecture) and not opened.goes_on


def _with_trained_head(
    opened: Opened, data: Data, policy: Policy, options: ConvertOptions, tokenizer: Tokenizer | None, progress: Progress
) -> Opened:
    if data.num_outputs is None:
        raise UsageError(f"--task {policy.data.task}: the data has no labels to make a head for.")
    regression = data.task is not None and data.task.regression
    if data.num_outputs < 2 and not regression:
        raise FileError(
            f"{', '.join(policy.data.train)}: its labels are all of one class, and --task {policy.data.task} needs two "
            "or more to tell apart. Add examples of other classes, or take --task regression if labels are numbers"
        )
    module, architecture, new = with_head(
        opened.module,
        opened.architecture,
        outputs=data.num_outputs,
        names=data.class_names,
        regression=regression,
        text=tokenizer is not None,
        pad_token=None if tokenizer is None else tokenizer.pad_token_id,
        where=str(opened.path),
    )
    device = device_of(opened.module)
    module = module.to(device)
    if options.dry_run:
        return replace(opened, module=module, static=module, architecture=architecture)
    progress.stage("train the new head")
    steps = train_head_(module, set(new), data, policy, options.seed, device, progress)
    note = (
        f"a new head ({type(module).__name__}, outputs: {data.num_outputs}) was trained alone first (steps: {steps}); "
        "with it, the source is what all variants start from"
    )
    return replace(opened, module=module, static=module, architecture=architecture, notes=(*opened.notes, note))
