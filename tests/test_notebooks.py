"""The notebooks run, here with a small model and few texts in the place of the demo's, and are kept with outputs."""

import random
import runpy
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curlora.demo import assets
from tests.models import VOCABULARY, WORDS, word_tokenizer
from tests.train.conftest import TEMPLATE, write_lines

ROOT = Path(__file__).parent.parent
LABELS = {
    "reviews": ["negative", "positive"],
    "tweets": ["HillaryClinton", "realDonaldTrump"],
    "reuters": ["earn", "grain"],
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with all that the demo would fetch."""
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=64, num_hidden_layers=30, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256,
        )
    )  # fmt: skip
    tokenizer = word_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "w93", TEMPLATE
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(folder / f"{assets.MODEL.name}-{assets.MODEL.version}-float32")
    texts = folder / "demo-texts-1"
    texts.mkdir()
    for name, labels in LABELS.items():
        for split in ("train", "evaluation"):
            rows = [{"text": " ".join(WORDS[i % 80 : i % 80 + 8]), "label": labels[i % 2]} for i in range(80)]
            write_lines(texts / f"{name}-{split}.jsonl", rows)
    shuffled = random.Random(0)
    tales = (" ".join(shuffled.sample(WORDS, len(WORDS))) for _ in range(400))
    (texts / "tales.txt").write_text("\n\n".join(tales), encoding="utf-8")
    return folder


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(cache))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))["executed"](path, tmp_path, timeout=300)
    kept = nbformat.read(path, as_version=4)
    assert [cell.source for cell in run.cells] == [cell.source for cell in kept.cells]
    # The same cells put something out, with the demo's model and with this one.
    said = [[bool(cell.get("outputs")) for cell in notebook.cells] for notebook in (run, kept)]
    assert said[0] == said[1]
    assert sum(said[1]) >= 2
    assert not any(output.output_type == "error" for cell in kept.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_of_code_installs_curlora_where_it_is_missing(path):
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert "%pip install" in first.source
    assert "except ImportError" in first.source
