"""The policy as frozen pydantic models: what may be written, and what every value must hold to.

The models carry no defaults: those stand in `presets/paper.yaml`. A `Rule` leaves unsaid what it does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Literal, TypeVar

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
Texts = TypeVar("Texts", str | None, tuple[str, ...])
NO_TOKENIZER = (
    "needs a tokenizer, which this version does not have. Leave it out, and give tokenized arrays in an .npz file "
    "with data.input_key: input_ids,attention_mask"
)
MAX_COUNT = 10**9  # of steps, samples, pixels: more is a slip of the pen
MAX_EXPERTS = 10**12  # what memory holds decides; this only keeps the arithmetic within 64 bits
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


def _needs_no_tokenizer(value: Texts) -> Texts:
    """The seam for text: `task` and `text_columns` are keys of format 1, and what they ask for is not there yet."""
    if value:
        words = value if isinstance(value, str) else ", ".join(value)
        raise ValueError(f"{shortened(words)} {NO_TOKENIZER}")
    return value


_RATIO_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string"}]}
Ratio = Annotated[
    Decimal,
    BeforeValidator(_decimal),
    Field(ge=0, le=1, decimal_places=MAX_PLACES),
    WithJsonSchema(_RATIO_SCHEMA, mode="validation"),
]
Experts = Annotated[int, Field(ge=2, le=MAX_EXPERTS)]
GranularityName = Literal["element", "channel", "neuron"]
Scales = Literal["both", "none"]
RoutingName = Literal["token", "sequence"]
RoleName = Annotated[str, AfterValidator(_one_of(role_names)), Field(json_schema_extra={"enum": list(role_names())})]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_checked_pattern)]
Score = Annotated[str, AfterValidator(_one_of(score_names)), Field(json_schema_extra={"enum": list(score_names())})]
Router = Annotated[str, AfterValidator(_one_of(router_names)), Field(json_schema_extra={"enum": list(router_names())})]
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
    """How a layer is converted."""

    convert: bool
    dynamic_ratio: Ratio
    num_experts: Experts
    granularity: GranularityName
    scales: Scales
    router: Router
    routing: RoutingName


class Rule(Section):
    """Which layers (all of `name`, `type`, `role` that are given must hold), and what differs from the defaults there.

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

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.name is None and self.type is None and self.role is None:
            raise ValueError("a rule needs 'name', 'type' or 'role' to say which layers it is for")
        if not self.overrides():
            raise ValueError("the rule changes nothing; add 'convert' or another setting of 'defaults'")
        return self

    def overrides(self) -> dict[str, object]:
        """The settings of `Choice` that the rule gives."""
        return {key: value for key in Choice.model_fields if (value := getattr(self, key)) is not None}


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
    optimizer: Literal["sgd", "adamw"]
    lr: Positive
    momentum: BelowOne
    weight_decay: NonNegative
    router_lr_scale: NonNegative
    warmup: Share
    partitioning: Share
    what: Literal["all", "converted"]
    objective: Literal["auto", "task", "distill", "both"]
    distill_weight: NonNegative
    temperature_start: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    schedule: Literal["cosine", "constant"]
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
    text_columns: Annotated[tuple[Word, ...], AfterValidator(_needs_no_tokenizer)]
    label_column: Word
    input_key: Word
    label_key: Word
    holdout: BelowOne
    task: Annotated[Word | None, AfterValidator(_needs_no_tokenizer)]

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
    rules: tuple[Rule, ...]
    partition: Partition
    train: Train
    data: Data
