"""`--arch pkg.mod:factory`: a network built by the user's own code, and tensors put into it."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import random
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padconvert.allow import inside, may_be_trusted
from padconvert.errors import FileError, UnsafeError, UsageError
from padconvert.load.names import join_working_directory

_SEED = 0
_SHOWN = 4
#: what torch.nn.init does to a parameter
_FILLS = frozenset({"uniform_", "normal_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_"})
# state dicts of old versions lack these, and a network works without
_OPTIONAL = ("num_batches_tracked", "_extra_state")


def architecture_of(arch: str, arch_args: Mapping[str, object]) -> dict[str, Any]:
    """The record of a factory and its arguments. Raises UsageError where either is malformed."""
    module, colon, name = arch.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UsageError(f"--arch {arch}: name a factory as package.module:function, for example --arch nets:resnet20.")
    for key in arch_args:
        if not key.isidentifier():
            raise UsageError(f"--arch-arg {key}: not the name of an argument. Write it as name=value.")
    try:
        args = json.loads(json.dumps(dict(arch_args), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--arch-arg: values must be plain numbers, words, lists or maps ({error}).") from error
    return {"kind": "factory", "ref": arch, "args": args}


def build_factory(architecture: Mapping[str, Any]) -> nn.Module:
    """The network that the recorded factory returns, built under a fixed seed.

    Raises UsageError where the factory cannot be found, called, or returns something else than a module.
    """
    ref, args = str(architecture["ref"]), architecture["args"]
    factory = _imported(ref)
    state = random.getstate()
    random.seed(_SEED)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            with _Unfilled():
                module = factory(**args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a script's sys.exit() must not end this run as if all were done
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--arch {ref}: the factory raised {reason}. {_signature(factory)}") from error
    finally:
        random.setstate(state)
    if not isinstance(module, nn.Module):
        raise UsageError(f"--arch {ref}: returned a {type(module).__name__}, not a torch.nn.Module.")
    return module


class _Unfilled(TorchFunctionMode):
    """Leaves parameters as they were allocated: a file's tensors take their places, or `put_tensors_` refuses. So
    the memory of a large network is neither filled nor, on most systems, there at all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        fills = getattr(func, "__module__", "") == nn.init.__name__ or getattr(func, "__name__", "") in _FILLS
        return filled if fills and type(filled) is nn.Parameter else func(*args, **kwargs)


def _imported(ref: str) -> Any:
    """The function or class. It lies in the package it is named by: what a module of it has imported from elsewhere
    (`mynets:os.system`) is not the user's, though `--trust mynets` is."""
    module, _, name = ref.partition(":")
    join_working_directory()
    try:
        found: Any = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        what = (
            "no such module; is it in this folder, or installed?"
            if missing
            else f"importing it raised {error!r}".splitlines()[0]
        )
        raise UsageError(f"--arch {ref}: {what}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"--arch {ref}: '{module}' has no '{name}'.{_meant(found, part)}")
        found = getattr(found, part)
        if (inspect.ismodule(found) or callable(found)) and not _is_of(found, module.partition(".")[0]):
            raise UsageError(
                f"--arch {ref}: '{part}' comes from another package than '{module}'. Write a function that calls it "
                "into that file, and name the function."
            )
    if not callable(found):
        raise UsageError(f"--arch {ref}: a {type(found).__name__}, which cannot be called. Name a function or class.")
    return found


def _is_of(found: Any, package: str) -> bool:
    """Whether a thing that a module holds is defined in this package; a partial is defined where it is held."""
    if isinstance(found, functools.partial):
        return True
    home = getattr(found, "__module__", None)
    return not inspect.ismodule(found) and isinstance(home, str) and home.partition(".")[0] == package


def _meant(owner: Any, name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [n for n in dir(owner) if not n.startswith("_")], 1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _signature(factory: Any) -> str:
    try:
        return f"Its arguments are {inspect.signature(factory)}; give them by --arch-arg name=value."
    except (TypeError, ValueError):
        return "Give its arguments by --arch-arg name=value."


def put_tensors_(
    module: nn.Module, tensors: Mapping[str, Tensor], where: str, missing_ok: Collection[str] = ()
) -> None:
    """Puts the tensors into the module, which takes their dtypes: as they are where that is what a copy would be, so
    that what is mapped stays on its file's pages; else copied. Names in `missing_ok` may be absent; their
    parameters go to the meta device, so that nobody computes with them.

    Raises FileError that lists missing, unexpected and mis-shaped tensors.
    """
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    _check_fit(own, tensors, where, missing_ok)
    _take_dtypes_(module, own, tensors)
    try:
        own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
        kept = {name: tensors[name] for name in _replaceable(module, own, tensors)}
        for name, tensor in kept.items():
            own[name].data = tensor
        module.load_state_dict({name: tensors[name] for name in tensors if name not in kept}, strict=False)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise FileError(
            f"{where}: its tensors cannot be put into the network ({str(error).splitlines()[0]})."
        ) from error
    for name in missing_ok:
        if name in own and name not in tensors:
            _to_meta_(module, name)
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta and name not in missing_ok]
    if left:
        raise FileError(f"{where}: the factory leaves '{left[0]}' on the meta device. Build the network on the CPU.")


def _replaceable(module: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Parameters under one name whose module loads as all do, given in their very form."""
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    found = []
    for name, tensor in own.items():
        owner = module.get_submodule(name.rpartition(".")[0]) if name in given else None
        if owner is None or type(tensor) is not nn.Parameter or len(names[id(tensor)]) > 1 or not _loads_plainly(owner):
            continue
        new = given[name]
        if (new.dtype, new.shape, new.stride(), new.device) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.device,
        ):
            found.append(name)
    return found


def _loads_plainly(owner: nn.Module) -> bool:
    return (
        type(owner)._load_from_state_dict is nn.Module._load_from_state_dict
        and not owner._load_state_dict_pre_hooks
        and not owner._load_state_dict_post_hooks
    )


def without_prefix(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The tensors by the module's names, where a prefix that all of them share (Lightning's `model.`) is what keeps
    them from fitting; and a note on that. Else as they are."""
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    inner, prefix = dict(tensors), ""
    while not _fits(own, inner):
        heads = {name.partition(".")[0] for name in inner if "." in name}
        if len(heads) != 1 or not all("." in name for name in inner):
            return tensors, ()
        prefix += f"{heads.pop()}."
        inner = {name.partition(".")[2]: tensor for name, tensor in inner.items()}
    return (inner, (f"stripped the prefix {prefix!r}",)) if prefix else (tensors, ())


def _fits(own: dict[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    try:
        _check_fit(own, given, "", ())
    except FileError:
        return False
    return True


def _check_fit(own: dict[str, Tensor], given: Mapping[str, Tensor], where: str, missing_ok: Collection[str]) -> None:
    # a tied tensor is there if any of its names is
    there = {id(own[name]) for name in given if name in own}
    missing = [
        name
        for name, tensor in own.items()
        if id(tensor) not in there and name not in missing_ok and not name.endswith(_OPTIONAL)
    ]
    unexpected = [name for name in given if name not in own and not name.endswith(_OPTIONAL)]
    shapes = [
        f"{name} is {list(tensor.shape)}, the factory's {list(own[name].shape)}"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    faults = [f"{len(names)} {what} ({_first(names)})" for what, names in lists if names]
    if faults:
        raise FileError(
            f"{where}: a checkpoint of another architecture: {', '.join(faults)}. "
            "Name the factory it was trained with by --arch, and its arguments by --arch-arg."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _take_dtypes_(module: nn.Module, own: dict[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """A half-precision checkpoint makes a half-precision network; buffers that are not stored go along with it."""
    wanted = {name: tensor.dtype for name, tensor in given.items() if name in own and tensor.is_floating_point()}
    if len(set(wanted.values())) == 1:
        (common,) = set(wanted.values())
        every = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        wanted = dict.fromkeys(every, common)
        own = every
    for name, dtype in wanted.items():
        if own[name].is_floating_point() and own[name].dtype != dtype:
            own[name].data = own[name].data.to(dtype)


def _to_meta_(module: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    tensor = getattr(parent, leaf)
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        setattr(parent, leaf, nn.Parameter(empty, requires_grad=tensor.requires_grad))
    else:
        setattr(parent, leaf, empty)


def check_factory_trusted(architecture: Mapping[str, Any], trust: tuple[str, ...]) -> None:
    """Raises UnsafeError unless the caller trusts the package that the factory lies in."""
    ref = str(architecture.get("ref"))
    module, _, function = ref.partition(":")
    if "__" in function or not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        raise FileError(f"its factory is recorded as {ref[:80]!r}, which is no function's name. The file is damaged.")
    if not may_be_trusted(module):
        raise UnsafeError(
            f"the file asks for {ref} to rebuild its network, which is no function of a package of models: no --trust "
            "allows it. If the file is yours, name the function that builds its network by --arch package.module:make, "
            "or load it into a module of your own with into=."
        )
    if not inside(module, trust):
        top = module.split(".")[0]
        raise UnsafeError(
            f"the file asks for {ref} to rebuild its network, which is code. If you trust it, add --trust {top} "
            f"(trust=('{top}',) in Python), or load the file into a module of your own with into=."
        )
