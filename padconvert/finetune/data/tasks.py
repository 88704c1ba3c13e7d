"""The tasks that `data.task` may name: what each reads, what its labels are, and what it is judged by.

A task only fills in what the policy leaves unsaid, and only with columns that the file has.
"""

from __future__ import annotations

from dataclasses import dataclass

from padconvert.errors import PolicyError


@dataclass(frozen=True, slots=True)
class Task:
    """`texts`, `labels`: column names in use for this task, the first that a file has is taken.

    `classes`: names of the classes in the order of their numbers; empty where the labels tell. `metrics` as in
    `finetune.metrics`. A task of `regression` has numbers for labels, and one output.
    """

    texts: tuple[tuple[str, ...], ...] = ()
    labels: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    regression: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

#: columns as the GLUE files and their copies in `datasets` name them; class numbers and metrics are GLUE's
TASKS: dict[str, Task] = {
    "glue/cola": Task((("sentence",),), classes=("unacceptable", "acceptable"), metrics=("matthews",)),
    "glue/sst2": Task((("sentence",),), classes=("negative", "positive")),
    "glue/mrpc": Task(
        (_PAIR, ("#1 String", "#2 String")),
        ("label", "Quality"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    "glue/stsb": Task((_PAIR,), ("label", "score"), metrics=("pearson", "spearman"), regression=True),
    "glue/qqp": Task(
        (("question1", "question2"),),
        ("label", "is_duplicate"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "glue/mnli": Task(
        (("premise", "hypothesis"), _PAIR),
        ("label", "gold_label"),
        ("entailment", "neutral", "contradiction"),
    ),
    "glue/qnli": Task((("question", "sentence"),), classes=_ENTAILMENT),
    "glue/rte": Task((_PAIR,), classes=_ENTAILMENT),
    "glue/wnli": Task((_PAIR,), classes=("not_entailment", "entailment")),
    "classification": Task(),
    "regression": Task(labels=("label", "score"), metrics=("pearson",), regression=True),
}


def task_named(name: str | None) -> Task | None:
    """The task of that name, or None without one. Raises `PolicyError`, listing the tasks."""
    if name is not None and name not in TASKS:
        raise PolicyError(f"data.task: '{name}' is unknown. Choose from {', '.join(TASKS)}")
    return None if name is None else TASKS[name]
