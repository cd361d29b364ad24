"""Run the demo: fetch, fine-tune three times over three tasks, write a run directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora.continual.methods import Method
from curlora.continual.results import RunResults
from curlora.continual.run import Stream, run_stream
from curlora.continual.sequence import HeldOut, Progress, Settings
from curlora.demo import assets, texts
from curlora.report import write_report
from curlora.tuner import CurloraConfig

__all__ = ["run_demo"]

_TARGETS = ["q_proj", "k_proj", "v_proj"]
_RANK = 16

# Learning rates: the best final average accuracy of a sweep on this stream (see the README).
METHODS = [
    Method("frozen", "Heads only"),
    Method("lora", "LoRA", lambda: LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_TARGETS), 1e-3),
    Method("curlora", "CURLoRA", lambda: CurloraConfig(r=_RANK, target_modules=_TARGETS), 2e-3),
]


def run_demo(out: Path, *, quick: bool = False, seed: int = 0, progress: Callable[[float], Progress]) -> RunResults:
    """Fine-tune a frozen model with heads, LoRA and CURLoRA over three real tasks.

    Args:
        out: the run directory to make. It appears when the run is complete, and not before.
        quick: a smoke run of under a minute, whose figures mean nothing.
        seed: of the choice of examples, their order and LoRA's start.
        progress: given the whole amount of work, gives what hears about it.

    Returns:
        The measurements, as saved in ``out / "results.json"``.

    Raises:
        FileExistsError: if ``out`` exists.
        curlora.demo.assets.AssetError: if the model or the texts cannot be had.
    """
    out = out.absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another folder with --out, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    partial.chmod(0o755)
    try:
        results = _run(partial, quick, seed, progress)
        write_report(results, partial / "report.html")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.replace(partial, out)
    except OSError as error:  # somebody else made it meanwhile: the results are not thrown away
        raise FileExistsError(f"{out} cannot be made ({error.strerror}); the finished run is in {partial}.") from error
    return results


def _run(directory: Path, quick: bool, seed: int, progress: Callable[[float], Progress]) -> RunResults:
    examples, scored, windows = (24, 24, 1) if quick else (320, 160, 4)
    if quick:
        settings = Settings(batch_size=8, max_length=24, window=128, seed=seed)
    else:
        settings = Settings(batch_size=4, max_length=32, window=512, seed=seed)

    folder = assets.language_model()
    texts_folder = assets.fetch(assets.TEXTS) / Path(assets.TEXTS.files[0]).parent
    reviews = assets.fetch(assets.REVIEWS) / assets.REVIEWS.files[0]
    tasks = texts.tasks(texts_folder, reviews, examples, scored, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(texts.held_out_text(texts_folder))["input_ids"])[: windows * settings.window]
    stream = Stream(
        title="Three tasks, one after another" + (" (quick smoke run: the figures mean nothing)" if quick else ""),
        base_model="SmolLM2-135M-Instruct",
        load_model=lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=tokenizer,
        tasks=tasks,
        methods=METHODS,
        heldout=HeldOut("tales of the brothers Grimm", tokens),
        settings=settings,
        notes={"rank": _RANK, "targets": ", ".join(_TARGETS)},
    )
    return run_stream(stream, directory, progress)
