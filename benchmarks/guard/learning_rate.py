"""Find how the best learning rate of a guarded training depends on its budget, its steps and the rank.

The upper eight layers of SmolLM2-135M are adapted; the outputs of the lower layers are computed once. The data are
GSM8K and DialogSum in the chat template, in batches of four rows of at most 96 tokens. The optimizer is AdamW, with
warm-up over a tenth of the steps, then a cosine schedule, and clipping only where a setting says so. A rate is given as
a multiple of the square root of the budget. Each run adds a line to ``learning_rate.jsonl``. Finished runs are not
repeated.

    python benchmarks/guard/learning_rate.py --model DIR
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from chat_data import HELD_OUT, LENGTH, articles, examples
from lower_layers import kept
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import curlora
from results import add, rows

RESULTS = Path(__file__).parent / "learning_rate.jsonl"
LAYERS = 22  # the first adapted layer
BATCH, TEXT, OTHER = 4, 8192, 768  # rows of a batch; tokens of the guard's text; tokens of other articles
EXAMPLES = 480
MIDDLE = dict(task="gsm8k", steps=60, budget=0.01, r=32, targets="q_proj k_proj v_proj", clip=0.0, choose="inverse")
REDRAWN = dict(choose="task")  # columns and rows are chosen for the task, as under a ForgettingBudget
ALL = REDRAWN | dict(targets="all-linear")
MLP = REDRAWN | dict(targets="gate_proj up_proj down_proj")
SETTINGS = [
    REDRAWN | dict(steps=20),
    REDRAWN | dict(),
    REDRAWN | dict(steps=240),
    REDRAWN | dict(budget=0.002),
    REDRAWN | dict(budget=0.1),
    REDRAWN | dict(budget=0.1, steps=20),
    REDRAWN | dict(budget=0.1, steps=240),
    ALL | dict(),
    ALL | dict(budget=0.1),
    ALL | dict(clip=1.0),
    ALL | dict(task="dialogsum"),
    ALL | dict(r=8),
    ALL | dict(r=128),
    MLP | dict(),
    ALL | dict(budget=0.002),
    ALL | dict(task="dialogsum", budget=0.1),
    ALL | dict(steps=1000),
    dict(steps=20),
    dict(),
    dict(steps=240),
    dict(budget=0.1),
    dict(r=128),
    dict(task="dialogsum"),
]
MULTIPLES = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--only", nargs="+", default=[], metavar="name=value", help="run only these settings")
    options = parser.parse_args()
    only = dict(one.split("=", 1) for one in options.only)
    lab = None
    for changed in SETTINGS:
        setting = MIDDLE | changed
        if any(str(setting[name]) != value for name, value in only.items()):
            continue
        rule = curlora.guard.learning_rate(setting["budget"], setting["steps"], setting["r"])
        while (multiple := next_multiple(known(setting), rule / math.sqrt(setting["budget"]))) is not None:
            lab = lab or Lab(options.model, options.cache)
            run = {**setting, "multiple": multiple}
            add(RESULTS, run | lab.run(**run))


def known(setting):
    """Return the finished runs of a setting, by their multiples."""
    return {row["multiple"]: row for row in rows(RESULTS) if setting.items() <= row.items()}


def next_multiple(runs, rule):
    """Return the next multiple to run.

    The two in the middle come first, then the neighbours of the best one, then the nearest one at or below
    the rule's. Returns ``None`` when all of them have been run.
    """
    for multiple in (1.0, 3.0):
        if multiple not in runs:
            return multiple
    place = MULTIPLES.index(min(runs, key=lambda multiple: runs[multiple]["loss"]))
    wanted = MULTIPLES[max(0, place - 1) : place + 2]
    wanted += [multiple for multiple in MULTIPLES if multiple <= rule][-1:]
    return next((multiple for multiple in wanted if multiple not in runs), None)


class Lab:
    """The upper layers of the model, with an adapter for each setting."""

    text, seed = "guard", 0  # the guard's text in the data; the seed of the adapter and of the order of examples

    def __init__(self, name, cache):
        self.name, self.cache = name, cache
        torch.set_num_threads(1)
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False).__enter__()
        self.data = self.prepared()
        self.now, self.model = None, None

    def prepared(self):
        path = self.cache / f"chats-{LAYERS}.pt"
        if path.exists():
            return torch.load(path)
        tokenizer = AutoTokenizer.from_pretrained(self.name)
        data = {}
        for task in ("gsm8k", "dialogsum"):
            of_task = examples(tokenizer, task)[: HELD_OUT + EXAMPLES]
            data[task] = {"rows": [row for row, _ in of_task], "prompts": [prompt for _, prompt in of_task]}
            data[task]["tokens"] = [torch.tensor(row) for row in data[task]["rows"]]
        text = articles(tokenizer)
        for name, tokens in (("guard", text[200_000 : 200_000 + TEXT]), ("articles", text[:OTHER])):
            data[name] = {"rows": [tokens[i : i + LENGTH] for i in range(0, len(tokens), LENGTH)]}
        return kept(self.whole(), LAYERS, data, path)

    def whole(self):
        """Return the model with its linear layers in bfloat16 and everything else in float32."""
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32).eval().requires_grad_(False)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        return model

    def base(self):
        model = self.whole()
        model.model.layers = nn.ModuleList(list(model.model.layers)[LAYERS:])
        model.set_input_embeddings(nn.Embedding.from_pretrained(self.data["states"]))
        return model

    def adapt(self, r, targets, choose, task):
        wanted = [r, targets, choose, task if choose == "task" else ""]
        wanted += [self.text, self.seed] if (self.text, self.seed) != (Lab.text, Lab.seed) else []
        if self.now != wanted:
            base, self.now = self.base(), wanted
            names = targets if targets == "all-linear" else targets.split()
            self.model = get_peft_model(base, curlora.CurloraConfig(r=r, target_modules=names, seed=self.seed))
            self.U = [p for p in self.model.parameters() if p.requires_grad]
            self.body, self.head = base.model, base.lm_head
            if choose == "task":
                batches = [list(range(i, i + 8)) for i in range(HELD_OUT, HELD_OUT + 192, 8)]
                loss = lambda batch: self.loss(task, batch)  # noqa: E731
                curlora.redraw(self.model, batches, self.data[self.text]["rows"], loss=loss, progress=False)
            path = self.cache / f"moments-{LAYERS}-{'-'.join(map(str, wanted))}.safetensors"
            if not path.exists():
                curlora.calibrate(self.model, self.data[self.text]["rows"], progress=False).save(path)
            self.calibration = curlora.Calibration.load(path)
        with torch.no_grad():
            for U in self.U:
                U.zero_()
        self.before = self.states("articles")
        return self.model

    def run(self, task, steps, budget, r, targets, clip, choose, multiple):
        began, rate = time.time(), multiple * math.sqrt(budget)
        guard = curlora.Guard(self.adapt(r, targets, choose, task), self.calibration, budget=budget)
        optimizer = torch.optim.AdamW(self.U, lr=rate, weight_decay=0.0)
        guard.attach(optimizer)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
        norms = []  # of the gradient of all U, which is what a Trainer clips
        for batch in self.batches(task, steps):
            loss = self.loss(task, batch)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(self.U, clip or math.inf)))
            optimizer.step()
            schedule.step()
        guard.detach()
        found = {"loss": self.held_out(task), "drift": guard.drift(), "kl": self.kl(), "norm": statistics.median(norms)}
        return {"rate": rate, **{name: round(value, 5) for name, value in found.items()},
                "parameters": sum(U.numel() for U in self.U), "seconds": round(time.time() - began)}  # fmt: skip

    def batches(self, task, steps):
        """Yield a batch for each step: all examples in random order, repeatedly."""
        generator, waiting = torch.Generator().manual_seed(self.seed), []
        count = len(self.data[task]["rows"])
        for _ in range(steps):
            if len(waiting) < BATCH:
                waiting += (HELD_OUT + torch.randperm(count - HELD_OUT, generator=generator)).tolist()
            yield [waiting.pop(0) for _ in range(BATCH)]

    def loss(self, task, batch, reduction="mean"):
        """Return the loss on the tokens of the answers. Only these go through the head."""
        part = self.data[task]
        length = max(len(part["rows"][i]) for i in batch)
        ids, mask = torch.zeros(2, len(batch), length, dtype=torch.long)
        answers = torch.full((len(batch), length - 1), -1)
        for row, i in enumerate(batch):
            n, prompt = len(part["rows"][i]), part["prompts"][i]
            ids[row, :n], mask[row, :n] = part["rows"][i], 1
            answers[row, prompt - 1 : n - 1] = part["tokens"][i][prompt:]
        states = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        counted = answers >= 0
        return cross_entropy(self.head(states[:, :-1][counted]), answers[counted], reduction=reduction)

    @torch.no_grad()
    def held_out(self, task):
        part = self.data[task]
        order = sorted(range(HELD_OUT), key=lambda i: len(part["rows"][i]))
        total = sum(self.loss(task, order[i : i + 16], "sum").item() for i in range(0, HELD_OUT, 16))
        return total / sum(len(part["rows"][i]) - part["prompts"][i] for i in order)

    @torch.no_grad()
    def states(self, name):
        return [self.body(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in self.data[name]["rows"]]

    @torch.no_grad()
    def kl(self):
        """Return the KL divergence from the base model on articles that the guard has not seen, in nats per token."""
        total = count = 0.0
        for before, after in zip(self.before, self.states("articles"), strict=True):
            old, new = (self.head(states).log_softmax(-1) for states in (before, after))
            total, count = total + kl_div(new, old, reduction="sum", log_target=True).item(), count + len(before)
        return total / count


if __name__ == "__main__":
    main()
