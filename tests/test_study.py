"""The study's bookkeeping: what is run, what is kept, how rates are chosen, and what the page says of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import padconvert
from benchmarks.quality import aims, data, intervals, nets, report, routings, study, tasks, text, trials
from benchmarks.quality.arms import (
    BASE,
    CHANNEL,
    DYNAMIC,
    FOURTH_IDEAS,
    PAD,
    PAD_FOLLOWED,
    RANDOM,
    STATIC,
    THIRD_IDEAS,
    Arm,
    in_policys_words,
)
from benchmarks.quality.experiments import EXPERIMENTS, Experiment
from padconvert.finetune.data.examples import Batch
from padconvert.finetune.evaluate import evaluate
from padconvert.finetune.loop import start
from padconvert.finetune.train import Trainer
from padconvert.layers.routers.linear import Router
from padconvert.policy import load_policy
from padconvert.rewrite import pad_layers

CPU = torch.device("cpu")
COMMITTED = study.RESULTS


def pictures(count: int, seed: int) -> data.Pictures:
    """Two classes that differ in brightness."""
    random = np.random.RandomState(seed)
    y = torch.from_numpy(random.randint(0, 2, count))
    x = torch.from_numpy(random.randint(0, 120, (count, 3, 8, 8))) + 100 * y.view(-1, 1, 1, 1)
    return data.Pictures(x.byte(), y)


def tiny_examples() -> tasks.Three:
    return tasks.pictures(lambda: data.splits(pictures(200, 0), pictures(60, 1)), augment=("flip",))


def tiny_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nets.resnet8(2, width=2)


TINY = tasks.Task(
    "tiny", tiny_examples, tiny_network, pretrain=4, steps=10, batch=16, rates=(0.001, 0.01), ratio=0.3
)  # fmt: skip
LIST = (Experiment("tiny", "", ("tiny",), (STATIC, DYNAMIC, PAD)),)


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(tasks.TASKS, "tiny", TINY)


def result(held_out: float, test: float, **more: object) -> study.Result:
    tested = {"accuracy": test, "loss": 1.5}
    scores = {"held_out": {"accuracy": held_out}, "test": tested, "source_test": {"accuracy": 0.5, "loss": 1.0}}
    return {**scores, "parameters": 10, "step_cpu_seconds": 1.0, **more}


def filled(folder: Path, scores: dict[tuple[Arm, int, float], tuple[float, float]]) -> study.Results:
    results = study.Results(folder)
    for (arm, seed, rate), (held_out, test) in scores.items():
        results.add(study.Run(TINY, arm, seed, rate), result(held_out, test))
    return results


def test_the_rate_is_chosen_on_held_out_data_alone(tmp_path: Path) -> None:
    scores = {(PAD, 0, 0.001): (0.7, 0.1), (PAD, 0, 0.01): (0.6, 0.9)}
    assert study.chosen_rate(filled(tmp_path, scores), TINY, PAD, 0) == 0.001
    assert study.chosen_rate(filled(tmp_path / "other", scores), TINY, STATIC, 0) is None


def test_what_has_a_result_is_not_run_again_and_other_terms_are(tmp_path: Path) -> None:
    pilots = {(arm, 0, rate): (rate, 0.5) for arm in (STATIC, DYNAMIC, PAD) for rate in TINY.rates}
    results = filled(tmp_path, pilots)
    left = [run for run in study.missing(LIST, results, ()) if results.of(run) is None]
    assert [(run.arm.name, run.seed, run.rate) for run in left] == [
        (arm.name, seed, 0.01) for seed in (1, 2) for arm in (STATIC, DYNAMIC, PAD)
    ]
    again = study.Results(tmp_path)
    assert again.lines == results.lines
    longer = dataclasses.replace(TINY, steps=11)
    assert again.of(study.Run(longer, PAD, 0, 0.01)) is None
    assert again.of(study.Run(TINY, PAD.but("PAD", train__warmup=0.1), 0, 0.01)) is None


def test_a_run_is_paired_and_repeats_itself() -> None:
    source = study.source_of(TINY, 0, CPU)
    again = study.source_of(TINY, 0, CPU)  # from the file this time
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    one, two = (study.run_one(study.Run(TINY, PAD, 0, 0.01), CPU) for _ in range(2))
    unlike = {"step_cpu_seconds"}
    assert {k: v for k, v in one.items() if k not in unlike} == {k: v for k, v in two.items() if k not in unlike}
    static = study.run_one(study.Run(TINY, STATIC, 0, 0.01), CPU)
    assert static["source_test"] == evaluate(source, TINY.examples()[2], 500)
    full = study.run_one(study.Run(TINY, DYNAMIC, 0, 0.01), CPU)
    assert static["parameters"] < one["parameters"] < full["parameters"]
    entries = 36 + 36 + 72 + 144 + 288 + 576
    # parameters: 3 copies more of each entry, and routers; multiply-adds: all 4 are mixed, and routers
    assert full["macs_more"] - (full["parameters"] - static["parameters"]) == entries
    # 5 of the 6 convolutions are not the stem; K = 4, and of κ = 0.3 a bit an entry on top
    assert one["converted_bytes"] < 0.6 * full["converted_bytes"]


@pytest.mark.parametrize("grouping", sorted({*routings.GROUPINGS} - {"random directions"}))
def test_an_idea_of_routing_groups_samples_alike_in_every_layer(grouping: str) -> None:
    """Brightness tells the two classes apart, and every layer sees it."""
    settings = {**BASE, "train.batch_size": 64, "train.top_probability": 0.9, "defaults.num_experts": 2}
    source = study.source_of(TINY, 0, CPU)
    trainer = study.trainer_of(TINY, settings, source, 0, CPU)
    model = tiny_network(0).eval()
    padconvert.rewrite_(model, padconvert.plan(model, trainer.policy, inputs=torch.zeros(2, 3, 8, 8)))
    routings.set_aligned_(model, trainer, grouping)
    batch = trainer.data.train.batch(torch.arange(128))
    assert batch.labels is not None
    assert isinstance(batch.inputs, torch.Tensor)
    chosen: list[torch.Tensor] = []
    for layer in pad_layers(model).values():
        layer.register_forward_pre_hook(lambda layer, args: chosen.append(layer.route(args[0]).argmax(1)))
    model(batch.inputs)
    groups = chosen[-1]
    assert set(groups.tolist()) == {0, 1}
    for each in chosen:
        assert float((each == groups).float().mean()) > 0.9
    agreement = float((groups == batch.labels).float().mean())
    assert max(agreement, 1 - agreement) > 0.95


def converted(arm: Arm = PAD) -> tuple[nn.Module, Trainer]:
    """The tiny network, fully dynamic, with the arm's trials of layers, and what would train it."""
    settings = {**arm.overrides(BASE, 0.3), "train.batch_size": 16, "train.lr": 0.01, "train.steps": 4}
    trainer = study.trainer_of(TINY, settings, tiny_network(0), 0, CPU)
    model = tiny_network(0).eval()
    padconvert.rewrite_(model, padconvert.plan(model, trainer.policy, inputs=torch.zeros(2, 3, 8, 8)))
    return model, trainer


def test_routers_that_read_deviations() -> None:
    model, _ = converted()
    trials.read_deviations_(model)
    for layer in pad_layers(model).values():
        x = torch.randn(3, layer.router_channels // 2, 5, 5)
        expected = torch.cat([x.mean((2, 3)), x.std((2, 3), unbiased=False)], 1)
        torch.testing.assert_close(layer.pooled(x), expected)
        assert layer.route(x).shape == (3, 4)


def test_routers_that_read_the_layer_before() -> None:
    model, trainer = converted()
    trials.read_the_layer_before_(model)
    trainer.set_routers_(model, pad_layers(model))
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in pad_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].mean((2, 3))}))
    model(torch.rand(3, 3, 8, 8))
    own = list(inputs.values())
    for place, layer in enumerate(pad_layers(model).values()):
        before = own[place - 1 : place]
        x = torch.rand(3, layer.weight_shape[1], 5, 5)
        torch.testing.assert_close(layer.pooled(x), torch.cat([x.mean((2, 3)), *before], 1))
        layer.pooled(own[place][:, :, None, None])


def test_standards_follow_the_inputs_of_training_alone() -> None:
    model, trainer = converted()
    trainer.set_routers_(model, pad_layers(model))
    trials.let_standards_follow(model)
    layer = next(iter(pad_layers(model).values()))
    router, points = layer.router, 3 + 2 * torch.randn(50, layer.router_channels)
    assert isinstance(router, Router)
    assert router.mean is not None
    assert router.deviation is not None
    before = router.mean.clone(), router.deviation.clone()
    router.eval()(points)
    assert torch.equal(router.mean, before[0])
    router.train()(points)
    for now, was, batch in zip(
        (router.mean, router.deviation), before, (points.mean(0), points.std(0, False)), strict=True
    ):
        torch.testing.assert_close(now, was + trials.FOLLOW * (batch - was))


def test_noise_leaves_the_mean_of_the_experts() -> None:
    model, _ = converted()
    layer = next(iter(pad_layers(model).values()))
    assert layer.weight_dynamic is not None
    before = layer.weight_dynamic.detach().clone()
    trials.add_noise_(model, 0.1, 0)
    after = layer.weight_dynamic.detach()
    torch.testing.assert_close(after.mean(0), before.mean(0))
    assert float((after - before).std() / before.std()) == pytest.approx(0.1 * 0.75**0.5, rel=0.2)


def test_a_new_static_value_that_is_not_routed() -> None:
    """Of experts 1, 2, 3 and 4 the plain mean, whatever the routing says of them."""
    model, trainer = converted()
    plan = padconvert.plan(nets.resnet8(2, width=2), trainer.policy, inputs=torch.zeros(2, 3, 8, 8))
    layer = next(iter(pad_layers(model).values()))
    assert layer.weight_dynamic is not None
    with torch.no_grad():
        for number, expert in enumerate(layer.weight_dynamic):
            expert.fill_(number + 1)
    trials.NEW_VALUES["mean of the experts"](model, plan).round_(1, [lambda: model(torch.rand(8, 3, 8, 8)).sum()])
    assert layer.weight_static is not None
    assert torch.equal(layer.weight_static, torch.full_like(layer.weight_static, 2.5))


def test_an_average_is_of_the_last_steps() -> None:
    model, trainer = converted()
    run, keeper = start(model, None, trainer.setting), trials.Averaged()
    for run.step in range(1, 5):  # begins after 0.7 of 4 steps
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(run.step))
        keeper.step_done(run)
    keeper.finish_(model)
    expected = 3 * trials.DECAY + 4 * (1 - trials.DECAY)
    assert all(float((p - expected).detach().abs().max()) < 1e-6 for p in model.parameters())


LISTED = (*THIRD_IDEAS, *FOURTH_IDEAS, PAD_FOLLOWED)
OWN_IDEAS = [arm for arm in LISTED if any(key.startswith("study.") for key in arm.settings)]


@pytest.mark.parametrize("arm", OWN_IDEAS, ids=lambda arm: arm.name)
def test_an_idea_of_the_studys_own_runs(arm: Arm) -> None:
    plain = Arm("plain", arm.kind, in_policys_words(arm.settings))
    ours, theirs = (study.run_one(study.Run(TINY, each, 0, 0.01), CPU) for each in (arm, plain))
    assert ours["test"]["loss"] != theirs["test"]["loss"]
    reads = arm.trial("reads") is not None
    assert (ours["parameters"] > theirs["parameters"]) == reads
    assert (ours.get("converted_bytes", 0) > theirs.get("converted_bytes", 0)) == reads


def test_every_listed_arm_is_a_policy() -> None:
    for experiment in EXPERIMENTS:
        for name in experiment.tasks:
            for arm in experiment.arms:
                load_policy(overrides=in_policys_words(arm.overrides(BASE, tasks.TASKS[name].ratio)))
    assert RANDOM.overrides(BASE, 0.3)["partition.score"] == "random"
    assert CHANNEL.overrides(BASE, 0.3)["defaults.granularity"] == "channel"
    assert DYNAMIC.overrides(BASE, 0.3)["defaults.dynamic_ratio"] == 1


def test_random_directions_group_by_direction() -> None:
    points = torch.randn(200, 6, dtype=torch.float64)
    groups = [
        routings.GROUPINGS["random directions"]([each], torch.zeros(200), 4, torch.Generator().manual_seed(0))
        for each in (points, 3 * points)
    ]
    assert torch.equal(*groups)
    assert set(groups[0].tolist()) == {0, 1, 2, 3}


def test_splits_share_no_picture() -> None:
    found = data.splits(pictures(200, 0), pictures(60, 1))
    assert (len(found.train), len(found.held_out), len(found.test)) == (180, 20, 60)
    both = torch.cat([found.train.inputs, found.held_out.inputs]).flatten(1)  # type: ignore[list-item]
    assert len(both.unique(dim=0)) == 200


def test_differences_are_taken_pair_by_pair(tmp_path: Path) -> None:
    scores = {(arm, 0, rate): (rate, 0.5) for arm in (STATIC, DYNAMIC, PAD) for rate in TINY.rates}
    for seed, (static, pad) in enumerate([(0.50, 0.52), (0.60, 0.63), (0.70, 0.71)]):
        scores |= {(STATIC, seed, 0.01): (0.9, static), (PAD, seed, 0.01): (0.9, pad)}
    results = filled(tmp_path, scores)
    of = {arm: intervals.runs_of(results, TINY, arm, (0, 1, 2)) for arm in (STATIC, PAD)}
    found = intervals.difference(of[PAD], of[STATIC])
    assert found is not None
    assert found.half is not None
    # mean 2 points, standard deviation 1, t(0.975, 2) = 4.3027
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert not found.excludes_zero
    assert intervals.difference({}, of[STATIC]) is None
    of[PAD][1]["source_test"] = {"accuracy": 0.5, "loss": 1.001}  # from another source: no pair
    found = intervals.difference(of[PAD], of[STATIC])
    assert found is not None
    assert found.mean == pytest.approx(1.5)


def test_arms_from_two_sources_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = study.Run(TINY, PAD, 0, 0.01)
    results = study.Results(tmp_path)
    assert study.other_source(run, results, CPU) == ""
    results.add(study.Run(TINY, STATIC, 0, 0.01), {"source_test": study._source_test(TINY, 0, CPU)})
    results.add(study.Run(TINY, STATIC, 1, 0.01), result(0.5, 0.5))  # another seed
    assert study.other_source(run, results, CPU) == ""
    results.add(study.Run(TINY, DYNAMIC, 0, 0.01), result(0.5, 0.5))
    assert "tiny, seed 0: left out. This machine has trained another" in study.other_source(run, results, CPU)
    # said once, and the rest is run
    todo = [run, study.Run(TINY, CHANNEL, 0, 0.01), study.Run(TINY, PAD, 2, 0.01)]
    assert study.run_all(iter(todo), results, CPU, 600) == 0
    captured = capsys.readouterr()
    assert captured.err.count("left out") == 1
    assert captured.out.startswith("tiny · PAD · seed 2")
    assert (results.of(run), results.of(todo[2]) is None) == (None, False)


def test_a_study_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)

    def interrupted(*_: object) -> study.Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "EXPERIMENTS", LIST)
    monkeypatch.setattr(study, "run_one", interrupted)
    assert study.main([]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert study.main(["--minutes", "0"]) == 0
    assert "out of time" in capsys.readouterr().err
    monkeypatch.setattr(study, "EXPERIMENTS", ())
    assert study.main([]) == 0
    assert "nothing left to run" in capsys.readouterr().err
    (tmp_path / "cut.jsonl").write_text('{"task": "a"}\n{"tas', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"cut\.jsonl, line 2 is cut off"):
        study.main([])


def test_a_source_that_is_kept_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "KEPT", tmp_path)
    trained = study.source_of(TINY, 0, CPU)
    file = next(study.SOURCES.glob("*.pt"))
    kept = {name: tensor + 1 for name, tensor in trained.state_dict().items()}
    save_file(kept, tmp_path / f"{file.name.removesuffix('-cpu.pt')}.safetensors")
    for name, tensor in study.source_of(TINY, 0, CPU).state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_an_aim_is_reached_by_its_points_and_an_interval_without_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, "other", dataclasses.replace(TINY, name="other"))
    monkeypatch.setattr(
        aims,
        "AIMS",
        (
            aims.Aim("small gain", ("tiny", "other"), PAD, STATIC, 1.0),
            aims.Aim("large gain", ("tiny",), PAD, STATIC, 3.0),
            aims.Aim("no loss", ("tiny",), PAD, DYNAMIC, 0.0),
            aims.Aim("in the mean", ("tiny", "other"), PAD, STATIC, 1.0, mean=True),
        ),
    )
    scores = {(arm, 0, rate): (rate, 0.5) for arm in (STATIC, DYNAMIC, PAD) for rate in TINY.rates}
    for seed, (static, dynamic, pad) in enumerate([(0.50, 0.50, 0.52), (0.60, 0.66, 0.62), (0.70, 0.71, 0.721)]):
        scores |= {(STATIC, seed, 0.01): (0.9, static), (DYNAMIC, seed, 0.01): (0.9, dynamic)}
        scores |= {(PAD, seed, 0.01): (0.9, pad)}
    assert list(aims.table(filled(tmp_path, scores)))[2:] == [
        "| small gain | tiny | ≥ +1 | +2.03 ± 0.14 | reached |",
        "| small gain | other | ≥ +1 |  | not run |",
        "| large gain | tiny | ≥ +3 | +2.03 ± 0.14 | **missed** |",
        "| no loss | tiny | ≥ +0 | -0.30 ± 8.04 | **missed** |",
        "| in the mean | mean of 1 of 2 tasks | ≥ +1 | +2.03 ± 0.14 | reached so far |",
    ]
    begun = filled(tmp_path / "begun", scores)
    for arm, rate in itertools.product((STATIC, PAD), TINY.rates):  # one seed of the other task: not in the mean yet
        begun.add(study.Run(tasks.TASKS["other"], arm, 0, rate), result(rate, 0.9 if arm is PAD else 0.1))
    found = list(aims.table(begun))
    assert found[3] == "| small gain | other | ≥ +1 | +80.00 (seeds: 1) | **missed** so far |"
    assert found[-1] == "| in the mean | mean of 1 of 2 tasks | ≥ +1 | +2.03 ± 0.14 | reached so far |"
    few = {key: value for key, value in scores.items() if key[1] == 0}
    assert list(aims.table(filled(tmp_path / "few", few)))[2].endswith("| +2.00 (seeds: 1) | **missed** so far |")


def test_the_page_shows_every_arm_that_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EXPERIMENTS", LIST)
    scores = {(arm, 0, rate): (rate, 0.5) for arm in (STATIC, PAD) for rate in TINY.rates}
    scores[PAD, 0, 0.01] = (0.9, 0.5625)
    page = report.document(filled(tmp_path, scores), f"Findings.\n\n{report.AIMS_GO_HERE}\n")
    assert "| one domain, PAD over static |" in page
    lines = [line for line in page.splitlines() if line.startswith(("| static", "| PAD", "| fully"))]
    assert [line.split(" | ")[:7] for line in lines] == [
        ["| static", "1", "0.01", "50.00", "1.5000", "", ""],
        ["| PAD", "1", "0.01", "56.25", "1.5000", "", "+6.25"],
    ]


def test_the_committed_page_is_what_the_study_writes() -> None:
    """`python -m benchmarks.quality.report` after a change of results, arms or findings."""
    findings = Path(report.__file__).with_name("findings.md").read_text(encoding="utf-8")
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.document(study.Results(COMMITTED), findings)


def test_the_readme_has_the_gains_that_were_measured() -> None:
    table = "\n".join(report.kinds_table(study.Results(COMMITTED), report.GAINS_IN_README))
    assert table in (report.DOCUMENT.parents[1] / "README.md").read_text(encoding="utf-8")


def test_results_that_are_committed_can_be_read() -> None:
    for path in COMMITTED.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            assert kept["task"] in tasks.TASKS
            assert -1 <= kept["test"][tasks.TASKS[kept["task"]].metric] <= 1


class Sentences:
    """Texts of one token number, each as long as its own number."""

    num_classes = 2

    def __init__(self, lengths: list[int], token: int) -> None:
        self.lengths, self.token = lengths, token

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: torch.Tensor) -> Batch:
        lengths = [self.lengths[int(i)] for i in indices]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in enumerate(lengths):
            ids[row, :length] = self.token
        return Batch({"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.tensor([n % 2 for n in lengths]))


def test_several_sets_of_texts_are_one_with_classes_of_their_own() -> None:
    joined = text.Joined((Sentences([1, 2], 7), Sentences([3], 8)))
    assert (len(joined), joined.num_classes, joined.labels.tolist()) == (3, 4, [1, 0, 3])
    found = joined.batch(torch.tensor([2, 0]))
    assert isinstance(found.inputs, dict)
    assert found.inputs["input_ids"].tolist() == [[8, 8, 8], [7, 0, 0]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found.labels is not None
    assert found.labels.tolist() == [3, 1]
