"""What a path takes, estimated: the static layer's own time, and the floors that no path can go below.

The floors are the bytes of the experts, read once a piece of the batch; the multiply-adds of mixing; and the
dynamic units written for every sample. All constants are seconds for one entry, one multiply-add or one call of one
thread in fp32; a choice depends on their ratios only. They are constants, not measurements at run time, so that
equal cases are given equal paths on every machine; `measure.tune_` corrects a choice by the clock where one asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from padconvert.layers.paths.call import piece_size
from padconvert.layers.paths.case import Case


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of device."""

    block: int  # rows are computed so many at a time
    mac: float  # of a convolution
    pointwise: float  # of a 1x1 convolution
    product: float  # of a batched matrix product
    grouped: float  # of a convolution with a group for every sample
    reorder: float  # an entry of a weight, brought into the form a convolution computes in, for every call
    maps: float  # an entry of the input or output of a convolution, brought into that form and back
    read: float  # an entry of the experts, from memory
    mix: float  # a multiply-add of mixing
    copy: float  # an entry copied with its row
    scatter: float  # an entry written on its own
    output: float  # an entry of an output copied to its place
    fresh: float  # an entry of memory that the system hands out anew for a call, for allocations past `kept`
    kept: int  # entries
    call: float  # one call


#: fitted to one thread of an AMD EPYC (AVX-512)
CPU = Machine(
    block=16, mac=21e-12, pointwise=23.5e-12, product=27e-12, grouped=24.5e-12, reorder=0.75e-9, maps=0.1e-9,
    read=0.1e-9, mix=0.115e-9, copy=0.235e-9, scatter=1e-9, output=0.69e-9, fresh=0.95e-9, kept=8 << 20, call=19e-6,
)  # fmt: skip
#: not measured: ratios of arithmetic to bandwidth as data sheets give them, and a call as long as a launch
GPU = Machine(
    block=8,
    mac=0.05e-12, pointwise=0.05e-12, product=0.06e-12, grouped=0.5e-12, reorder=0, maps=0, read=2e-12, mix=0.5e-12,
    copy=3e-12, scatter=10e-12, output=3e-12, fresh=0, kept=8 << 20, call=10e-6,
)  # fmt: skip


def machine_of(device: str) -> Machine:
    """The constants for a kind of device; those of a GPU for whatever is no CPU."""
    return CPU if device == "cpu" else GPU


def convolutions(case: Case, machine: Machine, calls: int, share: float = 1.0) -> float:
    """All samples through `share` of the weight's rows, in so many calls of equal batch. A convolution reorders its
    weight, its input and its output, the last two into memory of its own."""
    share = blocked(case, machine, share)
    mac = machine.pointwise if case.pointwise else machine.mac
    work = case.batch * case.macs * mac + calls * case.entries * machine.reorder
    maps = case.batch * (case.inputs + round(case.outputs * share))
    return share * work + maps * machine.maps + calls * (machine.call + allocated(maps // max(calls, 1), machine))


def grouping(case: Case, machine: Machine, share: float = 1.0) -> float:
    """All samples through their own `share` of rows, with a group for every sample of a piece of the batch."""
    size = min(piece_size(case.device, round(case.entries * share), case.batch), case.batch)
    calls = math.ceil(case.batch / size)
    outputs = round(case.outputs * share)
    per_sample = case.macs * machine.grouped + case.entries * machine.reorder
    copied = placing(case.batch * outputs, machine) if calls > 1 else 0.0
    maps = case.inputs + outputs
    through = case.batch * maps * machine.maps + calls * (machine.call + allocated(size * maps, machine))
    return blocked(case, machine, share) * case.batch * per_sample + through + copied


def products(case: Case, machine: Machine) -> float:
    """All samples through their own matrices, which a product reorders in half a convolution's time."""
    work = case.macs * machine.product + case.entries * machine.reorder / 2
    return case.batch * work + allocated(case.batch * case.outputs, machine)


def blocked(case: Case, machine: Machine, share: float) -> float:
    """The share of rows that is computed where so many are wanted: whole blocks of them."""
    rows = case.weight_shape[0]
    return math.ceil(round(share * rows, 6) / machine.block) * machine.block / rows


def mixing(case: Case, machine: Machine) -> float:
    """Σ_k π_k D_k for every sample: the bytes of the experts, and the multiply-adds."""
    experts = case.num_experts * case.dynamic_entries
    return experts * machine.read + case.batch * experts * machine.mix + machine.call


def whole_weights(case: Case, machine: Machine) -> float:
    """The mixed units of all samples, and their whole weights, put together in new memory."""
    static, dynamic = case.entries - case.dynamic_entries, case.dynamic_entries
    written = dynamic * (machine.copy if case.by_row else machine.scatter)
    placed = static * (machine.copy if case.by_row else machine.scatter) if case.n_static else 0.0
    new = allocated(case.batch * case.entries, machine) + allocated(case.batch * dynamic, machine)
    return case.batch * (written + placed) + new


def placing(entries: int, machine: Machine) -> float:
    """So many entries of outputs, copied to their places in new memory."""
    return entries * machine.output + allocated(entries, machine)


def allocated(entries: int, machine: Machine) -> float:
    """New memory: small pieces come back from the allocator, large ones are paged in for every call."""
    return entries * machine.fresh if entries > machine.kept else 0.0
