"""Networks of the zoo that are each named for the trap they hold."""

# A module's call is untyped in torch.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightTied(nn.Module):
    """Two linear layers with one Parameter, and a third that is a transposed view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.third = nn.Linear(8, 8)
        self.third.weight = nn.Parameter(self.first.weight.detach().t())
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x).tanh()
        return self.out(self.third(self.second(self.first(x).tanh()).tanh()).tanh())


class ModuleReused(nn.Module):
    """One module object under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.shared
        self.steps = nn.ModuleList([self.shared, nn.Conv2d(6, 6, 1)])
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.shared(self.stem(x)).relu()).relu()
        for step in self.steps:
            x = step(x).relu()
        return self.fc(x.mean((2, 3)))


class SmallCNN(nn.Module):
    """What the dtype and layout traps are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


def non_contiguous() -> SmallCNN:
    """Weights that are transposed, strided and channels-last."""
    net = SmallCNN()
    net.fc1.weight = nn.Parameter(torch.randn(8, 16).t())
    net.fc2.weight = nn.Parameter(torch.randn(4, 32)[:, ::2])
    net.conv2.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def frozen() -> SmallCNN:
    """No parameter wants a gradient but the last layer's."""
    net = SmallCNN()
    net.requires_grad_(False)
    net.fc2.requires_grad_(True)
    return net


class SharedBuffer(nn.Module):
    """One buffer in two modules, and one that is not stored."""

    position: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Shifted(), Shifted()
        self.two.register_buffer("shift", self.one.shift)
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x))) + self.scratch


class Shifted(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.shift).tanh()


class Nested(nn.Module):
    """Dicts in lists in dicts, with dots' worth of names."""

    def __init__(self) -> None:
        super().__init__()
        paths = [nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(6, 8)}) for _ in range(2)]
        self.tree = nn.ModuleDict(
            {"paths": nn.ModuleList(paths), "join": nn.Sequential(nn.Sequential(nn.Linear(8, 6)))}
        )
        self.heads = nn.ModuleDict({"one": nn.Linear(6, 2), "two": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        paths = self.tree["paths"]
        assert isinstance(paths, nn.ModuleList)
        for path in paths:
            assert isinstance(path, nn.ModuleDict)
            x = x + self.tree["join"](path["a"](x).relu() + path["b"](x).sigmoid())
        return x, {name: head(x) for name, head in self.heads.items()}


class FunctionalReader(nn.Module):
    """Computes with one child's weight instead of calling it, and with another's beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.bypassed = nn.Linear(6, 8)
        self.both = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.bypassed.weight, self.bypassed.bias).relu()
        return self.out(self.both(x) + functional.linear(x, self.both.weight.abs()))


class NeverCalled(nn.Module):
    """An auxiliary head that only training uses, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.body = nn.Conv2d(6, 6, 3)
        self.aux = nn.Linear(6, 3)
        self.orphan = nn.Linear(4, 4)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(self.conv(x).relu()).mean((2, 3))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


class StandardizedConv2d(nn.Conv2d):
    """A weight-standardised convolution: an `nn.Conv2d` by class, another function by forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class RenamedLinear(nn.Linear):
    """A subclass that changes nothing that is computed."""


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.standardized = StandardizedConv2d(8, 8, 3)
        self.renamed = RenamedLinear(8, 8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardized(self.stem(x)).relu()
        return self.fc(self.renamed(x.mean((2, 3))))


def old_norms() -> nn.Sequential:
    """weight_norm and spectral_norm as hooks, the way older files hold them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(nn.Linear(6, 8))
    spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
    return nn.Sequential(normed, nn.ReLU(), spectral, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def parametrized() -> nn.Sequential:
    """weight_norm and spectral_norm as parametrizations; torch cannot pickle these."""
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    return nn.Sequential(nn.Conv2d(3, 3, 1), normed, nn.ReLU(), spectral, nn.ReLU(), nn.Conv2d(8, 8, 3))


class OverlappingViews(nn.Module):
    """Two layers whose weights are rows 0 to 8 and 4 to 12 of one storage, and one that shares nothing."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(12, 8)
        self.inp, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.weight, self.second.weight = nn.Parameter(rows[:8]), nn.Parameter(rows[4:])
        self.alone, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.inp, self.first, self.second, self.alone):
            x = layer(x).tanh()
        return self.out(x)


def sparse_buffer() -> SmallCNN:
    """A buffer in torch's sparse layout."""
    net = SmallCNN()
    net.register_buffer("neighbours", torch.eye(3).to_sparse())
    return net


# ---- as people save them: what is in the file, by the trap that it is


def meta_weights() -> SmallCNN:
    """Shapes without values, as a network built for sharded loading has before it is loaded."""
    return SmallCNN().to("meta")


def data_parallel() -> nn.DataParallel[SmallCNN]:
    """The wrapper and not the network in it."""
    return nn.DataParallel(SmallCNN())


def ema_copy() -> dict[str, object]:
    """The network, and a moving average of it under another key."""
    return {"model": SmallCNN(), "ema": SmallCNN()}


def averaged_model() -> nn.Module:
    """torch's own wrapper around a moving average."""
    return torch.optim.swa_utils.AveragedModel(SmallCNN())


def optimizer_beside() -> dict[str, object]:
    """A training script's checkpoint."""
    net = SmallCNN()
    return {"model": net, "optimizer": optimizer_of(net).state_dict(), "epoch": 3}


def optimizer_alone() -> dict[str, object]:
    """The wrong one of two files."""
    return optimizer_of(SmallCNN()).state_dict()


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """With state, as after a step."""
    made = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3, 16, 16)).sum().backward()
    made.step()
    return made


class Net(nn.Sequential):
    """A class of somebody's script: as `main_net` it says that it comes from `__main__`."""


def main_net() -> nn.Module:
    return Net(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(2048, 4)
    )


def compiled() -> nn.Module:
    """What torch.compile gives; only a process of its own may make it, for the compiler changes torch for good."""
    made: nn.Module = torch.compile(SmallCNN(), backend="eager")  # type: ignore[assignment]
    made(torch.ones(1, 3, 16, 16))
    return made


#: what a file may hold, by its trap
SAVED: dict[str, Callable[[], object]] = {
    "tied weights": WeightTied, "a module used twice": ModuleReused, "shared storages": OverlappingViews,
    "a shared buffer": SharedBuffer, "half precision": lambda: SmallCNN().half(),
    "bfloat16": lambda: SmallCNN().bfloat16(), "non-contiguous tensors": non_contiguous, "meta tensors": meta_weights,
    "a sparse tensor": sparse_buffer, "DataParallel": data_parallel, "an EMA copy": ema_copy,
    "an averaged model": averaged_model, "an optimizer beside the model": optimizer_beside,
    "an optimizer alone": optimizer_alone, "a script's own class": main_net, "a compiled module": compiled,
}  # fmt: skip
