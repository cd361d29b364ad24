"""Measure how well text that the base model itself writes replaces real text as the guard's text.

Trains on GSM8K as in ``learning_rate.py``, for sixty steps with a budget of 0.01 nats per token. The guard's text is
text that the base model writes, articles of WikiText-2, or a mix of five kinds of real text. Measures the KL divergence
from the base model on texts that the guard has not seen: the five kinds, the base model's own text, and its answers to
prompts. Each run adds a line to ``own_text.jsonl``. Finished runs are not repeated.

    python benchmarks/guard/own_text.py --model DIR
"""

import argparse
from pathlib import Path

import torch
from chat_data import LENGTH, articles, lines, read, root
from learning_rate import ALL, LAYERS, MIDDLE, TEXT, Lab
from lower_layers import kept
from torch.nn.functional import kl_div
from transformers import AutoTokenizer

import curlora
from curlora.continual.answers import answer
from results import add, rows

RESULTS = Path(__file__).parent / "own_text.jsonl"
KINDS = ["articles", "code", "tweets", "reviews", "dialogues"]
TEXTS = ["own", "articles", "mix"]
MEASURED = 768  # tokens of each text
PROMPTS, ANSWER = 16, 48  # number of prompts; most tokens of an answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--cache", type=Path, default=Path("study_cache"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--multiple", type=float, default=1.0, help="learning rate, in square roots of the budget")
    options = parser.parse_args()
    lab = None
    for seed in options.seeds:
        for text in TEXTS:
            run = {"text": text, "seed": seed, "multiple": options.multiple}
            if not any(run.items() <= row.items() for row in rows(RESULTS)):
                lab = lab or TextLab(options.model, options.cache)
                add(RESULTS, run | lab.guarded_by(**run))


class TextLab(Lab):
    """A :class:`Lab` with texts for the guard and texts to measure on."""

    def prepared(self):
        data, path = super().prepared(), self.cache / f"texts-{LAYERS}.pt"
        if path.exists():
            more = torch.load(path)
        else:
            torch.manual_seed(0)
            model, tokenizer = self.whole(), AutoTokenizer.from_pretrained(self.name)
            more = kept(model, LAYERS, self.texts(model, tokenizer), path)
        for part in more.values():
            if isinstance(part, dict):
                part["rows"] = [row + len(data["states"]) for row in part["rows"]]
        return {**data, **more, "states": torch.cat([data["states"], more["states"]])}

    def texts(self, model, tokenizer):
        """Return the guard's texts, and the texts to measure on, which are from other places of the same sources."""
        cut = lambda tokens: [tokens[i : i + LENGTH] for i in range(0, len(tokens), LENGTH)]  # noqa: E731
        parts, mix, each = {}, [], TEXT // len(KINDS) // LENGTH
        for kind, tokens in self.real(tokenizer).items():
            pieces = cut(tokens[: MEASURED + each * LENGTH])
            parts[f"measured {kind}"] = {"rows": pieces[: MEASURED // LENGTH]}
            mix += pieces[MEASURED // LENGTH :]
        parts["guard mix"] = {"rows": mix}
        own = curlora.guard.own_text(model, tokenizer, tokens=TEXT + MEASURED, max_length=LENGTH, cache=self.cache)
        other = len(own) * LENGTH // MEASURED  # one of so many rows is measured on, and not the guard's
        parts["guard own"] = {"rows": [row.tolist() for i, row in enumerate(own) if i % other]}
        parts["measured own"] = {"rows": [row.tolist() for row in own[::other]]}
        topics = list(dict.fromkeys(row["topic"] for row in read("dialogsum_dev_test") if "topic" in row))
        prompts = [f"Tell me something about this: {topic}" for topic in topics[:PROMPTS]]
        answers = answer(model, tokenizer, prompts, ANSWER, 0)
        parts["measured answers"] = {"rows": [torch.cat(pair).tolist() for pair in answers]}
        parts["measured answers"]["from"] = [len(prompt) - 1 for prompt, _ in answers]
        return parts

    def real(self, tokenizer):
        code = "\n\n".join(row["code"].replace("\r\n", "\n") for row in read("mbpp"))
        tweets = "\n".join(row[1] for row in lines(root() / "sentiment140" / "train_sample_eval.tsv")[:1000])
        reviews = "\n".join(row[0].strip() for row in lines(root() / "sst2" / "dev.tsv"))
        dialogues = "\n\n".join(row["dialogue"] for row in read("dialogsum_dev_test")[500:700])
        found = {"articles": articles(tokenizer)[100_000:150_000]}
        for kind, text in zip(KINDS[1:], (code, tweets, reviews, dialogues), strict=True):
            found[kind] = tokenizer(text[:40_000])["input_ids"]
        return found

    def guarded_by(self, text, seed, multiple):
        self.text, self.seed = "guard" if text == "articles" else f"guard {text}", seed
        found = self.run(**(MIDDLE | ALL), multiple=multiple)
        kl = {name.removeprefix("measured "): self.drift(name) for name in self.data if name.startswith("measured ")}
        return {**found, "tokens": sum(map(len, self.data[self.text]["rows"])), "texts": kl}

    @torch.no_grad()
    def drift(self, name):
        """Return the KL divergence from the base model on a text, in nats per token."""
        part, total, count = self.data[name], 0.0, 0
        head = self.head.weight.float()  # rounding logits to bfloat16 would add to the divergence
        after = self.states(name)
        with self.model.disable_adapter():
            before = self.states(name)
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            begin = part.get("from", [0] * len(before))[i]
            with torch.autocast("cpu", enabled=False):
                p, q = ((states[begin:-1].float() @ head.T).log_softmax(-1) for states in (old, new))
            total, count = total + kl_div(q, p, reduction="sum", log_target=True).item(), count + len(p)
        return round(total / count, 5)


if __name__ == "__main__":
    main()
