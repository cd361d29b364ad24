"""The paper's table, of the runs in this folder: what docs/paper.md shows under "Measured here".

python benchmarks/paper-smollm2/table.py
"""

from pathlib import Path

from curlora.continual.results import RunResults

for directory in sorted(Path(__file__).parent.glob("*/results.json")):
    results = RunResults.load(directory)
    methods = sorted(results.methods, key=lambda m: [int(part) if part.isdigit() else 0 for part in m.name.split("-")])
    seeds = [method.seeds[0] for method in methods]
    tasks = results.tasks
    rows = [("first WikiText-2 perplexity", "", [f"{next(iter(s.heldout.values()))[0].perplexity:.2f}" for s in seeds])]
    for after, learned in enumerate(tasks):
        for number in [after, *range(after)]:
            rows.append(
                (
                    f"{tasks[number].name} after {learned.name}",
                    f"{tasks[number].majority_rate:.3f}",
                    [f"{s.scores[after][number].accuracy:.3f}" for s in seeds],
                )
            )
    last = [next(iter(s.heldout.values()))[-1] for s in seeds]
    rows.append(("last WikiText-2 perplexity", "", [f"{score.perplexity:.2f}" for score in last]))
    rows.append(("drift, nats per token", "", [f"{score.drift:.3f}" if score.drift else "0" for score in last]))
    rows.append(("trained parameters", "", [f"{method.trainable_parameters:,}" for method in methods]))
    print(f"| {directory.parent.name} | always the majority class | " + " | ".join(m.label for m in methods) + " |")
    print("|---" * (len(methods) + 2) + "|")
    for name, majority, values in rows:
        print(f"| {name} | {majority} | " + " | ".join(values) + " |")
    print()
