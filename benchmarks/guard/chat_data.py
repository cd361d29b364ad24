"""Two chat tasks from ``CURLORA_DATA_DIR``, short enough for a CPU, with the loss on the answers only; and texts."""

import json
import os
import random
from pathlib import Path

LENGTH = 96  # most tokens of a prompt and its answer
ANSWER = 24  # tokens left for the answer at least
HELD_OUT = 64

# Without a system turn the template inserts its own, which is as long as a question.
SYSTEM = {"role": "system", "content": ""}


def read(name):
    path = root() / "sft" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def laid_out(tokenizer, prompt):
    """Return the tokens of a user's turn, up to the start of the answer."""
    turns = [SYSTEM, {"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def examples(tokenizer, task):
    """Return pairs of a row of tokens and the length of its prompt, in random order. The first are held out."""
    found = {"gsm8k": gsm8k, "dialogsum": dialogsum}[task](tokenizer)
    return random.Random(0).sample(found, len(found))


def gsm8k(tokenizer):
    """Return the shorter half of the questions, with truncated answers."""
    for_all = [(laid_out(tokenizer, row["question"]), row["answer"]) for row in read("gsm8k_train")]
    return [answered(tokenizer, prompt, answer) for prompt, answer in for_all if len(prompt) <= LENGTH - ANSWER]


def dialogsum(tokenizer):
    """Return examples that summarize a dialogue from its first lines."""
    found = []
    for row in read("dialogsum_dev_test"):
        summary, lines = row.get("summary") or row["summary1"], row["dialogue"].splitlines()
        for count in range(len(lines), 1, -1):
            prompt = laid_out(tokenizer, "Summarize: " + "\n".join(lines[:count]))
            if len(prompt) <= LENGTH - ANSWER:
                found.append(answered(tokenizer, prompt, summary))
                break
    return found


def answered(tokenizer, prompt, answer):
    answer = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return [*prompt, *answer][:LENGTH], len(prompt)


def articles(tokenizer):
    """Return the tokens of WikiText-2's test split."""
    return tokenizer((root() / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8"))["input_ids"]


def lines(path, encoding="utf-8"):
    """Return the rows of a tab-separated file, without its heading."""
    return [line.split("\t") for line in path.read_text(encoding=encoding).splitlines()[1:]]


def root():
    return Path(os.environ["CURLORA_DATA_DIR"])
