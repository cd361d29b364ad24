"""Make the tables of docs/paper.md from the runs in this folder."""

from pathlib import Path

from tables import table

from curlora.continual.results import RunResults

HERE = Path(__file__).parent
NAMES = {"mrpc": "MRPC", "sst2": "SST-2", "sentiment140": "Sentiment140"}


def tables():
    return {"paper": stream("paper"), "paper_corrected": stream("corrected")}


def stream(protocol):
    """Return a table of accuracies after each task, and of the perplexity and drift of a text."""
    results = RunResults.load(HERE / protocol / "results.json")
    methods = sorted(results.methods, key=lambda m: [int(part) if part.isdigit() else 0 for part in m.name.split("-")])
    seeds = [method.seeds[0] for method in methods]
    texts = [next(iter(seed.heldout.values())) for seed in seeds]
    rows = [["first WikiText-2 perplexity", "", *(f"{text[0].perplexity:.2f}" for text in texts)]]
    for after, learned in enumerate(results.tasks):
        for number in [after, *range(after)]:
            task = results.tasks[number]
            accuracies = (f"{seed.scores[after][number].accuracy:.3f}" for seed in seeds)
            name = f"{NAMES[task.name]} after {NAMES[learned.name]}"
            rows.append([name, f"{task.majority_rate:.3f}", *accuracies])
    rows.append(["last WikiText-2 perplexity", "", *(f"{text[-1].perplexity:.2f}" for text in texts)])
    rows.append(["drift, nats per token", "", *(f"{text[-1].drift or 0:.3f}" for text in texts)])
    rows.append(["trained parameters", "", *(f"{method.trainable_parameters:,}" for method in methods)])
    return table(["", "always the majority class", *(method.label for method in methods)], rows)
