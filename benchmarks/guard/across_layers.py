"""Measure why a prediction can be too low: the joint effect of all layers exceeds the sum of their separate effects.

Trains within a wide budget: on chats of four facts or on four examples of GSM8K, repeatedly, or on many examples once.
Then compares, on the guard's own rows and in nats per token: the guard's prediction, with and without damping; the
second-order term of each layer alone and of all layers together, from each row's gradients with targets sampled from
the model; and the measured KL divergence. Adds a line to ``across_layers.jsonl`` for each training.

    export CURLORA_DATA_DIR=...
    python benchmarks/guard/across_layers.py --model DIR
"""

import argparse
import tempfile
from pathlib import Path

import torch
from chat_data import answered, examples, laid_out
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

import curlora
from curlora.guard.calibration import layers_of
from curlora.text.own_text import own_text
from results import add, rows

RESULTS = Path(__file__).parent / "across_layers.jsonl"
STEPS, BATCH, DRAWS, LIMIT = 24, 8, 2, 0.05
COUNTS = {"chats of four facts": 24, "4 examples of GSM8K": 4, "192 examples of GSM8K": 192}
FACTS = {
    "when you open": "We open at ten in the morning, Tuesday to Saturday.",
    "how long I may keep a book": "A book is yours for four weeks. You can renew it twice.",
    "what a late book costs": "A late book costs ten cents a day, and never more than two euros.",
    "whether you lend music": "We lend records and scores. The record player is on the second floor.",
}
ASKED = [
    "Can you tell me {}?", "I would like to know {}.", "Nordby library, {}?", "Please tell me {}.", "Do you know {}?",
    "Hello! I wonder {}.",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="tokens of the guard's text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in options.tokens:
        for kind in COUNTS:
            run = {"data": kind, "tokens": tokens}
            if not any(run.items() <= row.items() for row in rows(RESULTS)):
                add(RESULTS, run | measured(options.model, kind, tokens))


def data_of(tokenizer, kind):
    if "GSM8K" in kind:
        return examples(tokenizer, "gsm8k")[: COUNTS[kind]]
    return [
        (answered(tokenizer, prompt := laid_out(tokenizer, way.format(asked)), answer)[0], len(prompt))
        for way in ASKED
        for asked, answer in FACTS.items()
    ]


def measured(name, kind, tokens):
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    upper = list(range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers))
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(model, curlora.CurloraConfig(r=32, target_modules=targets, layers_to_transform=upper))
    budget = curlora.ForgettingBudget(LIMIT, tokens=tokens)
    data = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in data_of(tokenizer, kind)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, report_to="none", use_cpu=True,
            save_strategy="no", lr_scheduler_type="cosine", warmup_steps=2, disable_tqdm=True,
        )  # fmt: skip
        Trainer(
            model, arguments, train_dataset=data * (STEPS * BATCH // len(data)), processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer), callbacks=[budget],
        ).train()  # fmt: skip
    model.eval()
    layers = layers_of(model, "default")
    Us = [layer.matrices["default"].weight for layer in layers.values()]
    learned = [U.detach() / budget.outcome.kept for U in Us]  # undo the scaling back
    calibration = curlora.guard.Ledger.of(model.peft_config["default"]).calibration
    text = own_text(model, tokenizer, tokens=tokens, max_length=128)

    def put(values):
        for U, value in zip(Us, values, strict=True):
            U.data.copy_(value)

    put(learned)
    guards = [curlora.Guard(model, calibration, damping=damping) for damping in (0.1, 1e-6)]
    predicted, undamped = (guard.drift() for guard in guards)
    each, together, kl, predicted_tokens = torch.zeros(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for row, counted in zip(text, text.counted, strict=True):
        put([torch.zeros_like(U) for U in Us])
        base = logits(model, row, counted)
        probabilities = base.detach().exp()
        for draw in range(DRAWS):
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            of_row = torch.autograd.grad(base.gather(1, drawn).sum(), Us, retain_graph=draw < DRAWS - 1)
            moved = torch.stack([(g.double() * U.double()).sum() for g, U in zip(of_row, learned, strict=True)])
            each += moved.square().sum() / 2 / DRAWS
            together += moved.sum().square() / 2 / DRAWS
        put(learned)
        with torch.no_grad():
            kl += (probabilities * (base - logits(model, row, counted))).sum()
        predicted_tokens += len(base)
    found = {"each layer": each, "all layers": together, "measured": kl}
    return {
        "rows": len(text), "kept": budget.outcome.kept, "predicted": predicted, "undamped": undamped,
        **{name: float(value / predicted_tokens) for name, value in found.items()},
    }  # fmt: skip


def logits(model, row, counted):
    """Return the log-probabilities at the positions that predict a token that counts."""
    return model(input_ids=row[None], use_cache=False).logits[0, :-1][counted[1:]].float().log_softmax(-1)


if __name__ == "__main__":
    main()
