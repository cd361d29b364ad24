"""The table and the curve of what ``study.py`` found: means over seeds and orders, and the standard error of accuracy.

python benchmarks/guard/study_table.py
python benchmarks/guard/study_table.py --paired --curve docs/study.svg
python benchmarks/guard/study_table.py --paired --times 3
"""

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from study import DEFAULTS, RESULTS

import results

SAME = [name for name in DEFAULTS if name not in ("seed", "stream")]
NAMES = {"lora": "LoRA", "osf": "OSF", "curlora": "CURLoRA", "guarded": "guarded", "frozen": "heads only"}
# Orders and seeds that methods are compared on: over the usual stream, and over one of three times as many examples.
PAIRS = {
    1: [("mrpc sst2 s140", 0), ("mrpc sst2 s140", 1), ("mrpc sst2 s140", 2), ("s140 sst2 mrpc", 0)],
    3: [("mrpc sst2 s140", 0), ("mrpc sst2 s140", 1), ("s140 sst2 mrpc", 0)],
}
TEXTS = ("guard", "articles", "code", "tweets")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--curve", type=Path, help="an SVG file to write")
    parser.add_argument("--times", type=int, default=1, choices=list(PAIRS), help="as study.py has it")
    parser.add_argument("--paired", action="store_true", help="only what was run with the same seeds and orders: PAIRS")
    arguments = parser.parse_args()
    pairs, groups = PAIRS[arguments.times], defaultdict(list)
    for line in results.rows(arguments.results):
        run = DEFAULTS | line
        if run["times"] == arguments.times and (not arguments.paired or (run["stream"], run["seed"]) in pairs):
            groups[tuple(run[name] for name in SAME)].append(run)
    if arguments.paired:
        groups = {key: runs for key, runs in groups.items() if len(runs) == len(pairs)}
    rows = [row(dict(zip(SAME, key, strict=True)), runs) for key, runs in groups.items()]
    rows.sort(key=lambda row: (row["method"], row["articles"]))
    print_table(rows)
    if arguments.curve:
        # Like with like: leads that were followed once are in the table alone.
        curve([row for row in rows if row["seen"]], arguments.curve)


def row(given, runs):
    averages = [run["average"] for run in runs]
    error = statistics.stdev(averages) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
    return {
        "method": name_of(given),
        "differs": ", ".join(f"{n} {v}" for n, v in given.items() if v != DEFAULTS[n] and n != "method"),
        "runs": len(runs),
        "seen": given["method"] == "frozen" or all(given[name] == DEFAULTS[name] for name in ("probe", "targets")),
        "numbers": runs[0]["numbers"],
        "average": statistics.mean(averages),
        "error": error,
        "loss": statistics.mean(run["loss"] for run in runs),
        "forgetting": statistics.mean(run["forgetting"] for run in runs),
        "drift": statistics.mean(run["texts"]["articles"]["drift"] for run in runs),
        **{text: 100 * statistics.mean(run["texts"][text]["rise"] for run in runs) for text in TEXTS},
    }


def name_of(given):
    name = NAMES[given["method"]]
    for option, label in (("penalty", "penalty"), ("ewc", "EWC"), ("anchors", "anchors")):
        name += f" + {label}" if given[option] else ""
    name += ", fitted" if given["probe"] and given["method"] == "frozen" else ""
    if given["choose"] == "each":
        return f"{name}, an adapter a task"
    return name + (f", by {given['choose']}" if given["choose"] != DEFAULTS["choose"] else "")


def print_table(rows):
    heads = ["", "", "runs", "numbers", "average accuracy", "mean loss", "forgetting", *TEXTS, "drift, articles"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for r in rows:
        cells = [
            r["method"], r["differs"], r["runs"], f"{r['numbers']:,}", f"{r['average']:.4f} ± {r['error']:.4f}",
            f"{r['loss']:.4f}", f"{r['forgetting']:+.4f}", *(f"{r[text]:+.2f} %" for text in TEXTS),
            f"{r['drift']:.4f}",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


def curve(rows, path):
    """Accuracy against the rise of perplexity, and against forgetting; a line for each method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for number, method in enumerate(methods):
        mine = [r for r in rows if r["method"] == method]
        style = {"marker": "osD^vPX*"[number % 8], "color": f"C{number % 10}", "label": method, "capsize": 2}
        errors = [0.0 if math.isnan(r["error"]) else r["error"] for r in mine]
        averages = [r["average"] for r in mine]
        left.errorbar([r["articles"] for r in mine], averages, errors, **style)
        right.errorbar([r["forgetting"] for r in mine], averages, errors, **{**style, "linestyle": "none"})
    left.set_xscale("symlog", linthresh=1.0)
    left.axvline(1.0, color="0.8", linestyle=":")
    left.set_xlabel("rise of perplexity on other articles, %")
    left.set_ylabel("final average accuracy")
    right.set_xlabel("forgetting")
    right.locator_params("x", nbins=5)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
