"""Train one adapter five times within one lifetime budget, each time in a separate process.

After each training, measures the loss on held-out answers of all five tasks, and the rise of perplexity on texts that
no training has seen. Each training is a line of ``five_trainings.jsonl``. Finished trainings are not repeated.

    export CURLORA_DATA_DIR=...
    python benchmarks/guard/five_trainings.py --model DIR [--no-anchors]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from chat_data import lines, read, root
from torch.nn.functional import cross_entropy

from results import add, rows

RESULTS = Path(__file__).parent / "five_trainings.jsonl"
LIMIT, LIFETIME = 0.01, 0.03
TRAINED, SCORED, LONGEST, BATCH = 96, 24, 160, 8
TEXTS = {
    "other articles": ("wikitext-2-raw/wiki.test.raw", 400_000),
    "problems and code": ("sft/mbpp.jsonl", 0),
}


def tasks():
    """Return questions and answers by task. The training examples come first, the held-out ones last."""
    reviews, pairs = lines(root() / "sst2" / "dev.tsv"), lines(root() / "mrpc" / "dev.tsv", "utf-8-sig")
    asked = {
        "gsm8k": [(row["question"], row["answer"]) for row in read("gsm8k_train")],
        "dialogsum": [
            (f"Summarize:\n{row['dialogue']}", row["summary"])
            for row in read("dialogsum_dev_test")
            if "summary" in row and len(row["dialogue"]) < 450
        ],
        "mbpp": [(row["text"], row["code"].replace("\r\n", "\n")) for row in read("mbpp")],
        "reviews": [
            (f"Is this review positive or negative?\n{text.strip()}", ["negative", "positive"][int(label)])
            for text, label in reviews
        ],
        "paraphrases": [
            (f"Do both say the same?\n1. {row[3]}\n2. {row[4]}", ["no", "yes"][int(row[0])]) for row in pairs
        ],
    }
    return {name: examples[: TRAINED + SCORED] for name, examples in asked.items()}


def encoded(tokenizer, examples):
    found = []
    for question, answer in examples:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][:LONGEST]
        if len(ids) > len(prompt):
            found.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return found


@torch.no_grad()
def loss(model, examples):
    """Return the loss in nats per token of the answers."""
    total = count = 0
    for row in examples:
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def train(options):
    """Run the training with number ``options.only`` in this process."""
    from peft import PeftModel, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
    )

    import curlora
    from curlora.guard import Ledger, perplexity

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    examples = {name: encoded(tokenizer, of) for name, of in tasks().items()}
    folder = options.folder / "adapter"
    if options.only:
        model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    else:
        upper = list(range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers))
        config = curlora.CurloraConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj"], layers_to_transform=upper)
        model = get_peft_model(model, config)
    name = list(examples)[options.only]
    budget = curlora.ForgettingBudget(
        LIMIT, lifetime=None if options.only else LIFETIME, anchors=not options.no_anchors, seed=options.seed
    )
    arguments = TrainingArguments(
        str(options.folder / "out"), num_train_epochs=2, per_device_train_batch_size=BATCH, report_to="none",
        use_cpu=True, save_strategy="no", logging_steps=4, lr_scheduler_type="cosine", warmup_steps=2,
        disable_tqdm=True, seed=options.seed,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=examples[name][:-SCORED], processing_class=tokenizer, callbacks=[budget],
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(folder)
    model.eval()
    text = budget.outcome.texts["own text"]
    held_out = {}
    for of, (path, skip) in TEXTS.items():
        content = (root() / path).read_text(encoding="utf-8")[skip : skip + 12_000]
        now = perplexity(model, [content], tokenizer)
        with model.disable_adapter():
            held_out[of] = now / perplexity(model, [content], tokenizer) - 1
    add(RESULTS, {
        "number": options.only, "task": name, "anchors": not options.no_anchors, "seed": options.seed,
        "rise": text.rise, "allowed": text.limit, "predicted": budget.outcome.predicted, "kept": budget.outcome.kept,
        "left": Ledger.load(folder).left, "losses": {of: loss(model, rows[-SCORED:]) for of, rows in examples.items()},
        "held out": held_out,
    })  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--no-anchors", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder of the adapter between trainings")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        return train(options)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="five-trainings-"))
    for number in range(5):
        here = {"number": number, "anchors": not options.no_anchors, "seed": options.seed}
        if any(here.items() <= row.items() for row in rows(RESULTS)) and (folder / "adapter").exists():
            continue
        more = ["--no-anchors"] if options.no_anchors else []
        command = [sys.executable, __file__, "--model", options.model, "--seed", str(options.seed), *more]
        subprocess.run([*command, "--only", str(number), "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
