"""What a run has to say, as plain values: `convert.py` and `verify.py` fill these in, `report/` shows them.

The field names are the keys of the JSON documents (`padconvert.convert/1`, `padconvert.verify/1`): more may be
added, none renamed. Metrics are fractions from 0 to 1, sizes are bytes, times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from padconvert.words import Reason, Verdict

Metrics = dict[str, float]

#: an expert with less than this share of an even one is as good as unused
STARVED = 0.05
#: below this entropy of the usage (1: all experts alike) a router has collapsed
COLLAPSED = 0.5


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str
    kind: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class OutputFile:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Parameters and bytes beside both neighbours, the static source and the fully dynamic network.

    `bytes_source` and `bytes_output` are whole files, `bytes_fully_dynamic` is with a header like the output's. A dry
    run has no output file: its `bytes_output` and `bytes_fully_dynamic` are predicted, without a header. The
    `tensor_bytes_…` are without header and wrapping: the source's tensors; values, masks, routers and untouched ones.
    `params_active_…` are the numbers that one token (or sample) is computed with: all of the source's; of a converted
    layer the static ones, top-k times the dynamic ones (once, where all experts are mixed into one) and the router.
    """

    params_source: int
    params_output: int
    params_fully_dynamic: int
    bytes_source: int
    bytes_output: int
    bytes_fully_dynamic: int
    bytes_values: int
    bytes_masks: int
    bytes_router: int
    bytes_header: int
    tensor_bytes_source: int
    tensor_bytes_output: int
    tensor_bytes_fully_dynamic: int
    dynamic_ratio: float  # dynamic share of the converted layers' weight entries
    macs_source: int | None = None
    params_active_source: int | None = None
    params_active_output: int | None = None
    params_active_fully_dynamic: int | None = None


@dataclass(frozen=True, slots=True)
class LayerResult:
    name: str
    aliases: tuple[str, ...]
    kind: str
    verdict: Verdict
    reason: Reason
    granularity: str | None = None
    num_experts: int | None = None
    dynamic_ratio: float | None = None
    n_static: int | None = None  # weight entries; None where they are not known (yet)
    n_dynamic: int | None = None
    detail: str = ""
    type: str = ""  # class name
    role: str = ""
    dtype: str = ""
    weight_shape: tuple[int, ...] = ()
    macs: int | None = None  # multiply-adds per sample, where an input was known
    group: str = ""  # first layer of the feed-forward block that it is converted with
    place: str = "alone"  # in that block: "first", "peer" or "last"
    top_k: int | None = None  # experts computed for a token; 0: all of them, mixed
    separation: float | None = None  # how far its inputs fall into `num_experts` kinds; of `inspect --data`


@dataclass(frozen=True, slots=True)
class Equality:
    """The first promise: source against rewritten model before any training, in eval mode.

    `method` is "forward" (outputs) or "weights" (max |Σ π D − W| per layer, where no forward is possible);
    `max_rel_diff` is max|Δ| / max|y|, held against `tolerance`; `why` says why no forward was compared.
    """

    method: str
    max_abs_diff: float
    max_rel_diff: float
    tolerance: float
    passed: bool
    samples: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Evaluation results. `static` and `fully_dynamic` are there with `--compare`: the same steps and batches."""

    source: Metrics
    output: Metrics
    static: Metrics | None = None
    fully_dynamic: Metrics | None = None
    #: one plain sentence: what was gained over fine-tuning the static model, or that nothing was
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class RouterUse:
    """How a trained router uses its layer's experts on the evaluation data, or the training data where there is none.

    `usage` is the share of choices that fell on each expert (top-k), or its mean routing weight (all mixed). Entropies
    are fractions of the highest, log K: of `usage`, 1 where all experts are used alike; of a single token's (sample's)
    routing weights, 0 where one expert decides. `starved` counts experts with less than `STARVED` of an even share;
    `collapsed`: `usage_entropy` is below `COLLAPSED`; neither is told from a handful of tokens.
    """

    layer: str
    usage: tuple[float, ...]
    usage_entropy: float
    routing_entropy: float
    starved: int
    collapsed: bool


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound that the user set, and what was measured: bytes, a number of layers, or a fraction for an accuracy.
    `name` is the option's, with underscores; `measured` says what `value` is:

    "file_bytes" of the written file · "tensor_bytes" that it has at least, header not counted (a refusal before any
    work) · "estimated_bytes" of memory at the peak · "source_bytes" of the source's tensors, which are the least that
    is held · "layers" · "accuracy" · "options"
    """

    name: str
    value: float
    bound: float
    passed: bool
    measured: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """All of one `convert` run. `output` is None for a dry run."""

    source: SourceFile
    output: OutputFile | None
    totals: Totals
    layers: tuple[LayerResult, ...]
    equality: Equality | None
    metrics: Comparison | None
    route: str  # "trained" or "data-free"
    seed: int
    timing: dict[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    #: per round of the partition: step, ratio, number of dynamic entries; and the loss curve
    history: tuple[dict[str, float], ...] = ()
    #: the bounds that were decided; a dry run decides those that the plan alone can
    gates: tuple[Gate, ...] = ()
    #: where `--plan-out` saved the plan
    plan_file: str | None = None
    #: of a trained output: one record a router
    routers: tuple[RouterUse, ...] = ()
    schema: str = field(default="padconvert.convert/1")


@dataclass(frozen=True, slots=True)
class Check:
    """`held` is False where there was nothing to hold `value` against: it cannot fail, and is no check that passed."""

    name: str
    passed: bool
    value: float | str | None
    limit: float | str | None
    detail: str = ""
    held: bool = True


@dataclass(frozen=True, slots=True)
class Verification:
    path: str
    checks: tuple[Check, ...]
    passed: bool
    schema: str = field(default="padconvert.verify/1")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a file holds. Of a source, the `_output` and `_fully_dynamic` numbers are what the policy would make.

    `params` counts every tensor once. Bytes and `params_active` are as in `Totals`, of a source as in a dry run; they
    are None where nothing is known, as of the file that an artefact was made from.
    """

    layers: int
    converted: int
    params_source: int | None
    params_output: int | None
    params_fully_dynamic: int | None
    bytes_source: int | None
    bytes_output: int | None
    bytes_fully_dynamic: int | None
    bytes_values: int | None = None
    bytes_masks: int | None = None
    bytes_router: int | None = None
    bytes_header: int | None = None
    tensor_bytes_source: int | None = None
    tensor_bytes_output: int | None = None
    tensor_bytes_fully_dynamic: int | None = None
    dynamic_ratio: float | None = None
    macs_source: int | None = None
    params_active_source: int | None = None
    params_active_output: int | None = None
    params_active_fully_dynamic: int | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found. `trained` and `provenance` are of an artefact, and None for a source."""

    path: str
    kind: str
    bytes: int
    totals: Holdings
    layers: tuple[LayerResult, ...]
    notes: tuple[str, ...] = ()
    trained: bool | None = None
    provenance: dict[str, object] | None = None
    separation: float | None = None  # the layers' mean, of `inspect --data`
    schema: str = field(default="padconvert.inspect/1")


@dataclass(frozen=True, slots=True)
class AuditedName:
    """A class, function, operation or size that a file names; `why` it is allowed, or what to do as it is not."""

    name: str
    allowed: bool
    why: str


@dataclass(frozen=True, slots=True)
class Member:
    """A part of a file: a member of an archive, a tensor, a file of a folder."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Audited:
    """What `inspect --audit` found. `verdict` is "safe", "trust" (loads once the packages in `trust` are trusted),
    "refused" or "unreadable"; `detail` is the message with which loading would stop."""

    path: str
    kind: str
    bytes: int
    verdict: str
    detail: str = ""
    trust: tuple[str, ...] = ()
    names: tuple[AuditedName, ...] = ()
    members: tuple[Member, ...] = ()
    schema: str = field(default="padconvert.audit/1")

    @property
    def exit_code(self) -> int:
        """0 for a safe file, 4 for an unreadable one, else 6."""
        return {"safe": 0, "unreadable": 4}.get(self.verdict, 6)


@dataclass(frozen=True, slots=True)
class Extra:
    """A group of optional packages. `missing` is empty where all are there; `install` is the line that gets them."""

    name: str
    purpose: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `doctor` found. `versions` maps each package to its version; a package that is not there is None."""

    python: str
    platform: str
    versions: dict[str, str | None]
    devices: tuple[str, ...]
    threads: int
    cores: int
    extras: tuple[Extra, ...]
    schema: str = field(default="padconvert.doctor/1")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the numbers were measured on. `vectors` is the widest vector unit that torch computes with on the CPU."""

    device: str
    cores: int
    threads: int
    vectors: str
    torch: str
    python: str


@dataclass(frozen=True, slots=True)
class Timed:
    """One network at one batch size: seconds a call, and its time over the static network's in the same round, each as
    median and quartiles. `peak_bytes`: memory at the peak of a call above what was held before it, None where the
    system does not say."""

    seconds: float
    seconds_low: float
    seconds_high: float
    over_static: float
    over_static_low: float
    over_static_high: float
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class BenchBatch:
    """`output_over_fully_dynamic` is round by round too: below 1, the partition saves time."""

    batch_size: int
    rounds: int
    static: Timed
    output: Timed
    fully_dynamic: Timed
    output_over_fully_dynamic: float


@dataclass(frozen=True, slots=True)
class BenchLayer:
    """A converted layer inside its network: medians of its seconds a call of the network, and over the static layer's
    in the same round. `path` is the compute path that it took, None where it is not known."""

    name: str
    batch_size: int
    kind: str
    weight_shape: tuple[int, ...]
    granularity: str
    seconds_static: float
    seconds_output: float
    seconds_fully_dynamic: float
    over_static: float
    fully_dynamic_over_static: float
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What `bench` measured. Bytes are those of each network's tensors in memory. `complete` is False after a Ctrl-C:
    there are fewer batch sizes or rounds then."""

    artefact: str
    source: str
    machine: Machine
    dtype: str
    inputs: dict[str, tuple[int, ...]]  # by name or position, without the batch
    bytes_static: int
    bytes_output: int
    bytes_fully_dynamic: int
    batches: tuple[BenchBatch, ...]
    layers: tuple[BenchLayer, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = True
    schema: str = field(default="padconvert.bench/1")


Result = Conversion | Inspection | Verification | Audited | Diagnosis | Bench
