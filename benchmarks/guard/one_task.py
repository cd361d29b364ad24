"""One task, one method, in minutes: what a choice of columns and rows, a budget or a rival is worth.

SST-2 on SmolLM2-135M with the query, key and value projections of its upper half adapted. The lower half is frozen
and the same for every method, so its outputs are computed once and kept in ``--cache``. Each call is one run and adds
one line to ``one_task.jsonl``; ``--table`` prints all of them.

    python benchmarks/guard/one_task.py --model DIR method=guarded choose=task budget=0.008
    python benchmarks/guard/one_task.py --model DIR method=lora lr=5e-4 penalty=1
    python benchmarks/guard/one_task.py --table
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from lower_layers import kept
from peft import LoraConfig, get_peft_model
from study_data import lines
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import curlora

RESULTS = Path(__file__).parent / "one_task.jsonl"
DEFAULTS = dict(
    method="guarded",  # guarded, curlora, lora or frozen
    r=16,
    lr=0.03,
    budget=0.008,  # nats; 0 for none
    damping=0.1,
    choose="inverse",  # the paper's draw; or by what is used: most, unused, ratio, energy, mean
    of="train",  # the task that they are chosen by: train or mrpc
    looked=320,  # examples that are looked at for it
    fit=200,  # steps that a head is fitted for before the task's gradients are looked at
    choice=0,  # seed of the examples that are looked at, and of the head that is fitted to them
    penalty=0.0,  # strength of a KL penalty on the guard's text
    examples=1200,
    batch_size=8,
    seed=0,
    layers=15,  # from here on they are adapted
    targets="q_proj k_proj v_proj",
)
TEXT = 8192  # tokens of the guard's text
SCORED = 4096  # tokens of the held-out text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("one_task_cache"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("options", nargs="*", metavar="option=value", help=", ".join(DEFAULTS))
    arguments = parser.parse_args()
    if arguments.table:
        return table()
    options = dict(DEFAULTS)
    for given in arguments.options:
        name, _, value = given.partition("=")
        options[name] = type(options[name])(value)
    began = time.time()
    result = Run(argparse.Namespace(**options), arguments.model, arguments.cache).result()
    line = {**options, **result, "seconds": round(time.time() - began)}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line)


def table():
    head = ["method", "choose", "of", "looked", "choice", "r", "lr", "budget", "penalty", "examples", "seed"]
    figures = ["numbers", "accuracy", "loss", "perplexity", "drift", "predicted"]
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print("| " + " | ".join(head + figures) + " |\n" + "|---" * len(head + figures) + "|")
    for row in sorted(rows, key=lambda row: (row["examples"], row["method"], row["choose"], row["drift"])):
        if row["method"] != "guarded":
            row = {**row, "choose": "", "budget": "", "predicted": ""}
        print("| " + " | ".join(str(row.get(name, "")) for name in head + figures) + " |")


class Run:
    def __init__(self, options, name, cache):
        self.o = options
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        self.data = self.prepared(model, cache)
        model.model.layers = nn.ModuleList(list(model.model.layers)[options.layers :])
        # A token's number is its place in the table of states, so that everything takes input_ids as ever.
        model.set_input_embeddings(nn.Embedding.from_pretrained(self.data.pop("states")))
        self.base = model
        self.head = self.fresh_head()
        targets = options.targets.split()
        if options.method == "lora":
            torch.manual_seed(options.seed)
            self.model = get_peft_model(model, LoraConfig(r=options.r, lora_alpha=options.r, target_modules=targets))
        elif options.method in ("curlora", "guarded"):
            config = curlora.CurloraConfig(r=options.r, target_modules=targets, seed=options.seed)
            self.model = get_peft_model(model, config)
            if options.choose != "inverse":
                self.choose()
        else:
            self.model = None
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def prepared(self, model, cache):
        """Texts as numbers of states, with their labels or tokens."""
        path = cache / f"states-{self.o.layers}.pt"
        if path.exists():
            return torch.load(path)
        root = Path(os.environ["CURLORA_DATA_DIR"])
        sst2 = {split: lines(root / "sst2" / f"{split}.tsv") for split in ("train", "dev")}
        order = torch.randperm(len(sst2["train"]), generator=torch.Generator().manual_seed(0))[:3600].tolist()
        mrpc = lines(root / "mrpc" / "train.tsv", "utf-8-sig")[:320]
        tasks = {  # SST-2's sentences end in a space, which would be a token of its own and the last one
            "train": [(text.strip(), int(label)) for text, label in (sst2["train"][i] for i in order)],
            "dev": [(text.strip(), int(label)) for text, label in sst2["dev"]],
            "mrpc": [(f"{row[3]}\n{row[4]}", int(row[0])) for row in mrpc],
        }
        wiki = self.tokenizer((root / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8"))["input_ids"]
        texts = {"scored": wiki[:SCORED], "guard": wiki[200_000 : 200_000 + TEXT]}
        data = {}
        for name, rows in tasks.items():
            data[name] = {"rows": [self.tokenizer(text)["input_ids"] for text, _ in rows]}
            data[name]["labels"] = torch.tensor([label for _, label in rows])
        for name, tokens in texts.items():
            data[name] = {"rows": [tokens[i : i + 512] for i in range(0, len(tokens), 512)]}
            data[name]["tokens"] = [torch.tensor(row) for row in data[name]["rows"]]
        return kept(model, self.o.layers, data, path)

    def fresh_head(self):
        torch.manual_seed(1311)
        return nn.Linear(self.base.config.hidden_size, 2)

    def classes(self, rows):
        """Logits of the head at the last token of each row."""
        length = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        states = self.base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.head(states[torch.arange(len(rows)), mask.sum(1) - 1])

    def log_p(self, row):
        return self.base(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)

    def choose(self):
        """Columns and rows by what the guard's text, and the task, use of each."""
        kind = self.o.choose
        layers = {m.name: m for m in self.base.modules() if isinstance(m, curlora.CurloraLayer)}
        guard = dict.fromkeys(layers, 0.0)
        mean, energy, used, states = dict(guard), dict(guard), dict(guard), {}

        def listen(name, layer, add):
            def hook(module, inputs, output):
                weight = module.weight
                output.register_hook(lambda d: add(name, output.detach(), d @ weight))

            return layer.get_base_layer().register_forward_hook(hook)

        def squares(z, g):
            z = z * (g != 0).any(-1, keepdim=True)  # padding has no gradient
            return torch.cat([z.square().sum((0, 1)), g.square().sum((0, 1))]).double()

        def add_guard(name, z, g):
            guard[name] = guard[name] + squares(z, g)

        def add_task(name, z, g):
            used[name] = used[name] + squares(z, g)
            if kind in ("mean", "energy"):
                G = g.mT @ z
                mean[name] = mean[name] + G.sum(0)
                energy[name] = energy[name] + G.square().sum(0)

        # Else no gradient would reach the lowest layers' outputs.
        first = self.base.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: states.update(first=output.requires_grad_())
        )
        handles = [listen(name, layer, add_guard) for name, layer in layers.items()]
        generator = torch.Generator().manual_seed(5)
        for row in self.data["guard"]["rows"]:
            logits = self.log_p(row)
            p = logits.detach().exp()
            drawn = torch.searchsorted(p.cumsum(-1), torch.rand(len(p), 1, generator=generator)).clamp(
                max=p.shape[1] - 1
            )
            torch.autograd.grad(-logits.gather(1, drawn).sum(), states["first"])
        for handle in handles:
            handle.remove()
        if kind not in ("most", "unused"):
            part = self.data[self.o.of]
            seen = torch.randperm(min(1200, len(part["rows"])), generator=torch.Generator().manual_seed(self.o.choice))
            seen = sorted(seen[: self.o.looked].tolist(), key=lambda i: len(part["rows"][i]))
            rows, labels = [part["rows"][i] for i in seen], part["labels"][seen]
            torch.manual_seed(self.o.choice)
            self.head = nn.Linear(self.base.config.hidden_size, 2)
            self.fit_head(rows, labels, self.o.fit)
            handles = [listen(name, layer, add_task) for name, layer in layers.items()]
            for i in range(0, len(rows), 8):
                loss = cross_entropy(self.classes(rows[i : i + 8]), labels[i : i + 8], reduction="sum")
                torch.autograd.grad(loss, states["first"])
            for handle in handles:
                handle.remove()
            self.head = self.fresh_head()
        first.remove()
        r = self.o.r
        for name, layer in layers.items():
            z, g = guard[name].split([layer.out_features, layer.in_features])
            z, g = z + 0.01 * z.mean(), g + 0.01 * g.mean()
            if kind in ("most", "unused"):
                sign = 1 if kind == "most" else -1
                rows, columns = (sign * z).topk(r).indices, (sign * g).topk(r).indices
            elif kind == "ratio":  # what the task uses, for what the guard's text uses
                of_z, of_g = used[name].split([layer.out_features, layer.in_features])
                rows, columns = (of_z / z).topk(r).indices, (of_g / g).topk(r).indices
            else:  # the most of the task's gradient, of its mean or of each example, for what the guard's text uses
                of_task = mean[name].square() if kind == "mean" else energy[name]
                score = of_task.double() / (g[:, None] * z[None, :])
                rows = score.sum(0).topk(r).indices
                for _ in range(20):
                    columns = score[:, rows].sum(1).topk(r).indices
                    rows = score[columns].sum(0).topk(r).indices
            layer.redraw("default", torch.stack([columns, rows]))

    def fit_head(self, rows, labels, steps):
        """On the frozen model's states."""
        keep, self.head = self.head, nn.Identity()
        with torch.no_grad():
            states = torch.cat([self.classes(rows[i : i + 32]) for i in range(0, len(rows), 32)])
        self.head = keep
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=5e-3, weight_decay=0.0)
        for _ in range(steps):
            chosen = torch.randint(0, len(rows), (32,))
            optimizer.zero_grad()
            cross_entropy(self.head(states[chosen]), labels[chosen]).backward()
            optimizer.step()

    def train(self):
        o, part = self.o, self.data["train"]
        groups = [{"params": list(self.head.parameters()), "lr": 5e-3}]
        if self.trained:
            groups.append({"params": self.trained, "lr": o.lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        guard = None
        if o.method == "guarded":
            text = [piece for row in self.data["guard"]["rows"] for piece in row.split(128)]
            calibration = curlora.calibrate(self.model, text, progress=False)
            guard = curlora.Guard(self.model, calibration, budget=o.budget or None, damping=o.damping)
            guard.attach(optimizer)
        generator = torch.Generator().manual_seed(o.seed)
        order = torch.randperm(o.examples, generator=generator).tolist()
        size = 16 * o.batch_size  # sorted by length in pieces, so that batches hold little padding
        pieces = [sorted(order[i : i + size], key=lambda j: len(part["rows"][j])) for i in range(0, o.examples, size)]
        batches = [piece[i : i + o.batch_size] for piece in pieces for i in range(0, len(piece), o.batch_size)]
        schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
        for number in torch.randperm(len(batches), generator=generator).tolist():
            loss = cross_entropy(
                self.classes([part["rows"][j] for j in batches[number]]), part["labels"][batches[number]]
            )
            if o.penalty:
                row = self.data["guard"]["rows"][number % len(self.data["guard"]["rows"])][:129]
                with torch.no_grad(), self.model.disable_adapter():
                    base = self.log_p(row)
                loss = loss + o.penalty * kl_div(self.log_p(row), base, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return guard

    @torch.no_grad()
    def result(self):
        with torch.enable_grad():
            guard = self.train()
        part = self.data["dev"]
        order = sorted(range(len(part["rows"])), key=lambda i: len(part["rows"][i]))
        right = loss = 0.0
        for i in range(0, len(order), 32):
            logits, labels = (
                self.classes([part["rows"][j] for j in order[i : i + 32]]),
                part["labels"][order[i : i + 32]],
            )
            right += (logits.argmax(-1) == labels).sum().item()
            loss += cross_entropy(logits, labels, reduction="sum").item()
        nll = drift = count = 0.0
        for row, tokens in zip(self.data["scored"]["rows"], self.data["scored"]["tokens"], strict=True):
            new = self.log_p(row)
            if self.model is not None:
                with self.model.disable_adapter():
                    drift += kl_div(new, self.log_p(row), reduction="sum", log_target=True).item()
            nll -= new.gather(1, tokens[1:, None]).sum().item()
            count += len(tokens) - 1
        return {
            "numbers": sum(p.numel() for p in self.trained),
            "accuracy": round(right / len(order), 4),
            "loss": round(loss / len(order), 4),
            "perplexity": round(math.exp(nll / count), 3),
            "drift": round(drift / count, 5),
            **({} if guard is None else {"predicted": round(guard.drift(), 5)}),
        }


if __name__ == "__main__":
    main()
