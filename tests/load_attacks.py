"""Files that are made to run code, to allocate, or to be read in two ways. Each would leave a canary file behind."""

from __future__ import annotations

import builtins
import functools
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from padconvert.errors import FileError, UnsafeError

Refusals = type[UnsafeError] | type[FileError]
TRUSTED = "attack_net"  # a module that a test writes and trusts

TRUSTED_CODE = """
from pathlib import Path
from torch import nn

class Restores(nn.Module):
    def __setstate__(self, state):
        Path("canary").touch()
        super().__setstate__(state)

class Deletes(nn.Module):
    def __del__(self):
        pass

class Plain(nn.Module):
    @property
    def size(self):
        return 3
"""


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.parts = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.parts


def touch() -> Call:
    return Call(os.system, "touch canary")


def layer(**attributes: Any) -> nn.Module:
    made = nn.Linear(2, 2)
    for key, value in attributes.items():
        made.__dict__[key] = value
    return made


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, contents: Mapping[str, bytes], method: int = zipfile.ZIP_STORED, folder: str = "model") -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(f"{folder}/{name}", data)


def edited(path: Path, model: object, edit: Callable[[bytes], bytes]) -> None:
    """Saves a model, then writes the file again with another pickle inside."""
    torch.save(model, path)
    contents = members(path)
    before = contents["data.pkl"]
    contents["data.pkl"] = edit(before)
    assert contents["data.pkl"] != before
    write(path, contents)


def more(opcodes: bytes) -> Callable[[bytes], bytes]:
    """Runs these opcodes on the finished object."""
    return lambda data: data[:-1] + opcodes + b"."


def bare(opcodes: bytes) -> Callable[[Path], None]:
    return lambda path: write(path, {"data.pkl": b"\x80\x02" + opcodes + b".", "version": b"3\n"})


def saved(model: Callable[[], object], **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(model(), path, **options)


def short(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def tensor_file(path: Path, view: bytes, dtype: str = "FloatStorage", entries: int = 4, stored: int = 16) -> None:
    """A state dict {"w": tensor}; `view` is offset, size and stride as opcodes."""
    pid = b"(" + short("storage") + f"ctorch\n{dtype}\n".encode() + short("0") + short("cpu")
    pid += b"J" + entries.to_bytes(4, "little") + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + view + b"\x89ccollections\nOrderedDict\n)RtR"
    write(path, {"data.pkl": b"\x80\x02}" + short("w") + call + b"s.", "data/0": bytes(stored)})


def view(offset: int, size: int, stride: int) -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    return number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"


def module_file(path: Path, cls: str, state: bytes = b"") -> None:
    """A bare module of a class with `state` as further opcodes inside its state dict."""
    module, _, name = cls.rpartition(".")
    tables = b"".join(short(key) + b"}" for key in ("_parameters", "_buffers", "_modules"))
    pickled = f"c{module}\n{name}\n".encode() + b")\x81}(" + tables + short("training") + b"\x88" + state + b"ub"
    write(path, {"data.pkl": b"\x80\x02" + pickled + b"."})


def compressed(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    write(path, members(path), zipfile.ZIP_DEFLATED)


def doubled(path: Path) -> None:
    """Two members of one name: zipfile takes the last, torch's own reader the first."""
    torch.save(touch(), path)
    bad = members(path)["data.pkl"]
    torch.save(nn.Linear(2, 2), path)
    contents = members(path)
    import warnings

    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("model/data.pkl", bad)
        for name, data in contents.items():
            archive.writestr(f"model/{name}", data)


def legacy_then_zip(path: Path) -> None:
    """To zip readers an archive, to torch a legacy file."""
    torch.save(nn.Linear(2, 2), path)
    archive = path.read_bytes()
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + archive)


def zip_then_more(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    path.write_bytes(path.read_bytes() + b"more")


def shifted_zip(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())


def lying_header(path: Path) -> None:
    """The directory names a member data.pkl; its own header calls it something else."""
    torch.save(nn.Linear(2, 2), path)
    data = path.read_bytes()
    at = data.index(b"/data.pkl")
    path.write_bytes(data[:at] + b"/dato.pkl" + data[at + 9 :])


def climbing_member(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    write(path, members(path) | {"../../escape": b"x"})


def legacy_facts(path: Path) -> None:
    """Code in the small pickle of system facts in front of a legacy file's model."""
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    facts = pickle.dumps({"little_endian": True, "x": touch()}, protocol=2)
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    assert data.startswith(head)
    end = data.index(b".", len(head)) + 1
    path.write_bytes(head + facts + data[end:])


def legacy_size(path: Path) -> None:
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[:-24] + (1 << 40).to_bytes(8, "little") + data[-16:])


def text_pid(text: str) -> Callable[[Path], None]:
    """A persistent id as protocol 0 writes it, in place of the storage of a tensor."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(P" + text.encode() + b"\n" + view(0, 4, 1)
    pickled = b"\x80\x02}" + short("w") + call + b"\x89ccollections\nOrderedDict\n)RtRs."
    return lambda path: write(path, {"data.pkl": pickled, "data/0": bytes(16)})


def itself(path: Path) -> None:
    inside = nn.Sequential(nn.Linear(2, 2))
    inside._modules["again"] = inside
    torch.save(inside, path)


def hooked() -> nn.Module:
    made = nn.Linear(2, 2)
    made.register_forward_pre_hook(functional.relu)  # type: ignore[arg-type]
    return made


def nested_key() -> dict[Any, Any]:
    key: Any = ()
    for _ in range(25):
        key = (key, key)
    return {"k": key}


def nested(levels: int) -> Any:
    """A tuple that is small in the file, and larger than any memory when it is spelled out."""
    made: Any = (1,)
    for _ in range(levels):
        made = (made, made)
    return made


def nest(levels: int) -> bytes:
    """A list inside a list, and so on."""
    return b"]" * levels + b"a" * (levels - 1)


def pooled() -> nn.Module:
    made = nn.AdaptiveAvgPool2d(1)
    made.output_size = nested(45)
    return made


def modules_over_and_over() -> nn.Module:
    made: nn.Module = nn.Conv2d(1, 1, 1)
    for _ in range(40):
        made = nn.Sequential(made, made)
    return made


def many_sets() -> bytes:
    """One list of 100,000 values, of which 20,000 sets are made."""
    return b"](" + b"K\x01" * 100_000 + b"eq\x00(" + b"c__builtin__\nset\nh\x00\x85R" * 20_000 + b"t\x86"


def many_bytes() -> bytes:
    """One text of a megabyte, of which 5,000 byte strings are made."""
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x00"
    return text + b"(" + (b"c_codecs\nencode\nh\x00" + short("latin1") + b"\x86R") * 5_000 + b"t\x86"


def recurrent() -> nn.Module:
    """torch restores it by a loop over its layers."""
    made = nn.LSTM(2, 2)
    made._all_weights = [[0]]  # type: ignore[list-item]
    made.num_layers = 10**9
    return made


def expanded() -> nn.Module:
    made = nn.Linear(2, 2)
    for i in range(64):
        made.register_buffer(f"b{i}", torch.zeros(1).expand(1 << 24))
    return made


def sliced() -> nn.Module:
    made, values = nn.Linear(2, 2), torch.zeros(1 << 18)
    for i in range(600):
        made.register_buffer(f"b{i}", values[i:])
    return made


def members_without_end(path: Path) -> None:
    """More than any network has tensors; Python's reader makes an object of each."""
    write(path, {"data.pkl": b"\x80\x02}."} | {f"data/{i}": b"" for i in range(80_000)})


_KEYED = b"}" + short("w") + b"))\x862\x86" + b"K\x01s"

ATTACKS: dict[str, tuple[Callable[[Path], None], Refusals]] = {
    # calls
    "system_as_attribute": (saved(lambda: layer(x=touch())), UnsafeError),
    "system_as_attribute_legacy": (saved(lambda: layer(x=touch()), _use_new_zipfile_serialization=False), UnsafeError),
    "system_protocol_5": (saved(lambda: layer(x=touch()), pickle_protocol=5), UnsafeError),
    "system_beside_weights": (saved(lambda: {"state_dict": {"w": torch.ones(2)}, "x": touch()}), UnsafeError),
    "system_as_root": (saved(touch), UnsafeError),
    "eval": (saved(lambda: layer(x=Call(eval, "__import__('os').system('touch canary')"))), UnsafeError),
    "exec_in_list": (
        saved(lambda: layer(x=[Call(builtins.exec, "__import__('os').system('touch canary')")])),
        UnsafeError,
    ),
    "partial": (saved(lambda: layer(x=functools.partial(os.system, "touch canary"))), UnsafeError),
    "getattr": (saved(lambda: layer(x=Call(getattr, nn.Linear, "forward"))), UnsafeError),
    "class_called": (saved(lambda: layer(x=Call(nn.Linear, 10**5, 10**5))), UnsafeError),
    "class_called_with_one": (saved(lambda: layer(x=Call(nn.Identity, 3))), UnsafeError),
    "new_with_arguments": (bare(b"ctorch.nn.modules.linear\nLinear\nK\x02K\x02\x86\x81"), UnsafeError),
    "instance_opcode": (bare(b"(" + short("touch canary") + b"ios\nsystem\n"), UnsafeError),
    "extension_opcode": (bare(b"\x82\x01"), UnsafeError),
    "text_id_of_a_class": (
        bare(b"P('module', <class 'posix.system'>, 'x.py', 'touch canary')\nX\x0c\x00\x00\x00touch canary\x85R"),
        UnsafeError,
    ),
    "text_id_that_calls": (text_pid("('storage', __import__('os').system('touch canary'), '0', 'cpu', 4)"), FileError),
    "text_id_with_more": (
        text_pid("('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 4) or __import__('os').system('touch canary')"),
        FileError,
    ),
    "text_id_too_large": (text_pid("('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 99999999)"), FileError),
    "text_id_outside": (text_pid("('storage', <class 'torch.FloatStorage'>, '../0', 'cpu', 4)"), FileError),
    "text_id_without_end": (text_pid("('" + "(" * 1_000_000), FileError),
    "rebuild_calls_a_class": (
        saved(lambda: layer(x=Call(torch._tensor._rebuild_from_type_v2, nn.Linear, nn.Linear, (2, 2), {}))),
        UnsafeError,
    ),
    "reexported_module": (saved(lambda: layer(x=nn.ReLU)), FileError),  # replaced below
    "function_of_an_allowed_package": (
        saved(lambda: layer(x=nn.modules.module.register_module_forward_hook)),
        UnsafeError,
    ),
    # state
    "built_twice": (lambda path: edited(path, nn.Linear(2, 2), more(b"}" + short("a") + b"K\x01sb")), UnsafeError),
    "state_with_slots": (
        lambda path: edited(path, nn.Linear(2, 2), lambda data: data[:-2] + b"N\x86b."),
        UnsafeError,
    ),
    "planted_setstate": (saved(lambda: layer(__setstate__=functional.relu)), UnsafeError),
    "planted_class": (saved(lambda: layer(__class__=nn.ReLU)), UnsafeError),
    "hidden_forward": (saved(lambda: layer(forward=functional.relu)), UnsafeError),
    "hidden_method": (saved(lambda: layer(parameters=functional.relu)), UnsafeError),
    "compiled_call": (
        lambda path: module_file(
            path,
            "torch.nn.modules.linear.Identity",
            short("_compiled_call_impl") + b"ctorch.nn.functional\nrelu\n",
        ),
        UnsafeError,
    ),
    "hooks": (saved(hooked), UnsafeError),
    "tensor_attribute": (
        saved(lambda: layer(x=Call(torch._utils._rebuild_parameter_with_state, torch.ones(1), True, {}, {"grad": 1}))),
        UnsafeError,
    ),
    "own_setstate": (lambda path: module_file(path, f"{TRUSTED}.Restores"), UnsafeError),
    "own_del": (lambda path: module_file(path, f"{TRUSTED}.Deletes"), UnsafeError),
    "hidden_property": (lambda path: module_file(path, f"{TRUSTED}.Plain", short("size") + b"K\x01"), UnsafeError),
    "untrusted_class": (lambda path: module_file(path, "some_net.Net"), UnsafeError),
    "denied_class": (
        lambda path: module_file(path, "torch.nn.parallel.distributed.DistributedDataParallel"),
        UnsafeError,
    ),
    "not_a_module_in_modules": (
        lambda path: module_file(path, "torch.nn.modules.linear.Linear", short("dot.ted") + b"K\x01"),
        FileError,
    ),  # replaced below
    "contains_itself": (itself, FileError),
    # sizes
    "bytearray_bomb": (saved(lambda: layer(x=Call(bytearray, 10**11))), UnsafeError),
    "storage_bomb": (saved(lambda: layer(x=Call(torch.FloatTensor, 10**10))), UnsafeError),
    "long_key": (saved(lambda: layer(x={nested_key()["k"]: 1})), UnsafeError),
    "number_of_100000_bits": (saved(lambda: layer(in_features=1 << 100_000)), FileError),
    "shared_over_and_over": (saved(lambda: layer(padding=nested(45))), FileError),
    "shared_as_a_size": (saved(pooled), FileError),
    "nested_without_end": (
        bare(b"ctorch.nn.modules.linear\nIdentity\n)\x81}" + short("x") + nest(20_000) + b"sb"),
        FileError,
    ),
    "modules_over_and_over": (saved(modules_over_and_over), FileError),
    "one_list_made_many_sets": (bare(b"}" + short("a") + many_sets() + b"s"), FileError),
    "one_text_made_many_bytes": (bare(b"}" + short("a") + many_bytes() + b"s"), FileError),
    "opcodes_without_end": (bare(b"}" + short("a") + b"(" + b"N" * 2_000_000 + b"ts"), FileError),
    "layers_of_a_recurrent_net": (saved(recurrent), FileError),
    "numbered_tensor": (bare(b"}" + short("w") + b"(" + short("tensor") + b"K\x03tQs"), FileError),
    "expanded_many_times": (saved(expanded), FileError),
    "sliced_many_times": (saved(sliced), FileError),
    "storage_too_short": (lambda path: tensor_file(path, view(0, 4, 1), stored=12), FileError),
    "storage_of_another_dtype": (lambda path: tensor_file(path, view(0, 4, 1), dtype="DoubleStorage"), FileError),
    "truth_values_of_255": (saved(lambda: torch.ones(1)), FileError),  # replaced below
    "view_too_long": (lambda path: tensor_file(path, view(0, 5, 1)), FileError),
    "view_past_its_end": (lambda path: tensor_file(path, view(1, 4, 1)), FileError),
    "negative_offset": (lambda path: tensor_file(path, view(-1, 2, 1)), FileError),
    "negative_stride": (lambda path: tensor_file(path, view(3, 4, -1)), FileError),
    "negative_size": (lambda path: tensor_file(path, view(0, -1, 1)), FileError),
    "expanded_bomb": (lambda path: tensor_file(path, view(0, 1 << 40, 0)), FileError),
    "legacy_size_lie": (legacy_size, FileError),
    # archives
    "compressed_member": (compressed, UnsafeError),
    "two_members_of_one_name": (doubled, UnsafeError),
    "legacy_and_zip": (legacy_then_zip, UnsafeError),
    "zip_with_a_tail": (zip_then_more, UnsafeError),
    "zip_with_a_head": (shifted_zip, UnsafeError),
    "header_against_directory": (lying_header, UnsafeError),
    "members_without_end": (members_without_end, FileError),
    "member_outside": (climbing_member, UnsafeError),
    "facts_of_a_legacy_file": (legacy_facts, UnsafeError),
}


def _reexported(path: Path) -> None:
    """torch.nn.modules.linear carries `math`, `init` and more that are not its own."""
    bare(b"ctorch.nn.modules.linear\nModule\n)\x81}b")(path)


def _truth_values(path: Path) -> None:
    torch.save({"w": torch.ones(4, dtype=torch.bool)}, path)
    contents = members(path)
    write(path, contents | {"data/0": b"\x01\xff\x00\x01"})


ATTACKS["reexported_module"] = (_reexported, UnsafeError)
ATTACKS["truth_values_of_255"] = (_truth_values, FileError)
ATTACKS["not_a_module_in_modules"] = (bare(b"ctorch.nn.modules.module\n_WrappedHook\n)\x81}b"), UnsafeError)
