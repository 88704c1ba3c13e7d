"""The closed sets of words that several stages share: kinds, roles, verdicts, reason codes.

Sets that grow (scores, routers, readers) are folders instead: the file name is the word.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a layer computes."""

    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    UNKNOWN = "unknown"  # a tensor seen without its architecture


class Role(StrEnum):
    """What a layer is for in its network; policy rules match it by `role:`."""

    STEM = "stem"
    HEAD = "head"
    DEPTHWISE = "depthwise"
    ATTENTION = "attention"
    FFN = "ffn"
    CONV = "conv"
    LINEAR = "linear"


class Verdict(StrEnum):
    """What happens to a layer."""

    CONVERT = "convert"
    STATIC = "static"
    INELIGIBLE = "ineligible"


class Granularity(StrEnum):
    """The unit of a partition: single entries, whole filters (rows of the weight), or an FFN's whole hidden units."""

    ELEMENT = "element"
    CHANNEL = "channel"
    NEURON = "neuron"


class Place(StrEnum):
    """A layer's place in its feed-forward block (FFN): down(act(up(x))), or down(act(gate(x)) · up(x)).

    Members of a block share the routing of a call: the first one routes, the last one is `down`.
    """

    ALONE = "alone"  # no member of a block
    FIRST = "first"  # of up and gate the one that is called first
    PEER = "peer"  # the other one
    LAST = "last"


class Routing(StrEnum):
    """What is routed: a sample by its feature map's mean, a token by itself, or a sequence by its mean."""

    MAP = "map"
    TOKEN = "token"
    SEQUENCE = "sequence"


class Reason(StrEnum):
    """Why a layer has its verdict. The codes are stable: scripts match them."""

    explanation: str

    def __new__(cls, code: str, explanation: str) -> Reason:
        member = str.__new__(cls, code)
        member._value_ = code
        member.explanation = explanation
        return member

    # eligible, as far as the walk can tell
    ELIGIBLE = "eligible", "can be converted"
    # ineligible: found by the walk
    TRANSPOSED_CONVOLUTION = "transposed_convolution", "transposed convolutions have no dynamic form here"
    UNINITIALIZED = "uninitialized", "a lazy layer that has not seen an input yet has no weight"
    PARAMETRIZED = "parametrized", "its weight is computed from other tensors (weight_norm, spectral_norm, ...)"
    TIED_WEIGHT = "tied_weight", "its weight belongs to another module too"
    CUSTOM_FORWARD = "custom_forward", "its class computes something else than its parent class"
    HAS_HOOKS = "has_hooks", "hooks hang on it, which a replacement would lose"
    WEIGHT_READ_BY_PARENT = "weight_read_by_parent", "its parent reads the weight instead of calling the layer"
    UNSUPPORTED_DTYPE = "unsupported_dtype", "its weight is not a real floating-point tensor"
    META_WEIGHT = "meta_weight", "its weight holds no values (meta device)"
    BEYOND_NETWORKS = "beyond_networks", "its stride, dilation or padding is beyond what an artefact may state"
    NOT_CALLED = "not_called", "the model's forward never calls it"
    ALREADY_DYNAMIC = "already_dynamic", "it is dynamic already"
    FFN_NOT_PROVEN = "ffn_not_proven", "not proven that only pointwise operations stand within its feed-forward block"
    ALREADY_EXPERTS = "already_experts", "it belongs to a mixture of experts already"
    NO_ARCHITECTURE = "no_architecture", "the file holds tensors but no architecture; name one with --arch"
    # static: decided by the plan
    STEM_STATIC = "stem_static", "the first convolution stays static by default"
    HEAD_STATIC = "head_static", "the output layer stays static by default"
    DEPTHWISE_STATIC = "depthwise_static", "depthwise convolutions stay static by default"
    ATTENTION_STATIC = "attention_static", "attention projections stay static by default"
    LINEAR_STATIC = "linear_static", "beside feed-forward blocks, other linear layers stay static by default"
    POLICY_RULE = "policy_rule", "a rule of the policy decided"
    RATIO_ROUNDS_TO_ZERO = "ratio_rounds_to_zero", "its dynamic ratio leaves it no dynamic unit"
    # converted: decided by the plan
    POLICY_DEFAULT = "policy_default", "the policy's defaults apply"
