"""A plan as text: every number beside its arithmetic, then the sums and the verdict."""

import json
from typing import Any

_ZERO_NOTE = """\
  offload: the optimiser's states in main memory; offload all: the weights, too. That is how
  pretrain, sft and reward run (distributed.zero, offload); ppo has whole weights in rollouts"""


def print_plan(plan: dict[str, Any]) -> None:
    """Print what ``launch.plan.make_plan`` returns, for a person."""
    base = plan["base"]
    print(f"base: {base['id']}, {base['parameters']:,} parameters in {base['blocks']} blocks\n")
    for name, stage in plan["stages"].items():
        print(f"{name}: {_size(stage['peak_bytes'])} in {stage['largest_phase']}")
        print("  throughout")
        _print_items(stage["kept"])
        for title, phase in stage["phases"].items():
            print(f"  {title}: {_size(phase['bytes'])} with all of the above")
            _print_items(phase["items"])
        print()
    _print_time(plan["time"])
    for stage, settings in plan.get("deepspeed", {}).items():
        print(f"DeepSpeed in {stage}: {json.dumps(settings)}\n")
    if "gpus" in plan:
        _print_gpus(plan)
    if "scaling" in plan:
        _print_scaling(plan["scaling"], plan["memory_bytes"])
    where = f"on each of {plan['gpus']} GPUs" if "gpus" in plan else "on one device"
    if plan.get("way"):
        where += f" with {plan['way']}"
    print(f"largest: {plan['largest_stage']}, {_size(plan['peak_bytes'])} {where}")
    if "fits" in plan:
        _print_verdict(plan)


def _print_items(items: list[dict[str, Any]]) -> None:
    for item in items:
        print(f"    {item['name']:32} {_size(item['bytes']):>12}   {item['arithmetic']}")


def _print_time(time: dict[str, Any]) -> None:
    device = time["device"] or "for seconds, name a --card or --calibrate this machine"
    print(f"tokens and time at most, all texts as long as allowed; {device}")
    for name, stage in time["stages"].items():
        rows = stage["per_rows"]
        remark = f"   for {rows:,} rows: `rows` of its sources says how many" if rows else ""
        print(f"  {name:10} {stage['tokens']:>15,} tokens{_duration(stage)}{remark}")
        for part in stage["parts"]:
            print(f"    {part['name']:26}{_duration(part)} {part['arithmetic']}")
    if "seconds" in time:
        print(f"  together{_duration(time)}")
    print()


def _duration(facts: dict[str, Any]) -> str:
    """Return operations, and seconds where they are known."""
    if "seconds" not in facts:
        return f"{facts['flops'] / 1e15:12.4g} PFLOP"
    seconds = facts["seconds"]
    text = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    operations = f"{facts['flops'] / 1e15:12.4g} PFLOP" if "flops" in facts else ""
    return f"{operations}{text:>12}"


def _print_gpus(plan: dict[str, Any]) -> None:
    memory = plan.get("memory_bytes")
    rows = {count: facts["bytes"] for count, facts in plan["by_gpus"].items()}
    print("per GPU, largest stage, micro-batches as they are" + (" (* fits)" if memory else ""))
    _print_table(rows, memory)
    for count, facts in plan["by_gpus"].items():
        if "needs" in facts:
            way = facts["needs"]
            print(f"  {count} x: {f'{way} is enough' if way else 'does not fit'}")
    print(_ZERO_NOTE)
    parameters = plan["base"]["parameters"]
    print(f"\ntraining all {parameters:,} weights in 16 bits, by DeepSpeed's own estimates")
    _print_table(plan["full_training"], memory)
    print("  without activations; main memory: what offloading with ZeRO 2 needs\n")


def _print_scaling(facts: dict[str, Any], memory: int) -> None:
    rates = {key: facts["card"][key] / 1e9 for key in ("link", "network", "host")}
    print(
        f"a step on each GPU, by arithmetic alone, with {facts['zero']}; published rates, one way:"
        f"\n  {rates['link']:g} GB/s within 8 GPUs, {rates['network']:g} GB/s from each to other"
        f" machines, {rates['host']:g} GB/s to main memory"
    )
    titles = ("passes", "sends", "main memory", "holds", "computing", "sending", "moving")
    for stage, rows in facts["stages"].items():
        print(f"  {stage}\n  GPUs" + "".join(f"{title:>13}" for title in titles) + "   limited by")
        for count, row in rows.items():
            if "refused" in row:
                print(f"  {count:4}   refused: {row['refused']}")
                continue
            sizes = [_size(row[key]) for key in ("sent_bytes", "moved_bytes", "step_bytes")]
            seconds = (row[key] for key in ("computing", "sending", "moving"))
            times = [f"{time:,.0f} s" if time >= 100 else f"{time:.3g} s" for time in seconds]
            cells = "".join(f"{cell:>13}" for cell in (row["passes"], *sizes, *times))
            print(f"  {count:4}{cells}   {row['limit']}")
            if row["limit"] != "memory" and row["later_bytes"] > memory:
                needed = _size(row["later_bytes"])
                print(f"         does not fit: the first process holds {needed} after training")
    print("  a step of ppo is a rollout with its updates, and has the passes of them all\n")


def _print_table(rows: dict[int, dict[str, int]], memory: int | None) -> None:
    print("  GPUs" + "".join(f"{column:>21}" for column in next(iter(rows.values()))))
    for count, shares in rows.items():
        cells = [
            _size(share) + (" *" if share <= (memory or 0) and way != "main memory" else "  ")
            for way, share in shares.items()
        ]
        print(f"  {count:4}" + "".join(f"{cell:>21}" for cell in cells).rstrip())


def _print_verdict(plan: dict[str, Any]) -> None:
    verdict = "fits into" if plan["fits"] else "does not fit into"
    print(f"{verdict} {_size(plan['memory_bytes'])}")
    if plan["fits"]:
        return
    if not plan["changes"]:
        _print_least(plan["least"])
        return
    print("the cheapest changes that make it fit:")
    for change in plan["changes"]:
        print(f"  {' '.join(change['overrides'])}   ({_size(change['peak_bytes'])})")
        for reason in change["reasons"]:
            print(f"    {reason}")


def _print_least(least: dict[str, Any]) -> None:
    """Say what stays when everything has been given up that this plan knows how to."""
    print("none of the changes that plan knows makes it fit: take a smaller base")
    print(f"  with all that help: {' '.join(least['overrides']) or 'there is none'}")
    print(f"  {least['stage']} still needs {_size(least['peak_bytes'])} in {least['phase']}, most:")
    _print_items(least["items"])


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size / 10:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
