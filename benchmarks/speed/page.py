"""Make the tables and plots of time, memory and storage from the JSON Lines files in this folder."""

from pathlib import Path

import matplotlib
from tables import lines as read
from tables import table

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NAMES = {"curlora": "CURLoRA", "lora": "LoRA", "dora": "DoRA", "reference": "the author's form", "pissa": "PiSSA",
         "osf": "OSF"}  # fmt: skip
COLORS = {"curlora": "#0b6e4f", "lora": "#b5541c"}
MIB = 2**20


def tables():
    return {
        "machine": machine(), "headline": headline(), "sizes": sizes(), "attach": attach(), "load": load(),
        "many": many(), "storage": storage(),
    }  # fmt: skip


def figures(docs):
    plot_sizes(docs / "overhead.svg")


def lines(name):
    return read(HERE / f"{name}.jsonl")


def machine():
    said = []
    for name, what in (
        ("step", "steps and inference"),
        ("attach", "attaching and loading"),
    ):
        rows = lines(name)
        threads = " and ".join(map(str, sorted({row["threads"] for row in rows})))
        devices = " and ".join(sorted({row["device"] for row in rows}))
        versions = ", ".join(f"{package} {rows[0][package]}" for package in ("torch", "transformers", "peft"))
        said.append(f"- {what}: {devices}, {threads} threads; Python {rows[0]['python']}, {versions}")
    return "\n".join(said)


def headline():
    rows = []
    for row in lines("step"):
        if "reference" not in row["kept"]:
            continue
        for method in row["kept"]:
            over, inference = row["step"]["over"], row["inference"]["over"]
            rows.append([
                row["targets"], NAMES[method], f"{row['numbers'][method]:,}",
                f"{1000 * over[method]:,.0f} ms", f"{over[method] / over['lora']:.2f}",
                f"{1000 * inference[method]:,.0f} ms", f"{inference[method] / inference['lora']:.2f}",
                f"{row['kept'][method] / MIB:,.1f} MiB", f"{row['flops'][method] / 1e9:,.2f} G",
            ])  # fmt: skip
        rows.append([row["targets"], "*the frozen model*", 0, f"*{1000 * row['step']['floor']:,.0f} ms*", "",
                     f"*{1000 * row['inference']['floor']:,.0f} ms*", "", "", ""])  # fmt: skip
    return table(["adapted", "method", "trained parameters", "a step, over the floor", "of LoRA's",
                  "inference, over the floor", "of LoRA's", "kept for backward", "FLOPs of a step"],
                 rows)  # fmt: skip


def small():
    """Return the settings with three methods: with more, LoRA reuses memory that DoRA or the author's form freed."""
    return sorted(
        (row for row in lines("step") if "reference" not in row["kept"] and not row["compiled"]),
        key=lambda row: (row["targets"], row["batch"] * row["length"], row["r"], -row["threads"]),
    )


def sizes():
    rows = []
    for row in small() + [row for row in lines("step") if row["compiled"]]:
        cells = [row["targets"] + (", compiled" if row["compiled"] else ""), row["r"],
                 f"{row['batch']} x {row['length']}", row["threads"]]  # fmt: skip
        for kind in ("step", "inference"):
            over, floor = row[kind]["over"], row[kind]["floor"]
            low, high = row[kind]["of_lora"]
            cells += [f"{100 * over['curlora'] / floor:.1f} %", f"{100 * over['lora'] / floor:.1f} %",
                      f"**{over['curlora'] / over['lora']:.2f}** ({low:.2f} to {high:.2f})"]  # fmt: skip
        rows.append(cells)
    return table(["adapted", "rank", "batch", "threads", "step: CURLoRA", "LoRA", "ratio", "inference: CURLoRA", "LoRA",
                  "ratio"], rows)  # fmt: skip


def attach():
    rows = []
    measured = [row for row in lines("attach") if row["kind"] == "attach"]
    for row in measured:
        seconds = row["seconds"]
        for method in NAMES:
            if method in seconds:
                rows.append([
                    f"{row['layer']}, {row['shape'][0]} x {row['shape'][1]}", NAMES[method],
                    f"{seconds[method]:.3f} s", f"{seconds[method] / seconds['one pass']:.1f}",
                    f"{row['peak_bytes'][method] / MIB:,.0f} MiB", f"{row['weight_bytes'] / MIB:,.0f} MiB",
                ])  # fmt: skip
    # A block of the model has two layers of each shape (key and value, query and output, gate and up), but one "down".
    counts = [1 if row["layer"] == "down" else 2 for row in measured]

    def of_block(values):
        return sum(count * value for count, value in zip(counts, values, strict=True))

    one_pass = of_block(row["seconds"]["one pass"] for row in measured)
    weights = of_block(row["weight_bytes"] for row in measured)
    for method in ("curlora", "lora"):
        seconds = of_block(row["seconds"][method] for row in measured)
        memory = max(row["peak_bytes"][method] for row in measured)
        rows.append([
            "**a block, all seven**", NAMES[method], f"{seconds:.3f} s", f"**{seconds / one_pass:.1f}**",
            f"{memory / MIB:,.0f} MiB", f"{weights / MIB:,.0f} MiB",
        ])  # fmt: skip
    return table(["layer", "method", "to attach", "passes over the weight", "memory at most", "the weight"], rows)


def load():
    rows = [row for row in lines("attach") if row["kind"] == "load"]
    sizes = {name: f"{size / 1024:,.0f} KiB" for name, size in rows[0]["bytes"].items()}
    return table(
        ["", *(f"seconds, with {row['present']} there" for row in rows), "file"],
        [
            [said, *(f"{row['seconds'][name]:.2f}" for row in rows), sizes.get(name, "")]
            for name, said in (("curlora", "CURLoRA"), ("lora", "LoRA"), ("columns", "to read the columns alone"))
        ],
    )


def many():
    rows = []
    for row in lines("attach"):
        if row["kind"] != "many":
            continue
        s = row["seconds"]
        rows.append([
            NAMES[row["method"]], f"{row['count']:,}", f"{row['bytes_of_one'] / 1024:,.0f} KiB",
            f"{1000 * s['add']:,.0f} ms", f"{1000 * s['switch']:,.0f} ms", f"{s['floor']:.2f} s",
            f"{s['one adapter']:.2f} s", f"{s['an adapter for each row']:.2f} s",
        ])  # fmt: skip
    return table(["", "adapters", "memory of one", "to add one", "to switch", "a batch without", "with one",
                  "with one for each of its rows"], rows)  # fmt: skip


def storage():
    rows = []
    for row in lines("storage"):
        ours, theirs = row["curlora"], row["lora"]
        rows.append([
            row["model"], row["targets"], row["r"], f"{ours['numbers']:,}", f"{ours['bytes'] / 1024:,.0f} KiB",
            f"{theirs['numbers']:,}", f"{theirs['bytes'] / MIB:,.1f} MiB", f"{theirs['bytes'] / ours['bytes']:,.0f}",
        ])  # fmt: skip
    return table(["model", "adapted", "rank", "CURLoRA: parameters", "file", "LoRA: parameters", "file",
                  "LoRA's over CURLoRA's"], rows)  # fmt: skip


def plot_sizes(path):
    rows = [row for row in small() if row["targets"] == "all linear layers"]
    most = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == most]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, label, key, chosen in (
        (axes[0], "tokens of a batch (rank 16)", lambda r: r["batch"] * r["length"], lambda r: r["r"] == 16),
        (axes[1], "rank (512 tokens)", lambda r: r["r"], lambda r: r["batch"] * r["length"] == 512),
    ):
        points = sorted(filter(chosen, rows), key=key)
        for method in ("curlora", "lora"):
            share = [100 * row["step"]["over"][method] / row["step"]["floor"] for row in points]
            axis.plot([key(row) for row in points], share, "o-", color=COLORS[method], label=NAMES[method])
        axis.set(xlabel=label, xscale="log", ylim=(0, None))
        ticks(axis, [key(row) for row in points])
    axes[0].set_ylabel("a step over the frozen model, %")
    axes[0].legend(frameon=False)
    save(figure, path)


def ticks(axis, values):
    """Set ticks at the measured values only, and remove the other decoration of the axis."""
    axis.set_xticks(values, list(map(str, values)))
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def save(figure, path):
    plt.rcParams["svg.hashsalt"] = "curlora"  # makes the file reproducible
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
