"""What benchmarks/composition.py says: intervals over seeds, a chosen learning rate, and a table of each part."""

import math

FORGET_RETAIN = ("forget nll", "forget probability", "retain nll", "retain probability")
HEADS_C = ("forget accuracy", "forget probability", "forget nll", "retain accuracy", "retain nll", "task nll")
MOMENTS = {"checkpoint-10": "10", "checkpoint-30": "30", "": "100"}
"""{place in the folder of a fine-tuning run: its optimizer steps}."""


def interval(values, level=0.95):
    """Return the mean of some values and half the length of its t interval.

        mean +- t(n - 1, (1 + level) / 2) * s / sqrt(n),   s^2 = sum (x - mean)^2 / (n - 1)

    Args:
        values: one for each seed.
        level: how often such an interval holds the mean of all seeds, were values normal.
    Returns:
        (mean, half length); the latter None for a single value.
    """
    from scipy.stats import t

    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean, None
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(t.ppf((1 + level) / 2, count - 1)) * spread / math.sqrt(count)


def shown(values, digits=2):
    """Return the mean with its interval as text, or the mean alone where there is one value."""
    mean, half = interval(values)
    mean = round(mean, digits) + 0.0  # no -0.00
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} \u00b1 {half:.{digits}f}"


def chosen_rate(after, before, bound):
    """Return the learning rate that forgets most among those that keep the retain set.

    That is the highest forget NLL where the retain NLL has risen by `bound` at most; where it has risen by more with
    all of them, the smallest retain NLL.

    Args:
        after: {learning rate as text: {"forget nll", "retain nll"}}.
        before: the same of the target model.
        bound: nats.
    """
    kept = {rate: found for rate, found in after.items() if found["retain nll"] - before["retain nll"] <= bound}
    if kept:
        return max(kept, key=lambda rate: kept[rate]["forget nll"])
    return min(after, key=lambda rate: after[rate]["retain nll"])


def grouped(runs, *names):
    """Return {values of these fields: the runs that have them}, in the order of the runs."""
    found = {}
    for run in runs:
        found.setdefault(tuple(run[name] for name in names), []).append(run)
    return found


def table(heads, rows):
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""])


def _cells(runs, names, place=""):
    return [shown([run["scores"][place][name] for run in runs]) for name in names]


def differences(runs, field, one, other, names, place=""):
    """Return the cells of one variant minus another, seed by seed, with the interval of the mean difference.

    Args:
        runs: dicts with `field`, seed and scores.
        field: what tells the variants apart.
        one, other: its values.
        names: of the scores.
        place: of the scores.
    """
    sides = [{run["seed"]: run["scores"][place] for run in runs if run[field] == value} for value in (one, other)]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    return [shown([sides[0][seed][name] - sides[1][seed][name] for seed in seeds]) for name in names]


def masks_table(runs, before):
    """Return the tables of part a: each mask, what WAGLE's differs by, and each mask at its own rate.

    Args:
        runs: dicts with world, method, mask, ratio, rate, stage ("equal" at one rate; "grid", "seeds"), seed, scores.
        before: {world: scores of its target model}.
    """
    rows, own = [], [run for run in runs if run["stage"] != "equal"]
    runs = [run for run in runs if run["stage"] == "equal"]
    for (world, method), found in grouped(runs, "world", "method").items():
        known = [f"{before[world][name]:.2f}" for name in FORGET_RETAIN]
        rows.append([world, method, "before unlearning", "", "", *known])
        for (mask, ratio), of_mask in grouped(found, "mask", "ratio").items():
            moved = sum(run["scores"][""]["moved"] for run in of_mask) / len(of_mask)
            rows.append([world, method, mask, ratio, f"{moved:.3f}", *_cells(of_mask, FORGET_RETAIN)])
    pairs = []
    for (world, method, ratio), found in grouped(runs, "world", "method", "ratio").items():
        for other in ("random", "magnitude"):
            if {"wagle", other} <= {run["mask"] for run in found}:
                cells = differences(found, "mask", "wagle", other, FORGET_RETAIN)
                pairs.append([world, method, ratio, f"wagle minus {other}", *cells])
    heads, scores = ("world", "method", "mask", "ratio", "share of weights that moved"), _heads(FORGET_RETAIN)
    tables = [table((*heads, *scores), rows), table(("world", "method", "ratio", "difference", *scores), pairs)]
    if own:
        tables.append(own_rate_tables(own, before, "mask", [("wagle", "random"), ("wagle", "magnitude")]))
    return "\n".join(tables)


def optimizers_table(runs, before):
    """Return the tables of part b.

    Args:
        runs: those of `own_rate_tables`.
        before: as of `masks_table`.
    """
    return own_rate_tables(runs, before, "optimizer", [("Sophia", "AdamW")])


def own_rate_tables(runs, before, field, pairs):
    """Return the tables of variants each at its own rate: those over all seeds, and the grid with the choices marked.

    Args:
        runs: dicts with world, method, `field`, rate, stage ("grid" or "seeds"), seed, scores; `is_chosen` of the
            grid's.
        before: as of `masks_table`.
        field: what tells the variants apart.
        pairs: (one, other) variants whose difference is shown.
    """
    grid, rows = [], []
    for (world, method), found in grouped(runs, "world", "method").items():
        known = [f"{before[world][name]:.2f}" for name in FORGET_RETAIN]
        rows.append([world, method, "before unlearning", "", *known])
        for (variant,), of_one in grouped(found, field).items():
            for run in (run for run in of_one if run["stage"] == "grid"):
                chosen = "yes" if run["is_chosen"] else ""
                grid.append([world, method, variant, run["rate"], *_cells([run], FORGET_RETAIN), chosen])
            over = [run for run in of_one if run["stage"] == "seeds"]
            rows.append([world, method, variant, over[0]["rate"], *_cells(over, FORGET_RETAIN)])
        over = [run for run in found if run["stage"] == "seeds"]
        for one, other in pairs:
            cells = differences(over, field, one, other, FORGET_RETAIN)
            rows.append([world, method, f"{one} minus {other}", "", *cells])
    heads = ("world", "method", field, "learning rate", *_heads(FORGET_RETAIN))
    return table(heads, rows) + "\n" + table((*heads, "chosen"), grid)


def invariance_table(runs, before):
    """Return the tables of part c: right after unlearning, and after fine-tuning on each task; then what came back.

    Args:
        runs: dicts with world, method, ilu (weight as text, or "none"), task (None of an unlearning run), seed, scores
            by place of MOMENTS; of an unlearning run by "" alone.
        before: as of `masks_table`.
    """
    rows = []
    for (world, method), found in grouped(runs, "world", "method").items():
        unlearned, tasks = [run for run in found if run["task"] is None], []
        tasks += [task for (task,) in grouped(found, "task") if task is not None]
        for stage, of_stage in [("before unlearning", [{"ilu": "", "scores": {"": before[world]}}]), ("0", unlearned)]:
            for (ilu,), same in grouped(of_stage, "ilu").items():
                task_nlls = " / ".join(_cells(same, [f"{task} nll" for task in tasks]))
                rows.append([world, method, ilu, " / ".join(tasks), stage, *_cells(same, HEADS_C[:-1]), task_nlls])
        for task in tasks:
            of_task = [run for run in found if run["task"] == task]
            for place, steps in MOMENTS.items():
                for (ilu,), same in grouped(of_task, "ilu").items():
                    cells = _cells(same, [*HEADS_C[:-1], f"{task} nll"], place)
                    rows.append([world, method, ilu, task, steps, *cells])
    heads = ("world", "method", "ILU", "task", "steps on it", *_heads(HEADS_C))
    return table(heads, rows) + "\n" + _recovery_table(runs)


def _recovery_table(runs):
    """Return the table of what changed since unlearning, seed by seed, without ILU, with it, and with minus without."""
    rows, names = [], ("forget accuracy", "forget nll")
    weight = next((run["ilu"] for run in runs if run["ilu"] != "none"), None)
    for (world, method, task), found in grouped(runs, "world", "method", "task").items():
        start = {(run["ilu"], run["seed"]): run["scores"][""] for run in runs
                 if (run["world"], run["method"], run["task"]) == (world, method, None)}  # fmt: skip
        for place, steps in MOMENTS.items() if task else ():
            cells = []
            for name in names:
                change = {(run["ilu"], run["seed"]): run["scores"][place][name] - start[run["ilu"], run["seed"]][name]
                          for run in found}  # fmt: skip
                sides = [
                    {seed: value for (ilu, seed), value in change.items() if ilu == one} for one in ("none", weight)
                ]
                both = [sides[1][seed] - sides[0][seed] for seed in sides[0] if seed in sides[1]]
                cells += [shown(list(side.values())) if side else "" for side in sides] + [shown(both) if both else ""]
            rows.append([world, method, task, steps, *cells])
    heads = [f"{name}: {side}" for name in _heads(names) for side in ("without ILU", "with", "difference")]
    return table(("world", "method", "task", "steps on it", *heads), rows)


def _heads(names):
    return [name.replace("nll", "NLL") for name in names]
