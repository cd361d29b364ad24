"""The tables of docs/research.md and docs/guard.md and the README's curve, from the lines of JSON beside this file.

The pages keep their words; what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is written anew.

    python benchmarks/guard/page.py
"""

import json
import math
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
PAGES = [DOCS / "research.md", DOCS / "guard.md"]
MODEL = "SmolLM2-135M"
TEXTS = ("guard", "articles", "code", "tweets")

# What a run has where its line says nothing else.
STUDY = {"lr": 0.03, "r": 16, "rise": 0.01, "slack": 1.0, "choose": "inverse", "penalty": 0.0, "ewc": 0.0, "probe": 0,
         "times": 1, "targets": "q_proj k_proj v_proj"}  # fmt: skip
FORWARD, REVERSE = "mrpc sst2 s140", "s140 sst2 mrpc"
# Orders and seeds that methods are compared on: over the usual stream, and over one of three times as many examples.
PAIRS = {
    1: [(FORWARD, 0), (FORWARD, 1), (FORWARD, 2), (REVERSE, 0)],
    3: [(FORWARD, 0), (FORWARD, 1), (REVERSE, 0)],
}
EACH = {"method": "guarded", "choose": "each", "r": 9}
PAIRED = {
    "heads only": {"method": "frozen"},
    "LoRA, 2.5e-4": {"method": "lora", "lr": 2.5e-4},
    "LoRA, 5e-4": {"method": "lora", "lr": 5e-4},
    "LoRA, 1e-3": {"method": "lora", "lr": 1e-3},
    "LoRA, 1e-3, penalty 1.0 on the guard's text": {"method": "lora", "lr": 1e-3, "penalty": 1.0},
    "LoRA, 1e-3, EWC of strength 1,000": {"method": "lora", "lr": 1e-3, "ewc": 1000.0},
    "OSF, 1e-4": {"method": "osf", "lr": 1e-4},
    "CURLoRA, 2e-3": {"method": "curlora", "lr": 2e-3},
    "**guarded at 1 %**": {**EACH, "lr": 0.12, "slack": 4.0},
    "**guarded at 4 %**": {**EACH, "lr": 0.12, "slack": 4.0, "rise": 0.04},
}
LONG = {
    "LoRA, 1e-4": {"method": "lora", "lr": 1e-4},
    "LoRA, 2.5e-4": {"method": "lora", "lr": 2.5e-4},
    "LoRA, 5e-4": {"method": "lora", "lr": 5e-4},
    "LoRA, 1e-3": {"method": "lora", "lr": 1e-3},
    "LoRA, 1e-3, penalty 1.0 on the guard's text": {"method": "lora", "lr": 1e-3, "penalty": 1.0},
    "guarded at 1 %, slack 4, a rate of 0.12": {**EACH, "lr": 0.12, "slack": 4.0},
    "guarded at 1 %, slack 2, a rate of 0.04": {**EACH, "lr": 0.04, "slack": 2.0},
    "guarded at 10 %, slack 4, a rate of 0.12": {**EACH, "lr": 0.12, "slack": 4.0, "rise": 0.1},
    "**guarded at 10 %, slack 2, a rate of 0.04**": {**EACH, "lr": 0.04, "slack": 2.0, "rise": 0.1},
}
DRAWS = {
    "the paper's draw": "inverse", "uniform": "uniform", "by norm": "norm", "by leverage score": "leverage",
    "**redrawn for the task**": "task", "the paper's draw, 1.8 times the budget": "inverse, 1.8 x the budget",
}  # fmt: skip
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output", "gate": "gate", "up": "up", "down": "down"}


def tables():
    return {
        "paired": paired(), "long": long(), "draws": draws(), "projections": projections(), "rates": rates(),
        "plain_rates": plain_rates(),
    }  # fmt: skip


def main():
    made = tables()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    curve(DOCS / "study.svg")


def filled(text, tables):
    def fill(match):
        return f"{match[1]}\n{tables[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def lines(name):
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def table(header, rows):
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def means(given, times):
    """Over the orders and seeds of PAIRS: means, and the standard error of the average accuracy."""
    wanted = {**STUDY, **given, "times": times}
    if given["method"] == "frozen":
        wanted.pop("lr")
    runs = [
        run
        for run in ({**STUDY, **line} for line in lines("study"))
        if all(run[name] == value for name, value in wanted.items()) and (run["stream"], run["seed"]) in PAIRS[times]
    ]
    averages = [run["average"] for run in runs]
    return {
        "runs": len(runs),
        "parameters": runs[0]["numbers"],
        "average": statistics.mean(averages),
        "error": statistics.stdev(averages) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan,
        "loss": statistics.mean(run["loss"] for run in runs),
        "forgetting": statistics.mean(run["forgetting"] for run in runs),
        "drift": statistics.mean(run["texts"]["articles"]["drift"] for run in runs),
        **{text: 100 * statistics.mean(run["texts"][text]["rise"] for run in runs) for text in TEXTS},
    }


FIGURES = ["parameters", "average accuracy", "mean loss", "forgetting", "guard's text", "other articles", "code",
           "tweets", "drift, articles"]  # fmt: skip


def figures(found):
    error = "" if math.isnan(found["error"]) else f" ± {found['error']:.3f}"
    return [
        f"{found['parameters']:,}", f"{found['average']:.3f}{error}", f"{found['loss']:.3f}",
        signed(found["forgetting"], 3), *(share(found[text]) for text in TEXTS), drift(found["drift"]),
    ]  # fmt: skip


def signed(value, digits):
    return f"{value:+.{digits}f}" if value else "0"


def share(percent):
    if not percent:
        return "0"
    shown = f"{percent:+,.{0 if abs(percent) >= 50 else 1}f}"
    return ("0.0" if shown in ("+0.0", "-0.0") else shown) + " %"


def drift(nats):
    return "0" if not nats else f"{nats:.2f}" if nats >= 1 else f"{nats:.3f}"


def paired():
    return table(["", *FIGURES], [[name, *figures(means(given, 1))] for name, given in PAIRED.items()])


def long():
    found = {name: means(given, 3) for name, given in LONG.items()}
    return table(["", "runs", *FIGURES], [[name, one["runs"], *figures(one)] for name, one in found.items()])


def draws():
    found = {name: [row for row in lines("choices") if row["choose"] == draw] for name, draw in DRAWS.items()}
    least = min(statistics.mean(row["loss"] for row in rows) for rows in found.values())
    shown = []
    for name, rows in found.items():
        mean = lambda of, rows=rows: statistics.mean(map(of, rows))  # noqa: E731
        loss = mean(lambda row: row["loss"])
        shown.append([
            name, f"{mean(lambda row: row['accuracy']):.3f}", ", ".join(f"{row['loss']:.3f}" for row in rows),
            bold(f"{loss:.3f}", loss == least), f"{mean(lambda row: row['predicted']):.4f}",
            f"{mean(lambda row: row['articles']['drift']):.4f}", f"{mean(lambda row: row['code']['drift']):.4f}",
        ])  # fmt: skip
    header = ["columns and rows", "accuracy", "loss, by seed", "mean loss", "drift predicted", "on articles", "on code"]
    return table(header, shown)


def projections():
    rows = sorted(lines("targets"), key=lambda row: row["loss"])
    shown = [
        [
            bold(", ".join(PROJECTIONS[one.removesuffix("_proj")] for one in row["targets"].split()), row is rows[0]),
            row["r"], f"{row['numbers']:,}", bold(f"{row['loss']:.3f}", row is rows[0]), f"{row['accuracy']:.3f}",
            f"{row['articles']['drift']:.3f}", share(100 * row["guard"]["rise"]),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "r", "parameters", "loss", "accuracy", "drift, articles", "guard's text"], shown)


def rates():
    """Loss, the least of each row in bold, and in brackets the drift as predicted."""
    return by_rate("guarded", "", lambda row, least: bold(f"{row['loss']:.3f}", least) + f" ({row['drift']:.3f})")


def plain_rates():
    """Loss, and in brackets the drift as measured on articles."""
    return by_rate(
        "curlora", "plain, ", lambda row, _: f"{row['loss']:.3f} ({row['drift']:.{4 if row['drift'] < 1e-3 else 3}f})"
    )


def by_rate(method, prefix, cell):
    adapters = {}
    for row in lines("sweep"):
        if row["method"] == method and row.get("model", MODEL) == MODEL:
            adapters.setdefault((row["targets"], row["r"], row["numbers"]), {})[row["lr"]] = row
    columns = sorted({rate for mine in adapters.values() for rate in mine})
    shown = []
    for (targets, r, count), mine in sorted(adapters.items()):
        least = min(row["loss"] for row in mine.values())
        name = f"{prefix}{targets.replace('_proj', '')}, r {r}"
        shown.append([name, f"{count:,}", *(cell(mine[rate], mine[rate]["loss"] == least) for rate in columns)])
    return table(["learning rate", "parameters", *(f"{rate:g}" for rate in columns)], shown)


def bold(text, wanted):
    return f"**{text}**" if wanted else text


def curve(path):
    """Accuracy against the rise of perplexity, and against forgetting; a line for each method."""
    methods = {}
    for name, given in PAIRED.items():
        label = {"frozen": "heads only", "osf": "OSF", "curlora": "CURLoRA"}.get(given["method"]) or (
            "guarded, an adapter a task" if given["method"] == "guarded"
            else "LoRA + penalty" if given.get("penalty") else "LoRA + EWC" if given.get("ewc") else "LoRA"
        )  # fmt: skip
        methods.setdefault(label, []).append(means(PAIRED[name], 1))
    matplotlib.rcParams["svg.hashsalt"] = "study"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, (method, found) in enumerate(sorted(methods.items())):
        found.sort(key=lambda one: one["articles"])
        style = {"marker": "osD^vPX*"[number % 8], "color": f"C{number % 10}", "label": method, "capsize": 2}
        averages, errors = [one["average"] for one in found], [one["error"] for one in found]
        left.errorbar([one["articles"] for one in found], averages, errors, **style)
        right.errorbar([one["forgetting"] for one in found], averages, errors, **{**style, "linestyle": "none"})
    left.set_xscale("symlog", linthresh=1.0)
    left.axvline(1.0, color="0.8", linestyle=":")
    left.set_xlabel("rise of perplexity on other articles, %")
    left.set_ylabel("final average accuracy")
    right.set_xlabel("forgetting")
    right.locator_params("x", nbins=5)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
