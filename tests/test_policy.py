"""The policy: presets, precedence, and every error at once with where it was said."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from padconvert.errors import PolicyError, UsageError
from padconvert.policy import (
    Option,
    Policy,
    Resolved,
    load_policy,
    name_matcher,
    preset_names,
    preset_text,
    render,
    router_names,
    schema,
    score_names,
    set_overrides,
    starter,
)
from padconvert.policy.document import MAX_BYTES
from padconvert.policy.model import TASKS


def write(folder: Path, text: str, name: str = "p.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[str]:
    """What is wrong with a policy file, one line each, without the folder's name."""
    with pytest.raises(PolicyError) as caught:
        load_policy(write(folder, text))
    lines = str(caught.value).replace(f"{folder}/", "").splitlines()
    return [line.strip() for line in lines if not line.endswith("problems in the policy:")]


# ---- presets and precedence ------------------------------------------------------------------------------------


def test_presets_say_what_the_design_says() -> None:
    paper = load_policy(preset="paper").policy
    assert (paper.defaults.dynamic_ratio, paper.defaults.num_experts) == (Decimal("0.3"), 4)
    assert (paper.defaults.granularity, paper.partition.scope, paper.partition.score) == ("element", "global", "taylor")
    assert (paper.partition.rounds, paper.train.steps, paper.train.batch_size) == (5, 500, 64)
    assert (paper.train.warmup, paper.train.partitioning, paper.train.lr) == (0.2, 0.5, None)
    assert (paper.ffn.dynamic_ratio, paper.ffn.num_experts, paper.ffn.top_k) == (Decimal("0.5"), 8, 2)
    assert (paper.ffn.granularity, paper.ffn.level, paper.ffn.routing) == ("element", "ffn", "token")
    assert (paper.defaults.top_k, paper.train.balance_weight, paper.train.z_weight) == (0, 0.01, 0.001)
    assert (paper.data.text_columns, paper.data.max_length, paper.data.task) == ((), 128, None)
    assert load_policy(preset="fast").policy.defaults.granularity == "channel"
    assert load_policy(preset="fast").policy.ffn.granularity == "neuron"
    small = load_policy(preset="small").policy
    assert small.defaults.dynamic_ratio < paper.defaults.dynamic_ratio
    assert small.ffn.dynamic_ratio < paper.ffn.dynamic_ratio
    assert load_policy().policy == paper


def test_a_default_stands_in_one_file_only() -> None:
    paper = yaml.safe_load(preset_text("paper"))
    for name in set(preset_names()) - {"paper"}:
        changed = yaml.safe_load(preset_text(name))
        assert changed["extends"] == "paper"
        for section in changed.keys() - {"version", "extends"}:
            for key, value in changed[section].items():
                assert paper[section][key] != value, f"{name} repeats {section}.{key}"
    required = [name for name, field in Policy.model_fields.items() if not field.is_required()]
    assert required == []


def test_precedence_and_origins(tmp_path: Path) -> None:
    working = write(tmp_path, "version: 1\nextends: fast\ntrain:\n  steps: 10\n  lr: 0.5\n  momentum: 0.1\n", "w.yaml")
    own = write(tmp_path, "version: 1\ntrain: {steps: 20, lr: 0.25}\n")
    resolved = load_policy(own, None, {"train.steps": Option(30, "--steps")}, working)
    assert (resolved.policy.train.steps, resolved.policy.train.lr, resolved.policy.train.momentum) == (30, 0.25, 0.1)
    assert resolved.policy.defaults.granularity == "channel"
    assert resolved.origins["train.steps"] == "option --steps"
    assert resolved.origins["train.lr"] == f"{own}:2"
    assert resolved.origins["train.momentum"] == f"{working}:6"
    assert resolved.origins["defaults.granularity"] == "preset fast"
    assert resolved.origins["train.batch_size"] == "preset paper"
    assert resolved.notes == (f"{working} in the working directory was used",)


def test_a_rules_own_ratio_stays_and_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nrules: [{name: a, dynamic_ratio: 0.5}, {role: stem, convert: true}]\n")
    resolved = load_policy(path, overrides={"defaults.dynamic_ratio": Option(0.2, "--dynamic-ratio")})
    assert resolved.policy.rules[0].dynamic_ratio == Decimal("0.5")
    assert resolved.policy.defaults.dynamic_ratio == Decimal("0.2")
    assert resolved.notes == ("rules[0] keeps its own dynamic_ratio 0.5",)


def test_a_file_may_extend_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "version: 1\nextends: small\ntrain: {steps: 7}\ndata: {train: x.npz}\n", "b.yaml")
    policy = load_policy(write(tmp_path, "version: 1\nextends: base/b.yaml\ndata: {eval: [y.npz]}\n")).policy
    assert (policy.train.steps, policy.extends, policy.defaults.dynamic_ratio) == (7, "small", Decimal("0.1"))
    assert policy.data.train == (str(tmp_path / "base" / "x.npz"),)
    assert policy.data.eval == (str(tmp_path / "y.npz"),)


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "version: 1\nextends: p.yaml\n", "q.yaml")
    (line,) = problems(tmp_path, "version: 1\nextends: q.yaml\n")
    assert line.startswith("q.yaml:2: extends: 'p.yaml' extends this file in turn")


def test_a_ratio_is_the_decimal_that_was_written(tmp_path: Path) -> None:
    for text in ("0.1", "'0.1'", "0.10", "1.0e-1"):
        policy = load_policy(write(tmp_path, f"version: 1\ndefaults: {{dynamic_ratio: {text}}}\n")).policy
        assert str(policy.defaults.dynamic_ratio) == "0.1"


def said_of_ffn(folder: Path, text: str, *settings: str, preset: str | None = None, working: str = "") -> Resolved:
    own = write(folder, f"version: 1\n{text}\n")
    file = write(folder, f"version: 1\n{working}\n", "padconvert.yaml") if working else None
    return load_policy(own, preset, set_overrides(settings), file)


def test_what_a_user_says_of_defaults_reaches_feed_forward_blocks(tmp_path: Path) -> None:
    resolved = said_of_ffn(tmp_path, "defaults:\n  num_experts: 6\n  granularity: channel", preset="fast")
    assert (resolved.policy.ffn.num_experts, resolved.policy.ffn.granularity) == (6, "channel")
    assert resolved.policy.ffn.dynamic_ratio == Decimal("0.5")
    assert resolved.origins["ffn.num_experts"] == resolved.origins["defaults.num_experts"] == f"{tmp_path}/p.yaml:3"
    assert resolved.origins["ffn.dynamic_ratio"] == "preset paper"
    option = load_policy(overrides={"defaults.dynamic_ratio": Option(0.2, "--dynamic-ratio")})
    assert option.policy.ffn.dynamic_ratio == option.policy.defaults.dynamic_ratio == Decimal("0.2")
    assert option.origins["ffn.dynamic_ratio"] == "option --dynamic-ratio"
    assert load_policy(preset="small").origins["ffn.num_experts"] == "preset paper"
    off = said_of_ffn(tmp_path, "defaults: {convert: false, top_k: 1}")
    assert (off.policy.ffn.convert, off.policy.ffn.top_k, off.policy.ffn.level) == (False, 1, "ffn")


def test_what_the_same_or_a_later_layer_says_of_ffn_itself_stays(tmp_path: Path) -> None:
    both = "defaults: {dynamic_ratio: 0.2, num_experts: 6}\nffn: {dynamic_ratio: 0.7}"
    same = said_of_ffn(tmp_path, both)
    assert (same.policy.ffn.dynamic_ratio, same.policy.ffn.num_experts) == (Decimal("0.7"), 6)
    assert same.origins["ffn.dynamic_ratio"] == f"{tmp_path}/p.yaml:3"
    earlier = said_of_ffn(tmp_path, "defaults: {dynamic_ratio: 0.2}", working="ffn: {dynamic_ratio: 0.7}")
    assert earlier.policy.ffn.dynamic_ratio == Decimal("0.2")
    later = said_of_ffn(tmp_path, "ffn: {dynamic_ratio: 0.7}", working="defaults: {dynamic_ratio: 0.2}")
    assert later.policy.ffn.dynamic_ratio == Decimal("0.7")
    for settings in (["ffn.num_experts=3", "defaults.num_experts=4"], ["defaults.num_experts=4", "ffn.num_experts=3"]):
        options = said_of_ffn(tmp_path, both, *settings)
        assert (options.policy.defaults.num_experts, options.policy.ffn.num_experts) == (4, 3)
        assert options.origins["ffn.num_experts"] == "option --set ffn.num_experts=3"
    assert said_of_ffn(tmp_path, both, "defaults.num_experts=4").policy.ffn.num_experts == 4


def test_a_fault_of_defaults_is_named_once_and_one_of_ffn_too(tmp_path: Path) -> None:
    assert problems(tmp_path, "version: 1\ndefaults: {num_experts: 1, top_k: 3}\n") == [
        "p.yaml:2: defaults.num_experts: must be greater than or equal to 2, not 1."
    ]
    assert problems(tmp_path, "version: 1\ndefaults: {num_experts: 2, top_k: 3}\n") == [
        "p.yaml:2: defaults: 'top_k' 3 is more than there are experts: 'num_experts' is 2"
    ]
    twice = "version: 1\ndefaults:\n  num_experts: 1\nffn:\n  num_experts: 0\n"
    assert [line.split(":")[1:3] for line in problems(tmp_path, twice)] == [
        ["3", " defaults.num_experts"],
        ["5", " ffn.num_experts"],
    ]


def test_text_is_named_in_a_policy(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, "version: 1\ndata: {text_columns: [a, b], task: glue/mrpc}\n")).policy
    assert (policy.data.text_columns, policy.data.task) == (("a", "b"), "glue/mrpc")
    assert {"glue/stsb", "classification", "regression"} < set(TASKS)
    assert [task for task in TASKS if load_policy(overrides={"data.task": task}).policy.data.task != task] == []


def test_set_reaches_into_rules_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nrules: [{name: a, convert: true}]\n")
    settings = ["rules[0].dynamic_ratio=0.5", "data.mean=[0.5]", "data.std=[2]", "data.label_column=kind"]
    resolved = load_policy(path, overrides=set_overrides(settings))
    assert resolved.policy.rules[0].dynamic_ratio == Decimal("0.5")
    assert (resolved.policy.data.mean, resolved.policy.data.label_column) == ((0.5,), "kind")
    assert resolved.origins["rules[0].dynamic_ratio"] == "option --set rules[0].dynamic_ratio=0.5"
    assert resolved.origins["rules[0].name"] == f"{path}:2"


def test_rendered_policy_reads_back_as_itself(tmp_path: Path) -> None:
    rules = "[{name: 're:a|b', dynamic_ratio: 0.123456789012345678901}, {role: stem, convert: true}]"
    text = f"version: 1\nextends: fast\nrules: {rules}\n"
    resolved = load_policy(write(tmp_path, text), overrides=set_overrides(["train.lr=0.00001", "data.label_key='no'"]))
    shown = render(resolved)
    assert load_policy(write(tmp_path, shown, "shown.yaml")).policy == resolved.policy
    assert "lr: 1.0e-05  # option --set train.lr=0.00001" in shown
    assert "granularity: channel  # preset fast" in shown
    assert "granularity: neuron  # preset fast" in shown
    assert "level: ffn  # preset paper" in shown


def test_starter_changes_nothing_and_its_lines_can_be_uncommented(tmp_path: Path) -> None:
    assert load_policy(write(tmp_path, starter("fast"))).policy == load_policy(preset="fast").policy
    head, _, settings = starter("fast").partition("\n# defaults:")
    lines = ("# defaults:" + settings).splitlines()
    uncommented = head.rpartition("\n")[0] + "\n" + "\n".join(line.removeprefix("# ") for line in lines)
    paper = load_policy(preset="paper").policy
    assert load_policy(write(tmp_path, uncommented)).policy == paper.model_copy(update={"extends": "fast"})


def test_schema_lists_what_there_is() -> None:
    document = schema()
    choice, data = document["$defs"]["Choice"]["properties"], document["$defs"]["Data"]["properties"]
    assert document["required"] == ["version"]
    assert choice["router"]["enum"] == list(router_names())
    ffn = document["$defs"]["Ffn"]["properties"]
    assert (choice["top_k"]["minimum"], ffn["level"]["enum"], set(ffn) - set(choice)) == (
        0,
        ["ffn", "linear"],
        {"level"},
    )
    assert data["task"]["anyOf"][0]["enum"] == list(TASKS)
    assert document["$defs"]["Partition"]["properties"]["score"]["enum"] == list(score_names())
    assert choice["dynamic_ratio"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    assert [kind["type"] for kind in data["train"]["anyOf"]] == ["array", "string"]
    assert not any("required" in part for part in document["$defs"].values())


def test_scores_and_routers_are_the_files_of_their_folders() -> None:
    assert {"taylor", "fisher", "variance", "snip", "magnitude", "random"} <= set(score_names())
    assert {"linear", "mlp"} <= set(router_names())


def test_the_reference_names_every_key_and_its_example_is_a_policy(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "policy.md").read_text(encoding="utf-8")
    for section, model in ((key, field.annotation) for key, field in Policy.model_fields.items()):
        for key in getattr(model, "model_fields", {}):
            assert f"`{key}`" in text, f"{section}.{key}"
    example = text.partition("```yaml\n")[2].partition("```")[0]
    policy = load_policy(write(tmp_path, example)).policy
    assert (policy.rules[1].name, policy.data.scale, policy.data.layout) == ("layer4.*", 255, "nhwc")


# ---- what is wrong, and where ----------------------------------------------------------------------------------


def test_all_errors_at_once_each_with_line_path_and_hint(tmp_path: Path) -> None:
    text = """\
version: 1
defaults:
  dynamic_ratio: 1.5
  num_experts: 1
  granularity: chanel
rules:
  - {name: "re:layer(4", convert: false}
  - {role: stm, convert: true}
  - {name: a}
partition: {scope: globl, score: tailor}
train:
  stepz: 4
dynamic_ratio: 0.2
"""
    assert set(problems(tmp_path, text)) == {
        "p.yaml:3: defaults.dynamic_ratio: must be less than or equal to 1, not 1.5.",
        "p.yaml:4: defaults.num_experts: must be greater than or equal to 2, not 1.",
        "p.yaml:5: defaults.granularity: must be 'element', 'channel' or 'neuron', not 'chanel'."
        " Did you mean 'channel'?",
        "p.yaml:7: rules[0].name: 're:layer(4' is no regular expression:"
        " missing ), unterminated subpattern at position 5",
        "p.yaml:8: rules[1].role: 'stm' is none of stem, head, depthwise, attention, ffn, conv, linear."
        " Did you mean 'stem'?",
        "p.yaml:9: rules[2]: the rule changes nothing; add 'convert' or another setting of 'defaults'",
        "p.yaml:10: partition.scope: must be 'global' or 'layer', not 'globl'. Did you mean 'global'?",
        f"p.yaml:10: partition.score: 'tailor' is none of {', '.join(score_names())}. Did you mean 'taylor'?",
        "p.yaml:12: train.stepz: unknown key. Did you mean 'steps'?",
        "p.yaml:13: dynamic_ratio: unknown key. Did you mean 'defaults.dynamic_ratio'?",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {lr: 1e-3}", "train.lr: must be a valid number, not '1e-3'. YAML reads 1e-3 as text; write 1.0e-3."),
        ("defaults: {scales: no}", "not False. YAML reads no as false; write none."),
        ("rules: [{name: off, convert: true}]", "YAML reads off as false; quote it: 'off'."),
        ("rules: [{name: 12, convert: true}]", "rules[0].name: must be text; quote it: '12'"),
        ("train: {steps: 1:30}", "YAML 1.1 reads '1:30' in its own way"),
        ("train: {steps: 010}", "YAML 1.1 reads '010' in its own way"),
        ("train: {steps: 1_000}", "YAML 1.1 reads '1_000' in its own way"),
        ("train: {steps: 1e9}", "train.steps: must be a valid integer, not '1e9'. Write 1000000000."),
        ("train: {steps: 1.0e+3}", "train.steps: must be a valid integer, not 1000.0. Write 1000."),
        ("train: {steps: 1000000001}", "train.steps: must be less than or equal to 1000000000"),
        ("defaults: {num_experts: 65537}", "num_experts: must be less than or equal to 65536"),
        ("train: {lr: no}", "train.lr: must be a valid number, not False. YAML reads no as false."),
        ("defaults: {dynamic_ratio: no}", "must be a number from 0 to 1, not False. YAML reads no as false."),
        ("defaults: {dynamic_ratio:}", "defaults.dynamic_ratio: must be a number from 0 to 1, not nothing."),
        ("bad: 1", "bad: unknown key. There are version, extends, defaults, ffn, rules, partition, train, data."),
        ("data: {task: glue/sst}", "data.task: 'glue/sst' is none of glue/sst2, glue/cola, "),
        ("data: {task: glue/sst}", "classification, regression. Did you mean 'glue/sst2'?"),
        ("data: {text_columns: text}", "data.text_columns: must be a list, such as [text]"),
        ("data: {max_length: 0}", "data.max_length: must be greater than or equal to 1, not 0."),
        ("ffn: {level: block}", "ffn.level: must be 'ffn' or 'linear', not 'block'."),
        ("ffn: {levle: ffn}", "ffn.levle: unknown key. Did you mean 'level'?"),
        ("defaults: {level: ffn}", "defaults.level: unknown key. Did you mean 'ffn.level'?"),
        ("defaults: {top_k: -1}", "defaults.top_k: must be greater than or equal to 0, not -1."),
        ("ffn: {top_k: 9}", "ffn: 'top_k' 9 is more than there are experts: 'num_experts' is 8"),
        ("rules: [{name: a, top_k: 3, num_experts: 2}]", "rules[0]: 'top_k' 3 is more than there are experts"),
        ("train: {balance_weight: -1}", "train.balance_weight: must be greater than or equal to 0, not -1."),
        (f"extends: {'x' * 5000}", "is neither a preset (fast, paper, small) nor a file beside this one"),
        ("train: {steps: 2.5}", "train.steps: must be a valid integer, not 2.5."),
        ("train: {steps: '12'}", "It is quoted text; write the number without quotes."),
        ("defaults: {num_experts: 2.0}", "defaults.num_experts: must be a valid integer, not 2.0."),
        ("defaults: {num_experts: true}", "defaults.num_experts: must be a valid integer"),
        ("defaults: {dynamic_ratio: .nan}", "defaults.dynamic_ratio: must be a finite number, not NaN."),
        ("defaults: {dynamic_ratio: -0.1}", "defaults.dynamic_ratio: must be greater than or equal to 0, not -0.1."),
        ("defaults: {dynamic_ratio: 1e-999999999}", "defaults.dynamic_ratio: Decimal"),
        ("defaults: {dynamic_ratio: 1e+999999999}", "defaults.dynamic_ratio:"),
        ("defaults: {dynamic_ratio: '1e999999999'}", "defaults.dynamic_ratio: must be less than or equal to 1"),
        ("defaults: {dynamic_ratio: one third}", "defaults.dynamic_ratio: must be a"),
        ("defaults: {dynamic_ratio: true}", "defaults.dynamic_ratio:"),
        ("train:", "train: has no keys; delete it or fill it"),
        ("train: 3", "train: must be a mapping of keys, not 3"),
        ("data: {mean: 3}", "data.mean: must be a list, such as [3]"),
        ("data: {mean: [1, 2], std: [1]}", "data: 'mean' has 2 values and 'std' 1"),
        ("train: {warmup: 0.7, partitioning: 0.4}", "add up to 1.1, more than 1"),
        ("rules: [{convert: true}]", "rules[0]: a rule needs 'name', 'type' or 'role'"),
        (f"rules: [{{name: {'a' * 201}, convert: true}}]", "the pattern has 201 characters; 200 are allowed"),
        ("extends: fats", "extends: 'fats' is neither a preset (fast, paper, small)"),
        ("a: 1\na: 2", "p.yaml:3: a: the key is there twice (first in line 2)"),
        ("x: &a {steps: 1}\ntrain: {<<: *a}", "merge keys ('<<') are not read"),
        ("train: {steps: !!python/object:os.system x}", "has no place in a policy"),
        ("train: {steps: 2001-01-01}", "the YAML type 'timestamp' has no place in a policy"),
        ("train: [", "this is not YAML"),
        ("train: {steps: 1", "this is not YAML"),
        ("---\nversion: 1", "this is not YAML: but found another document"),
    ],
)
def test_one_wrong_line(tmp_path: Path, text: str, expected: str) -> None:
    lines = problems(tmp_path, f"version: 1\n{text}\n")
    assert [line for line in lines if expected in line and line.startswith("p.yaml:")], lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the policy is empty"),
        ("- 1", "p.yaml:1: a policy is a mapping of keys"),
        ("train: {steps: 3}", "p.yaml:1: version: the key is missing; write 'version: 1'"),
        ("version: 2", "p.yaml:1: version: must be 1"),
        ("version: true", "p.yaml:1: version: must be 1"),
        ("version: 1\nx: &a [*a]", "aliases or nesting grow past"),
        ("version: 1\nx: " + "[" * 3000, "nested too deeply"),
        ("version: 1\n#" + "x" * MAX_BYTES, "the file is larger than 256 KiB"),
    ],
)
def test_no_policy_at_all(tmp_path: Path, text: str, expected: str) -> None:
    assert any(expected in line for line in problems(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        f"train: {{steps: {'9' * 5000}}}",
        f"train: {{steps: {'9' * 4000}}}",
        f"train: {{steps: 0{'7' * 5000}}}",
        f"train: {{steps: [{'9' * 4000}]}}",
        f"train: {'x' * 5000}",
        f"defaults: {{dynamic_ratio: '{'9' * 5000}'}}",
        f"defaults: {{num_experts: {'x' * 5000}}}",
        f"partition: {{score: {'x' * 5000}, scope: {'x' * 5000}}}",
        f"rules: [{{name: {'9' * 4000}, convert: true}}]",
        f"data: {{task: {'x' * 5000}, mean: {'9' * 4000}}}",
        f"extends: {'x' * 5000}",
    ],
)
def test_a_long_value_is_not_repeated_whole(tmp_path: Path, text: str) -> None:
    lines = problems(tmp_path, f"version: 1\n{text}\n")
    assert lines
    assert all("…" in line and len(line) < 300 and "what its tag says" not in line for line in lines)


def test_a_long_option_is_not_repeated_whole() -> None:
    with pytest.raises(UsageError) as caught:
        load_policy(overrides=set_overrides([f"train.steps={'9' * 5000}"]))
    assert len(str(caught.value)) < 300


def test_problems_come_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = "version: 1\nbad: 1\ntrain: {steps: 0, lr: x}\ndefaults: {num_experts: 1}\nbad: 2\n"
    assert [line.split(": ")[0] for line in problems(tmp_path, text)] == [f"p.yaml:{line}" for line in (2, 3, 3, 4, 5)]


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        "(a|ab)*",
        "(a?){30}",
        "(?>(a+)+)b",
        "(?=(a*)*)b",
        "((a)(?(2)b|c))*",
        "((){200}){60000}",
        ".*.*.*.*.*",
        "a{0,2}" * 5,
        "a?" * 30 + "a" * 30,
        "(a|ab)" * 30,
    ],
)
def test_an_expression_that_may_never_end_is_refused(tmp_path: Path, expression: str) -> None:
    (line,) = problems(tmp_path, f"version: 1\nrules: [{{name: 're:{expression}', convert: true}}]\n")
    assert line.startswith(f"p.yaml:2: rules[0].name: 're:{expression}' may take forever to match")
    assert "two rules" in line


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("layer[0-9]+[.](conv1|conv2)([.]x+)?", "layer12.conv2.xx"),
        (r"(\w+\.)?(q|k|v|out)_proj", "h.out_proj"),
        (r".*\.(query|value)\..*", "h.0.value.dense"),
        ("((ab){2}c){2}", "ababcababc"),
    ],
)
def test_expressions_of_use_are_read(expression: str, name: str) -> None:
    assert name_matcher(f"re:{expression}")(name)
    assert not name_matcher(f"re:{expression}")(f"{name}\n")


def test_extends_was_said_where_it_stands(tmp_path: Path) -> None:
    working = write(tmp_path, "# mine\nversion: 1\nextends: fast\n", "padconvert.yaml")
    assert load_policy(working_file=working).origins["extends"] == f"{working}:3"
    assert load_policy(None, "small", working_file=working).origins["extends"] == "option --preset small"
    own = write(tmp_path, "version: 1\nextends: small\n")
    assert load_policy(own, working_file=working).origins["extends"] == f"{own}:2"
    assert load_policy(write(tmp_path, "version: 1\n")).origins["extends"] == "default"


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (line,) = problems(tmp_path, "version: 1\n" + "\n".join(levels))
    assert "aliases or nesting grow past 20000 values" in line


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"version: 1\n\xff\xfe")
    with pytest.raises(PolicyError, match="not UTF-8"):
        load_policy(path)
    with pytest.raises(PolicyError, match=r"nowhere\.yaml: the policy file cannot be read"):
        load_policy(tmp_path / "nowhere.yaml")


def test_errors_of_options_alone_are_usage_errors(tmp_path: Path) -> None:
    overrides = {
        "defaults.dynamic_ratio": Option(1.5, "--dynamic-ratio"),
        "defaults.num_experts": Option(1, "--experts"),
        **set_overrides(["trian.steps=1", "train.stepz=1", "rules[0].name=a", "data.mean=[1", "extends=fast"]),
    }
    with pytest.raises(UsageError) as caught:
        load_policy(overrides=overrides)
    text = str(caught.value)
    assert "option --dynamic-ratio: defaults.dynamic_ratio: must be less than or equal to 1, not 1.5." in text
    assert "option --experts: defaults.num_experts: must be greater than or equal to 2, not 1." in text
    assert "trian.steps: there is no 'trian' to set. Did you mean 'train'?" in text
    assert "train.stepz: unknown key. Did you mean 'steps'?" in text
    assert "rules[0].name: there is no [0]: the list has 0 entries" in text
    assert "data.mean: this is not YAML" in text.replace("option --set data.mean=[1:1: ", "")
    assert "extends: cannot be set here" in text
    with pytest.raises(PolicyError, match=r"p\.yaml:2: train\.steps(.|\n)*--dynamic-ratio"):
        load_policy(write(tmp_path, "version: 1\ntrain: {steps: 0}\n"), overrides=overrides)


def test_preset_options() -> None:
    with pytest.raises(UsageError, match="Did you mean 'fast'"):
        load_policy(preset="fats")
    with pytest.raises(UsageError, match="write it as KEY=VALUE"):
        set_overrides(["train.steps"])


def test_a_file_that_extends_a_preset_and_another_preset_contradict(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nextends: fast\n")
    with pytest.raises(UsageError, match="already extends 'fast'"):
        load_policy(path, "small")
    assert load_policy(write(tmp_path, "version: 1\n"), "small").policy.defaults.dynamic_ratio == Decimal("0.1")


def test_a_fault_in_a_lower_file_is_seen_though_overridden(tmp_path: Path) -> None:
    working = write(tmp_path, "version: 1\ntrain: {steps: x}\n", "w.yaml")
    with pytest.raises(PolicyError, match=r"w\.yaml:2: train\.steps"):
        load_policy(write(tmp_path, "version: 1\ntrain: {steps: 3}\n"), working_file=working)


@pytest.mark.parametrize("value", ["pkg.mod:function", "[a.npz, 'm:f']", "./pkg.mod:f", "'os:system.x'"])
def test_the_working_file_names_no_code(tmp_path: Path, value: str) -> None:
    text = f"version: 1\narch: pkg.mod:Net\ntrust: [pkg]\ndata:\n  train: {value}\n"
    with pytest.raises(PolicyError) as caught:
        load_policy(working_file=write(tmp_path, text, "padconvert.yaml"))
    lines = str(caught.value).splitlines()
    assert any(":2: arch: padconvert.yaml may not name it" in line for line in lines)
    assert any(":3: trust: padconvert.yaml may not name it" in line for line in lines)
    assert any(":5: data.train" in line and "may not run code" in line for line in lines)
    assert len(lines) == 4


def test_nor_does_a_file_that_it_extends(tmp_path: Path) -> None:
    write(tmp_path, "version: 1\ndata: {eval: pkg.mod:f}\n", "b.yaml")
    with pytest.raises(PolicyError, match="may not run code"):
        load_policy(working_file=write(tmp_path, "version: 1\nextends: b.yaml\n", "padconvert.yaml"))


def test_a_policy_file_that_was_named_may_name_a_function(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, "version: 1\ndata: {train: [pkg.mod:f, a.npz]}\n")).policy
    assert policy.data.train == ("pkg.mod:f", str(tmp_path / "a.npz"))
