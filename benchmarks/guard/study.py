"""The proof: one method over a stream of tasks, in minutes on a core, and what it forgot of texts of several kinds.

SmolLM2-135M with projections of its upper layers adapted. The layers below are frozen and the same for every method,
so their outputs are computed once and kept in ``--cache``. Each call is one run and adds one line to ``study.jsonl``
(or the file that ``--out`` names); a run that is there already is not repeated. ``study_table.py`` makes the table and
the curve of them.

    python benchmarks/guard/study.py --model DIR method=guarded rise=0.01 seed=1
    python benchmarks/guard/study.py --model DIR method=lora lr=5e-4 penalty=1 stream="s140 sst2 mrpc"
"""

import argparse
import itertools
import math
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from study_data import SCORED, TOKENS, TRAIN, longer, prepared
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import curlora
from curlora.continual.plugins import EWC
from curlora.continual.probe import fit
from curlora.guard import Anchors, scale_to_limit
from curlora.sampling import SAMPLINGS
from results import add, rows

RESULTS = Path(__file__).parent / "study.jsonl"
DEFAULTS = dict(
    method="guarded",  # guarded, curlora, lora, osf or frozen
    stream="mrpc sst2 s140",
    seed=0,  # of the order of the examples, the heads, the adapter
    lr=0.03,
    r=16,
    rise=0.01,  # guarded: of the guard text's perplexity, over the whole stream
    slack=1.0,  # guarded: the ball is so many times as wide, in nats, as the rise that is measured may be
    damping=0.1,  # guarded
    spread=1,  # guarded: the rise is reached by even steps from task to task
    # The paper's draw; uniform; norm; leverage; task: curlora.redraw for the first task; or each: an adapter for each
    # task, its columns and rows redrawn for it, beside those of earlier tasks, which stay as they are.
    choose="inverse",
    penalty=0.0,  # strength of a KL penalty toward the base on the guard's text
    ewc=0.0,  # strength
    anchors=0.0,  # strength
    # 1: a task's head is fitted to the model as it is before both are trained; 2: and again after.
    probe=0,
    head_lr=5e-3,
    examples=0,  # of each task, if it has more; 0 for all
    times=1,  # so many times the examples of each task
    epochs=1,
    batch_size=8,
    layers=15,  # from here on they are adapted
    targets="q_proj k_proj v_proj",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*", metavar="option=value", help=", ".join(DEFAULTS))
    arguments = parser.parse_args()
    options = changed(DEFAULTS, arguments.options)
    if any(
        all(line.get(name, DEFAULTS[name]) == value for name, value in options.items()) for line in rows(arguments.out)
    ):
        return print("known:", *arguments.options)
    began = time.time()
    result = Run(SimpleNamespace(**options), arguments.model, arguments.cache).result()
    add(arguments.out, {**options, **result, "seconds": round(time.time() - began)})


def changed(options, given):
    """``options`` with those that are given as ``name=value``."""
    options = dict(options)
    for one in given:
        name, _, value = one.partition("=")
        options[name] = type(options[name])(value)
    return options


class Run:
    def __init__(self, options, name, cache):
        self.o = o = options
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        self.data = prepared(model, tokenizer, o.layers, cache, o.times)
        model.model.layers = nn.ModuleList(list(model.model.layers)[o.layers :])
        # A token's number is its place in the table of states, so that everything takes input_ids as ever.
        model.set_input_embeddings(nn.Embedding.from_pretrained(self.data.pop("states")))
        self.base = model
        torch.manual_seed(o.seed)
        self.targets = targets = o.targets.split() if o.targets != "all-linear" else o.targets
        config = {
            "frozen": lambda: None,
            "lora": lambda: LoraConfig(r=o.r, lora_alpha=o.r, target_modules=targets),
            "osf": lambda: OSFConfig(target_modules=targets, effective_rank=0.5),
            "curlora": lambda: curlora.CurloraConfig(
                r=o.r, target_modules=targets, seed=o.seed, sampling=o.choose if o.choose in SAMPLINGS else "inverse"
            ),
        }["curlora" if o.method == "guarded" else o.method]()
        # Before an adapter may change it.
        self.start, self.base_states = self.of_base(cache / f"base-{o.layers}{longer(o.times)}.pt")
        self.model = None if config is None else get_peft_model(model, config)
        self.trained = (
            [] if self.model is None else [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        )
        if o.choose == "leverage":
            self.by_leverage()
        self.numbers = sum(p.numel() for _, p in self.trained)
        self.head = nn.Linear(model.config.hidden_size, 2)
        self.guard = self.ewc = self.anchors = None
        if o.ewc:
            self.ewc = EWC(strength=o.ewc)
        if o.anchors:
            self.anchors = Anchors()

    def result(self):
        tasks = self.o.stream.split()
        heads, matrix, kept = {}, [], []
        for number, task in enumerate(tasks):
            torch.manual_seed(1000 * self.o.seed + number)
            self.head = nn.Linear(self.base.config.hidden_size, 2)
            if self.o.probe:
                self.head = self.probe(task)
            if self.o.method != "frozen" or not self.o.probe:
                self.learn(task, number, len(tasks))
            if self.guard is not None:
                kept.append(self.keep(number, len(tasks)))
            if self.o.probe > 1 and self.o.method != "frozen":
                self.head = self.probe(task)
            heads[task] = self.head
            self.remember(task, number)
            row = {}
            for other in tasks[: number + 1] if number + 1 == len(tasks) else [task]:
                self.head = heads[other]
                row[other] = self.score(other)
            matrix.append(row)
        last = matrix[-1]
        forgotten = [matrix[i][task]["accuracy"] - last[task]["accuracy"] for i, task in enumerate(tasks[:-1])]
        return {
            "numbers": self.numbers,
            "average": round(statistics.mean(score["accuracy"] for score in last.values()), 4),
            "loss": round(statistics.mean(score["loss"] for score in last.values()), 4),
            "forgetting": round(statistics.mean(forgotten), 4) if forgotten else 0.0,
            "scores": matrix,
            "texts": {name: self.lost(name) for name in TOKENS},
            **({"kept": kept, "predicted": self.guard.drift()} if kept else {}),
        }

    def of_base(self, path):
        """What is measured of the base model's texts, and its last states, above which nothing is trained."""
        if not path.exists():
            self.base_states = {}
            start = {name: self.text(name, first=True) for name in TOKENS}
            torch.save((start, self.base_states), path)
        return torch.load(path)

    def learn(self, task, number, count):
        o, part = self.o, self.data[task]
        texts = [piece for row in self.data["guard"]["rows"] for piece in row.split(128)]
        if o.method == "guarded":
            adapter = f"task{number}" if o.choose == "each" and number else "default"
            if adapter != "default":
                self.add_adapter(adapter, number)
            if self.guard is None or adapter != "default":
                if o.choose in ("task", "each"):
                    self.redraw(task, texts, adapter)
                self.calibration = curlora.calibrate(self.model, texts, adapter=adapter, progress=False)
            rise = o.rise * (1 / count) if o.choose == "each" else self.limit(number, count)
            self.guard = curlora.Guard(
                self.model, self.calibration, budget=o.slack * math.log1p(rise), damping=o.damping, adapter=adapter
            )
            self.before = [U.detach().clone() for U in self.guard.parameters]
        optimizers = [torch.optim.AdamW(self.head.parameters(), lr=o.head_lr, weight_decay=0.0)]
        if self.trained:
            optimizers.append(torch.optim.AdamW([p for _, p in self.trained], lr=o.lr, weight_decay=0.0))
        if self.guard is not None:
            self.guard.attach(optimizers[-1])
        generator = torch.Generator().manual_seed(1000 * o.seed + number)
        batches = [
            batch for _ in range(o.epochs) for batch in grouped(part["rows"], self.count(task), o.batch_size, generator)
        ]
        schedules = [get_cosine_schedule_with_warmup(one, len(batches) // 10, len(batches)) for one in optimizers]
        pieces = itertools.cycle([row[:129] for row in self.data["guard"]["rows"]])
        for batch in batches:
            loss = cross_entropy(self.classes([part["rows"][j] for j in batch]), part["labels"][batch])
            if o.penalty:
                piece = next(pieces)
                with torch.no_grad():
                    base = self.base_log_p(piece)
                now = self.log_p(piece)
                loss = loss + o.penalty * kl_div(now, base, reduction="batchmean", log_target=True)
            for held in (self.held_by_ewc, self.held_by_anchors):
                lost = held()
                loss = loss if lost is None else loss + lost
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for each in (*optimizers, *schedules):
                each.step()
        if self.guard is not None:
            self.guard.detach()

    def count(self, task):
        most = self.o.times * TRAIN[task]
        return min(most, self.o.examples or most)

    def held_by_ewc(self):
        return None if self.ewc is None else self.ewc.penalty(SimpleNamespace(model=self.model))

    def held_by_anchors(self):
        lost = None if self.anchors is None else self.anchors.penalty(dict(self.trained))
        return None if lost is None else self.o.anchors * lost

    def remember(self, task, number, examples=200):
        """What later tasks hold on to."""
        if self.ewc is not None:
            total = {name: torch.zeros_like(p) for name, p in self.trained}
            for gradients in self.drawn(task, number, examples):
                for name in total:
                    total[name] += gradients[name].square() / examples
            for name, p in self.trained:
                self.ewc.merge(name, total[name], p.detach().clone())
        if self.anchors is not None:
            self.anchors.add(dict(self.trained), self.drawn(task, number, examples))

    def drawn(self, task, number, examples):
        part, rng = self.data[task], random.Random(number)
        for j in rng.sample(range(self.count(task)), examples):
            logits = self.classes([part["rows"][j]])
            answer = torch.tensor([rng.random() < float(logits.detach().softmax(-1)[0, 1])]).long()
            found = torch.autograd.grad(cross_entropy(logits, answer), [p for _, p in self.trained])
            yield {name: gradient for (name, _), gradient in zip(self.trained, found, strict=True)}

    def add_adapter(self, adapter, number):
        config = curlora.CurloraConfig(r=self.o.r, target_modules=self.targets, seed=1000 * self.o.seed + number)
        self.model.add_adapter(adapter, config)
        self.model.base_model.set_adapter(["default", *(f"task{i}" for i in range(1, number + 1))])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f"curlora_U.{adapter}" in name)
        self.trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.numbers += sum(p.numel() for _, p in self.trained)

    def redraw(self, task, texts, adapter, examples=320):
        """By a head that is fitted on the frozen model."""
        part = self.data[task]
        keep = self.head
        if not self.o.probe:
            self.head = self.fitted_head(task, examples)
        batches = [list(range(i, i + 8)) for i in range(0, examples, 8)]
        loss = lambda batch: cross_entropy(self.classes([part["rows"][j] for j in batch]), part["labels"][batch])  # noqa: E731
        curlora.redraw(self.model, batches, texts, loss=loss, adapter=adapter, progress=False)
        self.head = keep

    @torch.no_grad()
    def states(self, task, examples):
        part, keep = self.data[task], self.head
        self.head = nn.Identity()
        order = sorted(range(examples), key=lambda i: len(part["rows"][i]))
        states = torch.empty(examples, self.base.config.hidden_size)
        for begin in range(0, examples, 32):
            chosen = order[begin : begin + 32]
            states[chosen] = self.classes([part["rows"][j] for j in chosen])
        self.head = keep
        return states

    def probe(self, task):
        """The best head for all of the task's examples, on the model as it is."""
        head = nn.Linear(self.base.config.hidden_size, 2)
        fit(head, self.states(task, self.count(task)), self.data[task]["labels"][: self.count(task)])
        return head

    def fitted_head(self, task, examples):
        """On the model as it is."""
        part, states = self.data[task], self.states(task, examples)
        head = nn.Linear(self.base.config.hidden_size, 2)
        optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3, weight_decay=0.0)
        for _ in range(200):
            chosen = torch.randint(0, examples, (32,))
            optimizer.zero_grad()
            cross_entropy(head(states[chosen]), part["labels"][chosen]).backward()
            optimizer.step()
        return head

    def by_leverage(self):
        """The columns and rows that the best approximation of rank r of the weight leans on most."""
        for layer in self.model.modules():
            if isinstance(layer, curlora.CurloraLayer):
                left, _, right = torch.linalg.svd(layer.weight, full_matrices=False)
                scores = right[: self.o.r].square().sum(0), left[:, : self.o.r].square().sum(1)
                layer.redraw("default", torch.stack([score.topk(self.o.r).indices.sort().values for score in scores]))

    def limit(self, number, count):
        return self.o.rise * ((number + 1) / count if self.o.spread else 1.0)

    def rise(self):
        return self.text("guard")["perplexity"] / self.start["guard"]["perplexity"] - 1

    def keep(self, number, count):
        limit = self.limit(number, count)
        scale, rise = scale_to_limit(limit, self.rise, self.guard.parameters, self.before)
        return {"scale": round(scale, 4), "rise": round(rise, 5), "limit": limit}

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

    def base_log_p(self, row):
        return self.base.lm_head(self.base_states[int(row[0])][: len(row) - 1]).log_softmax(-1)

    @torch.no_grad()
    def score(self, task, count=None):
        part, count = self.data[f"{task}-dev"], count or SCORED[task]
        order = sorted(range(count), key=lambda i: len(part["rows"][i]))
        right = loss = 0.0
        for i in range(0, count, 32):
            chosen = order[i : i + 32]
            logits = self.classes([part["rows"][j] for j in chosen])
            right += (logits.argmax(-1) == part["labels"][chosen]).sum().item()
            loss += cross_entropy(logits, part["labels"][chosen], reduction="sum").item()
        return {"accuracy": round(right / count, 4), "loss": round(loss / count, 4)}

    @torch.no_grad()
    def text(self, name, first=False):
        """Perplexity and drift; the first time, of the base model, whose last states are kept."""
        nll = drift = count = 0.0
        for row, tokens in zip(self.data[name]["rows"], self.data[name]["tokens"], strict=True):
            states = self.base.model(input_ids=row[None], use_cache=False).last_hidden_state[0]
            if first:
                self.base_states[int(row[0])] = states
            new = self.base.lm_head(states[:-1]).log_softmax(-1)
            if name != "guard":  # which is measured often
                drift += kl_div(new, self.base_log_p(row), reduction="sum", log_target=True).item()
            nll -= new.gather(1, tokens[1:, None]).sum().item()
            count += len(tokens) - 1
        return {"perplexity": math.exp(nll / count), "drift": drift / count}

    def lost(self, name):
        now = self.text(name)
        rise = now["perplexity"] / self.start[name]["perplexity"] - 1
        return {"perplexity": round(now["perplexity"], 3), "rise": round(rise, 5), "drift": round(now["drift"], 5)}


def grouped(rows, count, size, generator):
    """Batches in random order, of rows that are sorted by length in pieces, so that there is little padding."""
    order = torch.randperm(count, generator=generator).tolist()
    pieces = [sorted(order[i : i + 16 * size], key=lambda j: len(rows[j])) for i in range(0, count, 16 * size)]
    batches = [piece[i : i + size] for piece in pieces for i in range(0, len(piece), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


if __name__ == "__main__":
    main()
