"""docs/proof.md's tables and figure, from the results of the recipes beside this file.

python benchmarks/proof/page.py
"""

import itertools
import math
import re
from pathlib import Path

import matplotlib

from curlora.continual.results import RunResults
from curlora.continual.tradeoff import front, points

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
PAGES = [DOCS / "proof.md"]
LEVELS = (0.005, 0.01, 0.02, 0.05)  # nats per token
RIVAL = "lora"


def main():
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    figure(DOCS / "proof.svg")


def tables():
    return {"proof": every_run(), "levels": at_levels()}


def filled(text, tables):
    def fill(match):
        return f"{match[1]}\n{tables[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def results():
    return RunResults.load(HERE / "gsm8k" / "results.json")


def by_entry():
    """The points of each entry of the recipe, and the entry's label."""
    found, labels = {}, {}
    for point in points(results()):
        if point.method.method == "frozen":
            continue
        found.setdefault(point.method.entry, []).append(point)
        labels.setdefault(point.method.entry, point.method.label.split(" (")[0])
    return found, labels


def table(header, rows):
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def every_run():
    found, labels = by_entry()
    header = ["", "", "parameters", "runs", "learned", "KL, guard's text", "KL, not shown: mean", "worst"]
    rows = []
    for entry, known in found.items():
        for point in known:
            grid = ", ".join(f"{name} {value:g}" for name, value in point.method.grid.items())
            figures = [shown(point.learned, 3), *(shown(kl, 4) for kl in (point.limited, point.mean, point.worst))]
            method = point.method
            rows.append([labels[entry], grid, f"{method.trainable_parameters:,}", len(method.seeds), *figures])
    return table(header, rows)


def shown(statistic, digits):
    spread = "" if statistic.deviation is None else f" ± {statistic.deviation:.{digits}f}"
    return f"{statistic.mean:.{digits}f}{spread}"


def at_levels():
    """What each method learns at a level of forgetting, and how many times what LoRA learns there."""
    found, labels = by_entry()
    rows = []
    for entry, known in found.items():
        cells = []
        for level in LEVELS:
            learned, of_rival = learned_at(known, level), learned_at(found[RIVAL], level)
            times = f" ({learned / of_rival:.1f})" if learned and of_rival and entry != RIVAL else ""
            cells.append("" if learned is None else f"{learned:.3f}{times}")
        rows.append([labels[entry], *cells])
    return table(["mean KL of the texts not shown", *(f"{level:g}" for level in LEVELS)], rows)


def learned_at(known, level):
    """Between two points of the front, linear in the logarithm of what is forgotten; beyond its ends not known."""
    best = [(point.mean.mean, point.learned.mean) for point in front(known)]
    for (less, low), (more, high) in itertools.pairwise(best):
        if less <= level <= more:
            return low + (high - low) * math.log(level / less) / math.log(more / less)
    return None


def figure(path):
    """Learned against forgotten: the mean of the texts that were not shown, and the worst of them."""
    found, labels = by_entry()
    matplotlib.rcParams["svg.hashsalt"] = "proof"
    drawing, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("mean", "worst"), strict=True):
        for number, (entry, known) in enumerate(found.items()):

            def forgotten(point, name=name):
                return getattr(point, name)

            style = {"marker": "osD^vPX*"[number % 8], "color": f"C{number % 10}"}
            for point in known:
                x, y = forgotten(point), point.learned
                errors = {"xerr": [[x.deviation]] * bool(x.deviation), "yerr": [[y.deviation]] * bool(y.deviation)}
                errors = {name: value[0] for name, value in errors.items() if value}
                axis.errorbar([x.mean], [y.mean], **errors, linestyle="none", capsize=2, **style)
            best = front(known, forgotten)
            axis.plot(
                [forgotten(one).mean for one in best], [one.learned.mean for one in best], label=labels[entry], **style
            )
        axis.set_xscale("log")
        axis.set_xlabel(f"forgotten: KL, nats per token, {name} of the texts not shown")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("learned: fall of the loss, nats per token")
    axes[0].legend(frameon=False, fontsize=9)
    drawing.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
