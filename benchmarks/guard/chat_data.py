"""Two tasks of chats from ``CURLORA_DATA_DIR``, short enough for a CPU (the loss is on the answer alone), and texts."""

import json
import os
import random
from pathlib import Path

LENGTH = 96  # tokens of a prompt and its answer
ANSWER = 24  # of these are the answer's at least
HELD_OUT = 64

# Without a system's turn of its own the template puts one in, of as many tokens as a question has.
SYSTEM = {"role": "system", "content": ""}


def read(name):
    path = root() / "sft" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def laid_out(tokenizer, prompt):
    """A user's turn, up to where the answer begins."""
    turns = [SYSTEM, {"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def examples(tokenizer, task):
    """Each a row of tokens and how many of them are the prompt, in random order; those held out first."""
    found = {"gsm8k": gsm8k, "dialogsum": dialogsum}[task](tokenizer)
    return random.Random(0).sample(found, len(found))


def gsm8k(tokenizer):
    """The shorter half of the questions, with the beginnings of their answers."""
    for_all = [(laid_out(tokenizer, row["question"]), row["answer"]) for row in read("gsm8k_train")]
    return [answered(tokenizer, prompt, answer) for prompt, answer in for_all if len(prompt) <= LENGTH - ANSWER]


def dialogsum(tokenizer):
    """What a dialogue is about, from the lines that it begins with."""
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
    """WikiText-2's test split, as tokens."""
    return tokenizer((root() / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8"))["input_ids"]


def lines(path, encoding="utf-8"):
    """The rows of a table below its heading."""
    return [line.split("\t") for line in path.read_text(encoding=encoding).splitlines()[1:]]


def root():
    return Path(os.environ["CURLORA_DATA_DIR"])
