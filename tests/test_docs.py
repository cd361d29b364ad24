"""What the documentation tells people to type is right."""

import re
from pathlib import Path

import torch
import yaml
from peft import PeftModel

from curlora.continual import load_recipe
from tests.models import WORDS, curlora, llama, tokens, word_tokenizer

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_guards_python_runs(tmp_path, monkeypatch):
    """With a small local model in the place of the hub's."""
    llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=16)]
    names = {"general_texts": [" ".join(WORDS)] * 12, "train_dataset": rows}
    whole, measured, redrawn = blocks("guard.md", "python")
    exec(whole.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "base")), names)
    assert 0 < names["guard"].drift() <= 0.01
    moved = []

    def rise():
        pairs = zip(names["guard"].parameters, names["before"], strict=True)
        moved.append(sum(float((U - old).detach().norm()) for U, old in pairs))
        return 0.02 * moved[-1] / moved[0]

    names["perplexity_rise"] = rise
    exec(measured, names)
    assert 0 < names["scale"] < 1
    names["task_batches"] = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8).split(4)]
    for U in names["guard"].parameters:
        U.data.zero_()  # as before any training
    before = [indices.clone() for name, indices in names["model"].named_buffers() if "curlora_indices" in name]
    exec(redrawn, names)
    after = [indices for name, indices in names["model"].named_buffers() if "curlora_indices" in name]
    assert not all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert 0 < names["rise"] <= 0.01


def test_the_conversions_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = curlora(llama())
    exec(*blocks("convert.md", "python"), {"model": model})
    loaded = PeftModel.from_pretrained(llama(), "my-lora").eval()
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5)


def test_the_guards_recipe_is_one(tmp_path):
    """Put into the README's."""
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    content = yaml.safe_load(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL).group(1))
    content.update(yaml.safe_load(blocks("guard.md", "yaml")[0]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert load_recipe(tmp_path / "recipe.yaml").methods[-1].plugins[0]["max_perplexity_increase"] == 0.01


def test_the_files_they_point_to_exist():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
