"""The tables and the figure of what is learned for what is forgotten, from the runs beside this file."""

import itertools
import math
from pathlib import Path

import matplotlib
from tables import lines, table

from curlora.continual.results import RunResults
from curlora.continual.task_measure import TaskMeasure
from curlora.continual.tradeoff import front, points

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LEVELS = (0.005, 0.01, 0.02, 0.04)  # nats per token
WITHIN = 0.02
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
RIVALS = ("lora", "lora-all-linear")
SUMMARIZED = [  # a method's name, its entry on one task, and its name over the stream
    ("LoRA", "lora-all-linear", "lora-all-linear"),
    ("LoRA with a KL penalty", "lora-all-linear-kl", "lora-all-linear-kl"),
    ("**CURLoRA with a guard and anchors**", "guarded-all-linear", "guarded-anchors"),
]
ASIDE = ("guarded-two-epochs", "guarded-kl")  # in the list of all runs only
NAMES = {"learning_rate": "rate", "max_kl": "limit", "strength": "strength"}  # of what grids vary
UNITS = {"max_kl": " nats"}
MARKERS = "osD^vPX*"


def tables():
    entries = by_entry()
    compared = compared_of(entries)
    return {
        "proof_summary": summary(by_entry("seeds")), "proof": every_run(entries),
        "proof_within": within(compared), "proof_costs": costs(compared), "levels": at_levels(compared),
        "proof_seeds": over_seeds(by_entry("seeds")), "proof_rivals": every_run(by_entry("rivals")),
        "proof_stream": stream(),
    }  # fmt: skip


def figures(docs):
    compared = compared_of(by_entry())
    tradeoff(compared, docs / "proof.svg")
    against_costs(compared, docs / "proof-costs.svg")


def by_entry(study="gsm8k"):
    """The points of each entry of a study's recipe, without the frozen model's."""
    found = {}
    for point in points(RunResults.load(HERE / study / "results.json")):
        if point.method.method != "frozen":
            found.setdefault(point.method.entry, []).append(point)
    return found


def compared_of(entries):
    return {entry: known for entry, known in entries.items() if entry not in ASIDE}


def label(known):
    """What an entry is called, without what its grid varies."""
    method = known[0].method
    return method.label.split(f", {next(iter(method.grid), '')} ")[0]


def summary(entries):
    """Of three methods: what each learned of one task, with most seeds, and what it forgot over the stream."""
    results = RunResults.load(HERE / "stream" / "results.json")
    run = results.by_order()[tuple(task.name for task in results.tasks)]
    measure, over_stream = TaskMeasure.of(run), {point.method.name: point for point in points(run)}
    rows = []
    for name, entry, of_stream in SUMMARIZED:
        point = max(entries[entry], key=lambda known: len(known.method.seeds))
        later = over_stream[of_stream]
        figures = [f"{point.learned.mean:.2f}", f"{point.mean.mean:.3f}", f"{later.mean.mean:.3f}"]
        seeds = f"{len(point.method.seeds)} and {len(later.method.seeds)}"
        forgotten = f"{measure.forgetting(later.method).mean:.3f}"
        rows.append([name, f"{later.method.trainable_parameters:,}", *figures, forgotten, seeds])
    header = ["", "parameters", "one task: learned", "other text moved by", "three tasks: other text moved by"]
    return table([*header, "earlier tasks forgot", "seeds"], rows)


HEADER = ["", "", "parameters", "learned", "KL, guard's text", "KL, not shown: mean", "worst"]


def every_run(entries):
    return table(HEADER, [cells(known, point) for known in entries.values() for point in known])


def over_seeds(entries):
    """Every run, with the number of its seeds."""
    header = [*HEADER[:3], "seeds", *HEADER[3:]]
    rows = [(cells(known, point), point) for known in entries.values() for point in known]
    return table(header, [[*shown[:3], len(point.method.seeds), *shown[3:]] for shown, point in rows])


def stream():
    """The stream: the fall of each task's loss when it was learned and at the end, and what all was forgotten.

    A row for each method and order of the tasks.
    """
    results = RunResults.load(HERE / "stream" / "results.json")
    names = [task.name for task in results.tasks]
    header = ["", "runs", "parameters", *names, "mean, when learned", "mean, at the end", "earlier tasks forgot"]
    rows = []
    assert set(results.by_order()) <= {tuple(names), tuple(reversed(names))}
    for order, run in results.by_order().items():
        measure = TaskMeasure.of(run)
        for point in points(run):
            if point.method.method == "frozen":
                continue
            method = point.method
            each = []
            for name in names:
                places = (order.index(name), len(order) - 1)  # when it was learned, and at the end
                losses = [method.score(i, places[0], "loss") for i in dict.fromkeys(places)]
                falls = [loss.model_copy(update={"mean": measure.floor[name] - loss.mean}) for loss in losses]
                each.append(" → ".join(shown(fall, 3) for fall in falls))
            ways = (measure.when_learned(method), measure.learned(method), measure.forgetting(method))
            kl = (point.limited, point.mean, point.worst)
            rows.append(
                [method.label + ("" if order == tuple(names) else "; in reverse"), len(method.seeds)]
                + [f"{method.trainable_parameters:,}", *each, *(shown(way, 3) for way in ways)]
                + [shown(one, 4) for one in kl]
            )
    return table([*header, *HEADER[4:]], sorted(rows, key=lambda row: row[0].removesuffix("; in reverse")))


def within(entries):
    """Of each entry what has learned most while the texts that were not shown moved by no more than ``WITHIN``."""
    best = {entry: best_within(known) for entry, known in entries.items()}
    return table(HEADER, [cells(entries[entry], point) for entry, point in best.items() if point])


def best_within(known):
    kept = [point for point in known if point.mean.mean <= WITHIN]
    return max(kept, key=lambda point: point.learned.mean, default=None)


def cells(known, point):
    method = point.method
    grid = ", ".join(f"{NAMES[name]} {value:g}{UNITS.get(name, '')}" for name, value in method.grid.items())
    figures = [shown(point.learned, 3), *(shown(kl, 4) for kl in (point.limited, point.mean, point.worst))]
    return [label(known), grid, f"{method.trainable_parameters:,}", *figures]


def shown(statistic, digits):
    spread = "" if statistic.deviation is None else f" ± {statistic.deviation:.{digits}f}"
    return f"{statistic.mean:.{digits}f}{spread}"


def at_levels(entries):
    """What each entry learns within a level of forgetting, and how many times what the better LoRA learns."""
    rows = []
    for entry, known in entries.items():
        values = []
        for level in LEVELS:
            learned = learned_at(known, level)
            of_rival = max(filter(None, (learned_at(entries[rival], level) for rival in RIVALS)), default=None)
            times = f" ({learned / of_rival:.1f} x)" if learned and of_rival and entry not in RIVALS else ""
            values.append("" if learned is None else f"{learned:.3f}{times}")
        rows.append([label(known), *values])
    return table(["mean KL of the texts not shown", *(f"{level:g}" for level in LEVELS)], rows)


def learned_at(known, level):
    """Between two points of the front linear in the logarithm of what is forgotten, beyond the last as much as there.

    Before the first it is not known.
    """
    best = [(point.mean.mean, point.learned.mean) for point in front(known)]
    for (less, low), (more, high) in itertools.pairwise(best):
        if less <= level <= more:
            return low + (high - low) * math.log(level / less) / math.log(more / less)
    return best[-1][1] if best[-1][0] <= level else None


def step_costs():
    """Per entry: trained parameters, MiB kept for backward and per cent of time, both beyond a step without adapter."""
    known = {row["entry"]: row for row in lines(HERE.parent / "speed" / "methods.jsonl")}
    floor = known.pop("floor")
    return {
        entry: (row["parameters"], (row["kept"] - floor["kept"]) / 2**20, 100 * (row["of_floor"] - 1))
        for entry, row in known.items()
    }


def costs(entries):
    """What a step of each method costs, and what it learns within ``WITHIN``."""
    rows = []
    for entry, (parameters, kept, time) in step_costs().items():
        learned = shown(best_within(entries[entry]).learned, 3)
        rows.append([label(entries[entry]), f"{parameters:,}", f"{kept:.1f} MiB", f"+{time:.0f} %", learned])
    return table(["", "parameters", "kept for backward", "time of a step", f"learned within {WITHIN:g}"], rows)


def style(number):
    return {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}


def against_costs(entries, path):
    """What is learned within ``WITHIN`` against the trained parameters, the memory, and the time of a step."""
    matplotlib.rcParams["svg.hashsalt"] = "proof"
    drawing, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for number, (entry, of_entry) in enumerate(step_costs().items()):
        known = entries[entry]
        for axis, cost in zip(axes, of_entry, strict=True):
            axis.plot(cost, best_within(known).learned.mean, label=label(known), linestyle="none", **style(number))
    for axis, name in zip(
        axes, ("trained parameters", "kept for backward, MiB", "more time in a step, %"), strict=True
    ):
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    axes[0].set_ylim(0)
    axes[0].set_ylabel(f"learned within {WITHIN:g} nats")
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def tradeoff(entries, path):
    """Learned against forgotten: the mean of the texts that were not shown, and the worst of them."""
    matplotlib.rcParams["svg.hashsalt"] = "proof"
    drawing, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("mean", "worst"), strict=True):
        for number, known in enumerate(entries.values()):
            for point in known:
                x, y = getattr(point, name), point.learned
                axis.errorbar(x.mean, y.mean, y.deviation, x.deviation, linestyle="none", capsize=2, **style(number))
            best = front(known, lambda point, name=name: getattr(point, name))
            forgotten = [getattr(point, name).mean for point in best]
            axis.plot(forgotten, [point.learned.mean for point in best], label=label(known), **style(number))
        axis.set_xscale("log")
        within = [tick for tick in TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
        axis.set_xticks(within, [f"{tick:g}" for tick in within])
        axis.minorticks_off()
        axis.set_xlabel(f"forgotten: KL, nats per token, {name} of the texts not shown")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0)  # the frozen model
    axes[0].set_ylabel("learned: fall of the loss, nats per token")
    axes[0].legend(frameon=False, fontsize=9)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)
