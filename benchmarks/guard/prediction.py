"""Compare predicted with measured forgetting over a wide range, by scaling a trained adapter down and up.

For each scale of ``U``, prints the drift that a guard predicts from its calibration, and the measured KL divergence
from the base model, on the calibration's text and on another part of its source.

    python benchmarks/guard/prediction.py --model DIR --adapter RUN/guarded/seed-0/adapter --text FILE
"""

import argparse
import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import curlora
from curlora.continual.heldout import HeldOut, measure

SCALES = (0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a hub id")
    parser.add_argument("--adapter", required=True, help="folder of a trained CURLoRA adapter")
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each part")
    parser.add_argument("--skip", type=int, default=20000, help="tokens before the calibration's part")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text, encoding="utf-8") as file:
        tokens = torch.tensor(tokenizer(file.read())["input_ids"])
    own = HeldOut("the calibration's", tokens[options.skip : options.skip + options.tokens])
    other = HeldOut("another part", tokens[: options.tokens])
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    found = [module for module in model.modules() if isinstance(module, curlora.CurloraLayer)]
    mixings = [layer.curlora_U["default"].weight for layer in found]
    learned = [U.detach().clone() for U in mixings]

    def scaled(factor):
        for U, value in zip(mixings, learned, strict=True):
            U.data.copy_(factor * value)

    def base_logits(ids, kept):
        with model.disable_adapter():
            return model.get_base_model()(input_ids=ids, logits_to_keep=kept, use_cache=False).logits

    scaled(0)
    guard = curlora.Guard(model, curlora.calibrate(model, own.tokens.split(128), progress=False))
    start = {text.name: measure(model, text).perplexity for text in (own, other)}
    for factor in SCALES:
        scaled(factor)
        line = {"scale": factor, "predicted": guard.drift()}
        for text in (own, other):
            score = measure(model, text, base_logits)
            rise = score.perplexity / start[text.name] - 1
            line[text.name] = {"drift": round(score.drift, 6), "perplexity_rise": round(rise, 5)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
