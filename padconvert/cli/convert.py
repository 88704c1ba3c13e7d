"""`padconvert convert`."""

from __future__ import annotations

from padconvert.cli import arguments as arg


def convert(
    source: arg.Source,
    output: arg.Output = None,
    dynamic_ratio: arg.DynamicRatio = None,
    experts: arg.Experts = None,
    granularity: arg.Granularity = None,
    policy: arg.PolicyFile = None,
    preset: arg.Preset = None,
    settings: arg.Set = None,
    plan: arg.Plan = None,
    arch: arg.Arch = None,
    arch_arg: arg.ArchArg = None,
    input_shape: arg.InputShape = None,
    trust: arg.Trust = None,
    state_key: arg.StateKey = None,
    data: arg.Data = None,
    eval_data: arg.EvalData = None,
    text_column: arg.TextColumn = None,
    label_column: arg.LabelColumn = None,
    task: arg.Task = None,
    steps: arg.Steps = None,
    batch_size: arg.BatchSize = None,
    lr: arg.LearningRate = None,
    compare: arg.Compare = False,
    work_dir: arg.WorkDir = None,
    max_accuracy_drop: arg.MaxAccuracyDrop = None,
    max_size: arg.MaxSize = None,
    max_memory: arg.MaxMemory = None,
    require_layers: arg.RequireLayers = None,
    strict: arg.Strict = False,
    seed: arg.Seed = 0,
    device: arg.Device = "cpu",
    dry_run: arg.DryRun = False,
    plan_out: arg.PlanOut = None,
    max_shard_size: arg.MaxShardSize = None,
    force: arg.Force = False,
    as_json: arg.Json = False,
    report: arg.Report = None,
    quiet: arg.Quiet = False,
) -> None:
    """Convert a trained model: plan, rewrite, train and partition where there is data, save, report.

    Without data nothing is trained: the artefact then computes what the source computes, to be fine-tuned later.
    """
    from padconvert.cli import parse
    from padconvert.cli.run import run_convert
    from padconvert.options import ConvertOptions

    parse.allow_own_code([arch, *(trust or ())], [*(data or ()), *(eval_data or ())])
    options = ConvertOptions(
        output=output, force=force, policy=policy, preset=preset, sets=tuple(settings or ()),
        dynamic_ratio=dynamic_ratio, experts=experts, granularity=granularity, working_file=parse.working_file(),
        arch=arch, arch_args=parse.arch_args(arch_arg), input_shape=parse.input_shape(input_shape),
        trust=tuple(trust or ()), state_key=state_key, data=tuple(data or ()), eval_data=tuple(eval_data or ()),
        text_columns=tuple(text_column or ()), label_column=label_column, task=task, steps=steps,
        batch_size=batch_size, lr=lr, compare=compare, work_dir=work_dir, seed=seed, device=device, dry_run=dry_run,
        plan=plan, plan_out=plan_out, max_accuracy_drop=max_accuracy_drop, require_layers=require_layers, strict=strict,
        max_size=parse.size("--max-size", max_size), max_memory=parse.size("--max-memory", max_memory),
        max_shard_size=parse.size("--max-shard-size", max_shard_size),
    )  # fmt: skip
    run_convert(source, options, as_json=as_json, report=report, quiet=quiet)
