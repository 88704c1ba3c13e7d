"""The policy as frozen pydantic models: what may be written, and what every value must hold to.

The models carry no defaults: those stand in `presets/paper.yaml`. A `Rule` leaves unsaid what it does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from padconvert.policy.document import shortened
from padconvert.policy.pattern import name_matcher
from padconvert.words import Role

PACKAGE = Path(__file__).parent.parent
#: what `data.task` may say: tasks of GLUE by name, or what the labels of one's own text are
TASKS = (
    *(f"glue/{name}" for name in ("sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")),
    "classification",
    "regression",
)
MAX_COUNT = 10**9  # of steps, samples, pixels: more is a slip of the pen
MAX_EXPERTS = 65_536  # more than any network has; each is held in memory while it is trained
MAX_PLACES = 24  # decimal places of a ratio: a bound on the exact arithmetic that follows


def names_in(folder: str) -> tuple[str, ...]:
    """The names a folder of the package offers (`partition/scores`, …): its file names, listed without importing."""
    return tuple(sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_")))


def score_names() -> tuple[str, ...]:
    return names_in("partition/scores")


def router_names() -> tuple[str, ...]:
    return names_in("layers/routers")


def role_names() -> tuple[str, ...]:
    return tuple(role.value for role in Role)


def task_names() -> tuple[str, ...]:
    return TASKS


def _checked_pattern(pattern: str) -> str:
    name_matcher(pattern)
    return pattern


def _decimal(value: object) -> object:
    """YAML numbers as the decimal fraction that was written: 0.3 is 3/10, not the nearest double."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (int, float, str, Decimal)):
        return value
    try:
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except InvalidOperation:
        return value
    exponent = number.as_tuple().exponent
    short = isinstance(exponent, int) and exponent >= -MAX_PLACES
    # One written form for one number; what is out of bounds is left for the bounds below to name.
    return number.normalize() if short and 0 <= number <= 1 else number


def _one_of(names: Callable[[], tuple[str, ...]]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in names():
            raise ValueError(f"{shortened(value)!r} is none of {', '.join(names())}.")
        return value

    return check


def _check_top_k(top_k: int | None, num_experts: int | None) -> None:
    if top_k is not None and num_experts is not None and top_k > num_experts:
        raise ValueError(f"'top_k' {top_k} is more than there are experts: 'num_experts' is {num_experts}")


_RATIO_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string"}]}
Ratio = Annotated[
    Decimal,
    BeforeValidator(_decimal),
    Field(ge=0, le=1, decimal_places=MAX_PLACES),
    WithJsonSchema(_RATIO_SCHEMA, mode="validation"),
]
Experts = Annotated[int, Field(ge=2, le=MAX_EXPERTS)]
TopK = Annotated[int, Field(ge=0, le=MAX_EXPERTS)]
GranularityName = Literal["element", "channel", "neuron"]
Scales = Literal["both", "none"]
RoutingName = Literal["token", "sequence"]
Level = Literal["ffn", "linear"]
RoleName = Annotated[str, AfterValidator(_one_of(role_names)), Field(json_schema_extra={"enum": list(role_names())})]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_checked_pattern)]
Score = Annotated[str, AfterValidator(_one_of(score_names)), Field(json_schema_extra={"enum": list(score_names())})]
Router = Annotated[str, AfterValidator(_one_of(router_names)), Field(json_schema_extra={"enum": list(router_names())})]
Task = Annotated[str, AfterValidator(_one_of(task_names)), Field(json_schema_extra={"enum": list(TASKS)})]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Word = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Choice(Section):
    """How a layer is converted. Of its experts `top_k` are computed for a token; 0: all of them, mixed."""

    convert: bool
    dynamic_ratio: Ratio
    num_experts: Experts
    granularity: GranularityName
    scales: Scales
    router: Router
    routing: RoutingName
    top_k: TopK

    @model_validator(mode="after")
    def _enough_experts(self) -> Choice:
        _check_top_k(self.top_k, self.num_experts)
        return self


class Ffn(Choice):
    """How a feed-forward block is converted: as a whole with one router (`ffn`), or each linear layer by itself."""

    level: Level


class Rule(Section):
    """Which layers (all of `name`, `type`, `role` that are given must hold), and what differs there from the defaults
    (from `ffn` in a feed-forward block).

    A rule that matches asks for conversion unless it says `convert: false`.
    """

    name: Pattern | None = None
    type: Word | None = None
    role: RoleName | None = None
    optional: bool = False
    convert: bool | None = None
    dynamic_ratio: Ratio | None = None
    num_experts: Experts | None = None
    granularity: GranularityName | None = None
    scales: Scales | None = None
    router: Router | None = None
    routing: RoutingName | None = None
    top_k: TopK | None = None
    level: Level | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.name is None and self.type is None and self.role is None:
            raise ValueError("a rule needs 'name', 'type' or 'role' to say which layers it is for")
        if not self.overrides():
            raise ValueError("the rule changes nothing; add 'convert' or another setting of 'defaults'")
        _check_top_k(self.top_k, self.num_experts)
        return self

    def overrides(self) -> dict[str, object]:
        """The settings of `Ffn` that the rule gives."""
        return {key: value for key in Ffn.model_fields if (value := getattr(self, key)) is not None}


class Partition(Section):
    score: Score
    scope: Literal["global", "layer"]
    rounds: Count
    schedule: Literal["exponential", "linear"]
    batches: Count
    micro_batch: Count


class Train(Section):
    steps: Count
    batch_size: Count
    optimizer: Literal["adamw", "sgd"]
    lr: Positive | None
    momentum: BelowOne
    weight_decay: NonNegative
    expert_lr_scale: Positive
    router_lr_scale: NonNegative
    warmup: Share
    partitioning: Share
    what: Literal["all", "converted"]
    objective: Literal["auto", "task", "distill", "both"]
    distill_weight: NonNegative
    top_probability: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None
    temperature_start: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    balance_weight: NonNegative
    z_weight: NonNegative
    schedule: Literal["cosine", "constant"]
    head: Share
    head_lr: Positive
    compare: bool

    @model_validator(mode="after")
    def _shares_fit(self) -> Train:
        total = Decimal(repr(self.warmup)) + Decimal(repr(self.partitioning))
        if total > 1:
            raise ValueError(f"'warmup' and 'partitioning' are shares of the steps and add up to {total}, more than 1")
        return self


class Data(Section):
    #: files, folders or `pkg.mod:function`; in YAML one alone needs no brackets
    train: tuple[Word, ...]
    eval: tuple[Word, ...]
    layout: Literal["nchw", "nhwc"]
    scale: Positive
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    augment: tuple[Literal["crop", "flip"], ...]
    size: tuple[Count, Count] | None
    text_columns: tuple[Word, ...]
    max_length: Count
    label_column: Word
    input_key: Word
    label_key: Word
    holdout: BelowOne
    task: Task | None

    @model_validator(mode="after")
    def _as_many(self) -> Data:
        if len(self.mean) != len(self.std):
            raise ValueError(f"'mean' has {len(self.mean)} values and 'std' {len(self.std)}; give one each per channel")
        return self


class Policy(Section):
    """A whole policy: nothing is left open."""

    version: Literal[1]
    extends: str
    defaults: Choice
    ffn: Ffn
    rules: tuple[Rule, ...]
    partition: Partition
    train: Train
    data: Data
