"""Threads and the precision of products, as a recipe states them."""

import pytest
import torch

from curlora.continual import load_recipe, run_recipe
from curlora.continual.computing import computing, fp32_products
from curlora.continual.errors import RunError

FORWARD = torch.nn.functional.linear


def test_all_is_as_before_afterwards():
    before = torch.get_num_threads(), fp32_products()
    with computing(1, "bfloat16"):
        assert (torch.get_num_threads(), fp32_products()) == (1, "bfloat16")
    assert (torch.get_num_threads(), fp32_products()) == before == (before[0], "float32")


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    with computing(None, "float32"):
        assert fp32_products() == "float32"
    with pytest.raises(RunError, match=r"needs PyTorch 2.9 or newer"), computing(None, "bfloat16"):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        ["training.fp32_products=bfloat16"],
        ["protocol=paper", "reference={fp32_products: bfloat16}"],
    ],
)
def test_a_run_computes_so_and_says_it(recipe_path, tmp_path, monkeypatch, changes):
    seen = set()

    def linear(*arguments):
        seen.add(fp32_products())
        return FORWARD(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    results = run_recipe(load_recipe(recipe_path, ["training.epochs=1", *changes]), tmp_path / "run")
    assert seen == {"bfloat16"}
    assert results.environment["products of float32"] == "in bfloat16"
    assert results.settings["fp32_products"] == "bfloat16"
