"""A module's skeleton: exact, the same from any process, under the reader's rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from padconvert.errors import FileError, UnsafeError
from padconvert.load import module_from, rebuild, skeleton_of
from padconvert.load.skeleton_json import keeps_stride
from padconvert.load.source import own_tensors
from padconvert.walk.probe import call, flat_outputs
from test_load_pickles import TRUST, WRITTEN, assert_same

HERE = Path(__file__).parent


def through_json(skeleton: dict[str, Any]) -> dict[str, Any]:
    """As the manifest stores it: keys sorted, no NaN."""
    document: dict[str, Any] = json.loads(json.dumps(skeleton, sort_keys=True, allow_nan=False))
    return document


def all_tensors(module: nn.Module, extra: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in {**own_tensors(module), **extra}.items()}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_network_comes_back_from_its_skeleton_and_tensors(name: str) -> None:
    source, probe = zoo.build(name)
    before = {key: value.clone() for key, value in source.state_dict().items()}
    skeleton, extra = skeleton_of(source, TRUST)
    assert not set(extra) & set(source.state_dict())
    found = module_from(through_json(skeleton), all_tensors(source, extra), TRUST)
    assert_same(found, source)
    # stable: the skeleton of what came back is the same text
    assert json.dumps(skeleton_of(found, TRUST)[0]) == json.dumps(skeleton)
    args, kwargs = probe.make(2)
    with torch.no_grad():
        expected = flat_outputs(call(source, args, kwargs))
        assert all(torch.equal(a, b) for a, b in zip(flat_outputs(call(found, args, kwargs)), expected, strict=True))
    # names of ties, and the module itself untouched
    assert list(dict(found.named_parameters())) == list(dict(source.named_parameters()))
    assert all(torch.equal(before[key], value) for key, value in source.state_dict().items())


class Extras(nn.Linear):
    """Tensors in every place that a state dict does not show."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.plain = torch.full((2,), 5.0)
        self.listed = [torch.ones(1), {"deep": torch.zeros(2)}]
        self.also = self.plain
        self.words = {"b", "a", "c", "d", "e", "f"}
        self.odd = (float("nan"), float("-inf"), b"\x01", -0.0)


def test_tensors_outside_the_state_dict_have_names_of_their_own() -> None:
    source = Extras()
    skeleton, extra = skeleton_of(source, ("test_load_skeleton",))
    assert {"table", "plain"} <= set(extra)
    assert len(extra) == 4
    found: Any = module_from(through_json(skeleton), all_tensors(source, extra), ("test_load_skeleton",))
    assert found.plain.tolist() == [5.0, 5.0]
    assert found.also is found.plain
    assert found.table.tolist() == [0.0, 1.0, 2.0]
    assert "table" not in found.state_dict()
    assert found.listed[1]["deep"].tolist() == [0.0, 0.0]
    assert found.words == source.words
    assert repr(found.odd) == "(nan, -inf, b'\\x01', -0.0)"


def test_views_share_memory_again_where_their_values_agree() -> None:
    source = nn.Linear(4, 4, bias=False)
    source.register_buffer("turned", source.weight.detach().t()[1:])
    skeleton, extra = skeleton_of(source)
    found: Any = module_from(through_json(skeleton), all_tensors(source, extra))
    assert found.turned.untyped_storage().data_ptr() == found.weight.untyped_storage().data_ptr()
    changed = all_tensors(source, extra)
    changed["turned"] += 1  # trained apart: values win over sharing
    found = module_from(through_json(skeleton), changed)
    assert torch.equal(found.turned, changed["turned"])
    assert torch.equal(found.weight, source.weight)


def test_two_processes_write_the_same_text() -> None:
    names = ("t5_encoder_decoder", "llama", "resnet")
    code = (
        "import json, zoo\nfrom padconvert.load import skeleton_of\n"
        f"print(json.dumps([skeleton_of(zoo.build(name)[0], {TRUST!r})[0] for name in {names!r}]))"
    )
    texts = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=HERE
        )
        texts.add(done.stdout.splitlines()[-1])
    assert len(texts) == 1
    assert [skeleton["version"] for skeleton in json.loads(texts.pop())] == [1, 1, 1]


def test_another_order_of_dimensions_in_memory_is_kept() -> None:
    source = nn.Conv2d(3, 8, 3)
    source.weight.data = source.weight.data.contiguous(memory_format=torch.channels_last)
    skeleton, _ = skeleton_of(source)
    found = module_from(skeleton, {name: tensor.contiguous() for name, tensor in own_tensors(source).items()})
    assert_same(found, source)
    assert not found.get_parameter("weight").is_contiguous()


def test_absent_tensors_stay_on_the_meta_device_only_where_they_may() -> None:
    source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    skeleton, _ = skeleton_of(source)
    tensors = own_tensors(source)
    del tensors["1.weight"]
    found: Any = module_from(skeleton, tensors, missing_ok={"1.weight"})
    assert found[1].weight.is_meta
    assert tuple(found[1].weight.shape) == (2, 3)
    assert torch.equal(found[0].weight, source.state_dict()["0.weight"])
    with pytest.raises(FileError, match=r"needs the tensor '1\.weight'"):
        module_from(skeleton, tensors)


@pytest.mark.parametrize(
    "wrong", [torch.ones(3, 2), torch.ones(2, 3).double(), torch.ones(6)], ids=["shape", "dtype", "rank"]
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(wrong: Tensor) -> None:
    source = nn.Linear(3, 2)
    skeleton, _ = skeleton_of(source)
    with pytest.raises(FileError, match=r"needs 'weight' as float32 \[2, 3\]"):
        module_from(skeleton, {**own_tensors(source), "weight": wrong})


def numbered(skeleton: dict[str, Any], kind: str) -> list[Any]:
    """The first object of a kind."""
    found: list[Any] = next(entry for entry in skeleton["objects"] if entry[0] == kind)
    return found


def test_a_forged_skeleton_meets_the_readers_rules() -> None:
    source = nn.Sequential(nn.Linear(2, 2))
    tensors = own_tensors(source)

    def forged(change: Any) -> dict[str, Any]:
        skeleton = through_json(skeleton_of(source)[0])
        change(skeleton)
        return skeleton

    def name(module: str, name: str) -> Any:
        return lambda s: numbered(s, "name").__setitem__(slice(1, 3), [module, name])

    def key(text: str) -> Any:
        # the state of the outermost module is the first dict
        return lambda s: numbered(s, "dict")[1].append([text, 1])

    unsafe = [name("os", "system"), name("mynet", "Net"), name("torch.nn.modules.module", "torch")]
    unsafe += [key("__class__"), key("forward")]
    for change in unsafe:
        with pytest.raises(UnsafeError):
            module_from(forged(change), tensors)
    damaged = [
        lambda s: s.update(version=2),
        lambda s: s.update(root=[10_000]),
        lambda s: s.update(root=None),
        lambda s: s["objects"].append(["tuple", [[len(s["objects"])]]]) or s.update(root=[len(s["objects"]) - 1]),
        lambda s: numbered(s, "tensor")[1].update(shape=[-1]),
        lambda s: numbered(s, "tensor")[1].update(dtype="object"),
        lambda s: numbered(s, "tensor")[1].update(stride=[1]),
        lambda s: numbered(s, "dict").__setitem__(1, "x"),
        lambda s: s["objects"].__setitem__(0, ["call", "os.system"]),
        lambda s: s.pop("objects"),
    ]
    for change in damaged:
        with pytest.raises(FileError):
            module_from(forged(change), tensors)


def test_what_cannot_be_rebuilt_says_so() -> None:
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(nn.functional.relu)  # type: ignore[arg-type]
    with pytest.raises(UnsafeError, match="hooks"):
        skeleton_of(hooked)
    local = nn.Linear(2, 2)
    local.__dict__["act"] = lambda x: x
    with pytest.raises(FileError, match="cannot be pickled"):
        skeleton_of(local)
    with pytest.raises(UnsafeError, match="--trust zoo_convolutions"):
        skeleton_of(zoo.build("resnet")[0])


def test_trust_is_needed_again_to_rebuild() -> None:
    source, _ = zoo.build("resnet")
    skeleton, extra = skeleton_of(source, TRUST)
    architecture = {"kind": "skeleton", "skeleton": through_json(skeleton)}
    with pytest.raises(UnsafeError, match="--trust zoo_convolutions"):
        rebuild(architecture, all_tensors(source, extra))
    assert_same(rebuild(architecture, all_tensors(source, extra), TRUST), source)


def test_nothing_of_this_machine_is_kept() -> None:
    source, _ = zoo.build("llama")
    vars(vars(source)["config"])["_name_or_path"] = "/home/someone/model"
    text = json.dumps(skeleton_of(source)[0])
    assert "/home/someone" not in text
    assert "_original_object_hash" not in text


@settings(max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_kept_stride_is_one_that_torch_can_lay_out(shape: list[int], random: Any) -> None:
    stride = tuple(random.choice([0, 1, 2, 3, 4, 8, 16]) for _ in shape)
    if not keeps_stride(tuple(shape), stride):
        return
    values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    laid_out = torch.empty_strided(shape, stride).copy_(values)  # raises where two entries share a place
    assert torch.equal(laid_out, values)
    assert laid_out.untyped_storage().nbytes() <= 4 * values.nbytes


@pytest.mark.parametrize("step", [1 << 40, 0, 1])
def test_a_forged_stride_allocates_nothing(step: int) -> None:
    source = nn.Linear(3, 2)
    skeleton = through_json(skeleton_of(source)[0])
    for entry in skeleton["objects"]:
        if entry[0] == "tensor" and entry[1]["name"] == "weight":
            entry[1]["stride"] = [step, 1]
    found = module_from(skeleton, own_tensors(source))
    assert_same(found, source)


def test_empty_tables_are_left_out_and_come_back() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    document, extra = skeleton_of(model)
    assert "_forward_hooks" not in json.dumps(document)
    again = module_from(document, {**model.state_dict(), **extra})
    for before, after in zip(model.modules(), again.modules(), strict=True):
        assert set(vars(before)) == set(vars(after))
        tables = {key: type(value) for key, value in vars(before).items() if key.endswith(("hooks", "_set"))}
        assert tables == {key: type(getattr(after, key)) for key in tables}
    assert skeleton_of(again)[0] == document
