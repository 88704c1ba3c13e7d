"""`PadLayer`: what all partially dynamic layers share. Packed storage is its only form, in training and on disk.

    W(b) = λ_d · m ⊙ Σ_k π_k(b) · D_k  +  λ_s · (1 − m) ⊙ W_s                                    (design §3)

Its parameters and buffers are named as the checkpoint's tensors; `scale_logit` and the running state of the
router exist only in training and are folded away before a layer is stored.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from padconvert.layers.autocast import without_autocast
from padconvert.layers.facts import LayerFacts
from padconvert.layers.packed import Units, UnitView, assemble, pack_bits, unpack_bits
from padconvert.layers.routers import RouterModule, router_class
from padconvert.words import Granularity, Kind, Place, Routing

PARTS = ("weight", "bias")


class WeightFacts:
    """What `layer.weight` gives: dtype, device and shape, which parents may read. Computing with it is an error."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.shape = torch.Size(shape)
        self.dtype = like.dtype
        self.device = like.device


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """Units that turned static: unit `frm` of the `experts`, along their `dim`, is unit `to` of the static parameter.

    The gradient of a static entry is `scale` (λ_s/λ_d) times the sum of its experts' gradients, since Σ_k π_k = 1.
    """

    experts: nn.Parameter
    frm: Tensor
    to: Tensor
    dim: int
    scale: Tensor | float


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    """A parameter that a partition replaced: where the old one's units are in the new one.

    `new[..., to, :] = old[..., frm, :]` along `dim`; an optimizer's state moves the same way. What is new in a static
    parameter came of the experts `joined` names.
    """

    old: nn.Parameter | None
    new: nn.Parameter | None
    frm: Tensor
    to: Tensor
    dim: int
    joined: Joined | None = None


class PadLayer(nn.Module, ABC):
    """A partially dynamic layer. `facts` say its shape; see `upcycle` and `build_layer` for the ways to one."""

    weight_static: nn.Parameter | None
    weight_dynamic: nn.Parameter | None
    bias_static: nn.Parameter | None
    bias_dynamic: nn.Parameter | None
    scale_logit: nn.Parameter | None

    def __init__(self, facts: LayerFacts, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.kind = facts.kind
        self.granularity = facts.granularity
        self.num_experts = facts.num_experts
        self.routing = facts.routing
        self.router_name = facts.router
        self.top_k = facts.top_k
        self.group, self.place = facts.group, facts.place
        self.is_lean = False
        self.unit_dim = facts.unit_dim
        self.weight_shape = facts.weight_shape
        self.has_bias = facts.has_bias
        self._copy_call_options(facts)
        self.router: RouterModule | None = None
        if facts.has_router:
            made = router_class(facts.router)(self.router_channels, facts.num_experts, facts.top_k)
            self.router = made.to(device)
        self.register_parameter("scale_logit", None)
        for part, n_dynamic in (("weight", facts.n_dynamic), ("bias", facts.n_bias_dynamic)):
            self._register_empty_part(
                part, n_dynamic, torch.zeros((), dtype=getattr(torch, facts.dtype), device=device)
            )

    @abstractmethod
    def _copy_call_options(self, facts: LayerFacts) -> None:
        """Keep what a call needs beside the weights (stride, padding, …)."""

    @property
    @abstractmethod
    def router_channels(self) -> int:
        """Channels of the pooled input."""

    # ---- parts -------------------------------------------------------------------------------------------------

    def view(self, part: str) -> UnitView:
        """How the weight or the bias is cut into units."""
        if part == "bias":
            return UnitView(self.weight_shape[:1], self.granularity)
        return UnitView(self.weight_shape, self.granularity, self.unit_dim)

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS if self.has_bias else PARTS[:1]

    def units(self, part: str) -> Units:
        """Where the part's units belong."""
        return Units(getattr(self, f"_{part}_dynamic_units"), getattr(self, f"_{part}_static_units"))

    def count_dynamic(self, part: str) -> int:
        """How many of the part's units are dynamic."""
        dynamic = getattr(self, f"{part}_dynamic")
        return 0 if dynamic is None else int(dynamic.shape[1 + self.view(part).packed_dim])

    @property
    def shares_experts(self) -> bool:
        """Whether the experts are one in memory, seen `num_experts` times: equal, and not to be trained."""
        dynamic = [d for part in self.parts if (d := getattr(self, f"{part}_dynamic")) is not None]
        return bool(dynamic) and all(d.stride(0) == 0 for d in dynamic)

    @property
    def experts_are_equal(self) -> bool:
        """Whether all experts hold the same bytes: nothing was trained since upcycling."""
        stored = [] if self.shares_experts else [getattr(self, f"{part}_dynamic") for part in self.parts]
        return all(bool((dynamic == dynamic[:1]).all()) for dynamic in stored if dynamic is not None)

    @property
    def unit_parts(self) -> tuple[str, ...]:
        """The parts that a unit holds a slice of: the bias goes with its row, but not with a column."""
        return PARTS[:1] if self.unit_dim else self.parts

    def _index_name(self, part: str) -> str | None:
        """The buffer that stores a part's dynamic_mask. Rows are listed once: not for the bias, and for a block of
        `neuron` granularity under its first layer only."""
        if self.granularity is Granularity.ELEMENT:
            return "dynamic_bitmask" if part == "weight" else "bias_dynamic_bitmask"
        listed = part == "weight" and self.place in (Place.ALONE, Place.FIRST)
        return "dynamic_index" if listed or (part == "weight" and self.granularity is Granularity.CHANNEL) else None

    def _register_empty_part(self, part: str, n_dynamic: int, like: Tensor) -> None:
        view = self.view(part)
        exists = part in self.parts
        n_static = view.units - n_dynamic
        static = like.new_zeros(view.packed_shape(n_static))
        dynamic = like.new_zeros(self.num_experts, *view.packed_shape(n_dynamic))
        self.register_parameter(f"{part}_static", nn.Parameter(static) if exists and n_static else None)
        self.register_parameter(f"{part}_dynamic", nn.Parameter(dynamic) if exists and n_dynamic else None)
        if like.is_meta and view.by_entry:
            self._register_unknown_entries(part, exists and n_static > 0 and n_dynamic > 0)
            return
        mask = torch.arange(view.units, device="cpu" if like.is_meta else like.device) < n_dynamic
        self._register_units(part, Units.of_mask(mask))

    def _register_unknown_entries(self, part: str, mixed: bool) -> None:
        """Entries are many; where they belong is in what will be loaded."""
        self._register_units(part, Units.none())
        if mixed:
            bits = torch.empty(-(-self.view(part).units // 8), dtype=torch.uint8, device="meta")
            self.register_buffer(self._index_name(part) or "", bits)

    def _register_units(self, part: str, units: Units) -> None:
        """Keep the indices for the forward, and the stored form of the dynamic_mask beside them."""
        self.register_buffer(f"_{part}_dynamic_units", units.dynamic, persistent=False)
        self.register_buffer(f"_{part}_static_units", units.static, persistent=False)
        name = self._index_name(part)
        if name is not None:
            mixed = part in self.parts and len(units.dynamic) > 0 and len(units.static) > 0
            element = self.granularity is Granularity.ELEMENT
            stored = (pack_bits(units.mask()) if element else units.dynamic.int()) if mixed else None
            self.register_buffer(name, stored)

    def reindex_(self) -> None:
        """Recompute the indices from the stored dynamic_mask, after its buffer was loaded."""
        if self.is_lean:
            return
        if self.granularity is not Granularity.ELEMENT:
            stored = getattr(self, self._index_name("weight") or "", None)
            if stored is not None:
                mask = torch.zeros(self.view("weight").units, dtype=torch.bool, device=stored.device)
                self.place_units_(Units.of_mask(mask.index_fill(0, stored.long(), True)))
            return
        for part in self.parts:
            stored, total = getattr(self, self._index_name(part) or ""), self.view(part).units
            if stored is not None:
                self._register_units(part, Units.of_mask(unpack_bits(stored, total)))
            elif len(self.units(part).dynamic) + len(self.units(part).static) != total:
                like = self.weight.device
                self._register_units(part, Units.all(total, self.count_dynamic(part) > 0, like))

    def lean_(self, lean: bool = True) -> None:
        """Go without the indices of single entries, which take more memory than the weight, until `lean_(False)`. What
        a lean layer still computes is `paths.shared`."""
        self.is_lean = lean and self.granularity is Granularity.ELEMENT
        for part in self.parts if self.is_lean else ():
            self.register_buffer(f"_{part}_dynamic_units", Units.none().dynamic, persistent=False)
            self.register_buffer(f"_{part}_static_units", Units.none().static, persistent=False)
        if not lean:
            self.reindex_()

    def place_units_(self, units: Units) -> None:
        """Say where the layer's rows (or columns) belong, for all parts that a unit has a slice of."""
        for part in self.unit_parts:
            self._register_units(part, units)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        self.reindex_()

    # ---- the effective weight ----------------------------------------------------------------------------------

    def scales(self) -> tuple[Tensor | float, Tensor | float]:
        """(λ_s, λ_d): λ_d = 2·sigmoid(scale_logit), λ_s = 2 − λ_d; or both 1."""
        if self.scale_logit is None:
            return 1.0, 1.0
        dynamic_scale = 2 * torch.sigmoid(self.scale_logit)
        return 2 - dynamic_scale, dynamic_scale

    def add_scales_(self) -> None:
        """Learned scales, both 1 at first."""
        like = self.weight
        self.scale_logit = nn.Parameter(torch.zeros((), dtype=self.mixing_dtype, device=like.device))

    def cut_part(self, part: str) -> tuple[Tensor | None, Tensor | None]:
        """(static [N, S], dynamic [K, D, S]) with their scales, in the mixing dtype (at least fp32)."""
        return self._cut_scaled(part, *self.scales())

    def _cut_scaled(
        self, part: str, static_scale: Tensor | float, dynamic_scale: Tensor | float
    ) -> tuple[Tensor | None, Tensor | None]:
        static, dynamic = getattr(self, f"{part}_static"), getattr(self, f"{part}_dynamic")
        return self._scaled(part, static, static_scale), self._scaled(part, dynamic, dynamic_scale)

    def _scaled(self, part: str, packed: Tensor | None, scale: Tensor | float) -> Tensor | None:
        if packed is None:
            return None
        cut = self.view(part).cut_packed(packed).to(self.mixing_dtype)
        return cut if isinstance(scale, float) else cut * scale  # a product with 1 would be a copy of all experts

    def expert_tensors(self, part: str) -> Tensor:
        """Every expert's full weight [K, *weight_shape] or bias [K, O], scaled, in the mixing dtype."""
        return self._assembled(part, *self.cut_part(part))

    def relative_experts(self, part: str) -> tuple[Tensor, Tensor | float]:
        """`expert_tensors` over λ_d, and λ_d: what they give can be scaled in their place."""
        static_scale, dynamic_scale = self.scales()
        return self._assembled(part, *self._cut_scaled(part, static_scale / dynamic_scale, 1.0)), dynamic_scale

    def _assembled(self, part: str, static_NS: Tensor | None, dynamic_KDS: Tensor | None) -> Tensor:
        return self.view(part).as_full(assemble(static_NS, dynamic_KDS, self.units(part), self.num_experts))

    @property
    def mixing_dtype(self) -> torch.dtype:
        """π and the mix are computed in fp32, or fp64 for an fp64 layer."""
        return torch.float64 if self.stored_dtype == torch.float64 else torch.float32

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights (the router stays in fp32)."""
        return self.weight.dtype

    @property
    def is_dynamic(self) -> bool:
        return self.weight_dynamic is not None or self.bias_dynamic is not None

    @property
    def weight(self) -> WeightFacts:
        """dtype, device and shape of the layer's weight. There is no single weight tensor to read."""
        stored = self.weight_static if self.weight_static is not None else self.weight_dynamic
        assert stored is not None
        return WeightFacts(self.weight_shape, stored)

    @abstractmethod
    def pooled(self, x: Tensor) -> Tensor:
        """What the router reads: [B, C], or [..., C] where single tokens are routed."""

    def route(self, x: Tensor) -> Tensor:
        """Routing weights π: [B, K], or [..., K] where single tokens are routed."""
        assert self.router is not None, "the members of a block after the first do not route"
        with without_autocast(x):
            return cast(Tensor, self.router(self.pooled(x.to(self.mixing_dtype))))

    # ---- partition ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def partition_(self, part: str, dynamic_mask: Tensor, mean_routing_K: Tensor) -> list[Moved]:
        """Turn units static until only those of `dynamic_mask` [U] are dynamic.

        A newly static entry takes the value that changes the function least, W_s = (λ_d/λ_s) Σ_k π̄_k D_k, with
        π̄ = `mean_routing_K`. Masks only shrink: a unit that is static already cannot become dynamic.
        Returns how the parameters moved, for the optimizer.
        """
        old = self.units(part)
        assert bool((dynamic_mask <= old.mask()).all()), "a dynamic_mask only shrinks"
        new = Units.of_mask(dynamic_mask)
        static_NS, dynamic_KDS = self._joined(part, mean_routing_K)
        view, like = self.view(part), getattr(self, f"{part}_dynamic")
        static, dynamic = view.as_packed(static_NS[new.static]), view.as_packed(dynamic_KDS[:, new.dynamic])
        dim = view.packed_dim
        turned = torch.isin(new.static, old.dynamic)
        frm, to = torch.searchsorted(old.dynamic, new.static[turned]), turned.nonzero()[:, 0]
        static_scale, dynamic_scale = self.scales()
        moved = [
            dataclasses.replace(
                self._replace(f"{part}_static", static, like, old.static, new.static, dim=dim),
                joined=Joined(like, frm, to, dim + 1, static_scale / dynamic_scale),
            ),
            self._replace(f"{part}_dynamic", dynamic, like, old.dynamic, new.dynamic, dim=dim + 1),
        ]
        self._register_units(part, new)
        return moved

    def _joined(self, part: str, mean_routing_K: Tensor) -> tuple[Tensor, Tensor]:
        """(unscaled static value of every unit [U, S], dynamic values at their places [K, U, S])."""
        units, view, dtype = self.units(part), self.view(part), self.mixing_dtype
        static, dynamic = getattr(self, f"{part}_static"), getattr(self, f"{part}_dynamic")
        total = view.units
        assert dynamic is not None, "there is nothing left to turn static"
        cut_KDS = view.cut_packed(dynamic).to(dtype)
        dynamic_KUS = cut_KDS.new_zeros(self.num_experts, total, view.size).index_copy(1, units.dynamic, cut_KDS)
        static_scale, dynamic_scale = self.scales()
        share_K = (mean_routing_K.double() / mean_routing_K.double().sum()).to(dynamic_KUS)
        mean_US = torch.einsum("k,kus->us", share_K, dynamic_KUS)
        static_US = mean_US * (dynamic_scale / static_scale)
        if static is not None:
            static_US = static_US.index_copy(0, units.static, view.cut_packed(static).to(dtype))
        return static_US, dynamic_KUS

    def _replace(self, name: str, value: Tensor, like: Tensor, old_units: Tensor, new_units: Tensor, dim: int) -> Moved:
        old = cast(nn.Parameter | None, getattr(self, name))
        kept = value.numel() > 0
        new = nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad) if kept else None
        self.register_parameter(name, new)
        both = torch.isin(new_units, old_units)
        frm = torch.searchsorted(old_units, new_units[both])
        return Moved(old, new, frm, both.nonzero()[:, 0], dim)

    def resize_(self, n_dynamic: int, n_bias_dynamic: int) -> None:
        """Room for another partition's values, to be filled by the caller. Frozen parameters stay frozen."""
        like = next(p for n, p in self.named_parameters(recurse=False) if n.startswith("weight"))
        frozen = {part for part in self.parts if not self.is_trainable(part)}
        for part, count in (("weight", n_dynamic), ("bias", n_bias_dynamic)):
            self._register_empty_part(part, count, like.detach())
        for part in frozen:
            for name in (f"{part}_static", f"{part}_dynamic"):
                if getattr(self, name) is not None:
                    getattr(self, name).requires_grad_(False)

    def is_trainable(self, part: str) -> bool:
        """Whether the part's values are trained; a source's frozen weight stays frozen."""
        return any(p.requires_grad for n, p in self.named_parameters(recurse=False) if n.startswith(part))

    # ---- what it is --------------------------------------------------------------------------------------------

    def facts(self) -> LayerFacts:
        """The shape of this layer: enough for `build_layer` to make an empty one like it."""
        return LayerFacts(
            kind=self.kind,
            granularity=self.granularity,
            num_experts=self.num_experts,
            weight_shape=self.weight_shape,
            dtype=str(self.stored_dtype).removeprefix("torch."),
            has_bias=self.has_bias,
            n_dynamic=self.count_dynamic("weight"),
            n_bias_dynamic=self.count_dynamic("bias"),
            router=self.router_name,
            routing=self.routing,
            top_k=self.top_k,
            group=self.group,
            place=self.place,
        )

    def extra_repr(self) -> str:
        share = self.count_dynamic("weight") / self.view("weight").units
        return f"{self.weight_shape}, num_experts={self.num_experts}, {self.granularity}, dynamic={share:.3f}"

    def pooling_is_per_token(self) -> bool:
        return self.kind is Kind.LINEAR and self.routing is Routing.TOKEN
