"""Text that the base model writes: sampled from its unchanged distribution, and cached."""

import math
import multiprocessing
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import GenerationConfig, LlamaModel, T5Config, T5ForConditionalGeneration

from curlora.guard import GuardError, own_text
from curlora.text.decoding import draw
from tests.models import WORDS, curlora, gpt2, llama, multimodal, word_tokenizer

# None of these words is the beginning of another word.
BEGIN, TURN, TURN_END, END = "w90", "w91", "w92", "w93"
TEMPLATE = (
    "{% for message in messages %}w91 {{ message['role'] }} {{ message['content'] }} w92 {% endfor %}"
    "{% if add_generation_prompt %}w91 w94 {% endif %}"
)
NAMED_END = 2  # the end token of the tiny model's generation configuration


def tokenizer(template=TEMPLATE):
    made = word_tokenizer()
    made.add_special_tokens({"bos_token": BEGIN, "eos_token": END, "additional_special_tokens": [TURN_END]})
    made.chat_template = template
    return made


def number(word):
    return WORDS.index(word) + 2


def talkative(seed=0, scale=10):
    """A model with larger weights, so that its predictions are far from uniform."""
    model = llama(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return model


def write(model, words=None, **options):
    given = {"tokens": 300, "max_length": 16, "batch_size": 8, "cache": None, "progress": False, **options}
    return own_text(model, words or tokenizer(), **given)


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_there_are_as_many_tokens_as_asked_for_in_rows_of_both_kinds():
    rows = write(llama(), tokens=600)
    assert all(row.dtype == torch.int64 and row.ndim == 1 and 2 <= len(row) <= 16 for row in rows)
    assert 600 <= sum(map(len, rows)) < 616
    texts, chats = (sum(len(row) for row in rows if row[0] == number(first)) for first in (BEGIN, TURN))
    assert texts + chats == sum(map(len, rows))
    assert 300 <= texts < 316
    assert 600 - 16 - 300 < chats < 316


def test_texts_end_at_their_end_and_nowhere_else():
    rows = [row for row in write(llama(), tokens=4000, batch_size=128) if row[0] == number(BEGIN)]
    ends = [((row == number(END)) | (row == NAMED_END)).nonzero().flatten().tolist() for row in rows]
    short = [row for row in rows if len(row) < 16]
    assert short, "some should come to an end"
    assert all(found in ([], [len(row) - 1]) for found, row in zip(ends, rows, strict=True))
    assert {int(row[-1]) for row in short} == {number(END), NAMED_END}
    # The end of a turn does not end a plain text.
    assert any((row[:-1] == number(TURN_END)).any() for row in rows)


def test_chats_are_laid_out_as_the_template_has_it():
    rows = write(llama(), tokens=4000, max_length=24, batch_size=64)
    words = tokenizer()
    header = words("w91 user", add_special_tokens=False)["input_ids"]
    ends = {number(TURN_END), number(END), NAMED_END}
    answered = 0
    for row, drawn in zip(rows, rows.counted, strict=True):
        assert drawn.shape == row.shape
        if row[0] == number(BEGIN):
            assert drawn.tolist() == [False] + [True] * (len(row) - 1)
            continue
        assert row[:2].tolist() == header
        turn = next((i for i in range(2, len(row)) if int(row[i]) in ends), len(row))
        expected = [False] * 2 + [True] * (turn - 1)
        if len(row) > turn + 1:
            assert row[turn] == number(TURN_END)
            user = words.decode(row[2:turn])
            laid_out = words.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True)
            begin = len(laid_out["input_ids"])
            assert row[:begin].tolist() == laid_out["input_ids"]
            assert len(row) > begin
            assert all(int(token) not in ends for token in row[begin:-1])
            assert len(row) == 24 or int(row[-1]) in ends
            expected += [False] * (begin - turn - 1) + [True] * (len(row) - begin)
            answered += 1
        assert drawn.tolist() == expected[: len(row)]
    assert answered > 10


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "w91 {{ messages[0]['role'] }} w92",  # the user's message is missing
        "w91 {% for m in messages %}{{ m['content'] }} w20 {% endfor %}",  # the end of a turn is an ordinary word
        "{% for m in messages %}{{ m['content'] }} w92 {% endfor %}",  # no header before a turn
        "w91 w91 w91 w91 w91 w91 w91 w91 {% for m in messages %}{{ m['content'] }} w92 {% endfor %}",  # half a row long
    ],
)
def test_a_template_in_which_a_turn_cannot_be_written_is_left_out(template):
    rows = write(llama(), tokenizer(template))
    assert 300 <= sum(map(len, rows)) < 316
    assert all(row[0] == number(BEGIN) for row in rows)
    assert all(not (row[:-1] == number(END)).any() for row in rows)


def test_without_a_first_token_the_last_begins_a_text():
    words = tokenizer(None)
    words.bos_token = None
    assert all(row[0] == number(END) for row in write(llama(), words))
    words.eos_token = None
    with pytest.raises(GuardError, match=r"neither a beginning-of-text nor an end-of-text token.*set tokenizer.bos"):
        write(llama(), words)


def test_the_mean_rise_of_its_loss_is_the_divergence():
    """Against the exact divergence at every position, by its standard error over rows."""
    base, changed = talkative().double(), talkative().double()
    rng = torch.Generator().manual_seed(5)
    for parameter in changed.parameters():
        parameter.data += 0.04 * parameter.std() * torch.randn(parameter.shape, generator=rng).double()
    rows = write(base, tokens=8_000, batch_size=256)
    differences, divergence, count, plain = [], 0.0, 0, 0.0
    with torch.no_grad():
        for row, drawn in zip(rows, rows.counted, strict=True):
            old, new = (model(row[None]).logits[0, :-1].log_softmax(-1) for model in (base, changed))
            exact = kl_div(new, old, reduction="none", log_target=True).sum(-1)
            rise = cross_entropy(new, row[1:], reduction="none") - cross_entropy(old, row[1:], reduction="none")
            mask = drawn[1:]
            differences.append(float((rise - exact)[mask].sum()))
            divergence, count = divergence + float(exact[mask].sum()), count + int(mask.sum())
            plain += float(rise[mask].sum())
    differences = torch.tensor(differences)
    error = float(differences.std() * math.sqrt(len(differences)))
    assert divergence > 5 * error, "the test should be able to tell"
    assert abs(float(differences.sum())) < 3 * error
    assert plain / count == pytest.approx(divergence / count, abs=3 * error / count)


def test_first_tokens_are_as_frequent_as_they_are_probable():
    model = talkative(scale=5)
    rows = write(model, tokenizer(None), tokens=8000, max_length=2, batch_size=512)
    with torch.no_grad():
        p = model(torch.tensor([[number(BEGIN)]])).logits[0, 0].double().softmax(-1)
    found = torch.bincount(torch.tensor([int(row[1]) for row in rows]), minlength=len(p)).double()
    expected = p * len(rows)
    large = expected > 5
    assert large.sum() > 10
    chi_square = float(((found - expected)[large].square() / expected[large]).sum())
    freedom = int(large.sum())
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    p = torch.tensor([0.2, 0.0, 0.5, 0.3]).repeat(6, 1)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert draw(p, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_the_models_way_of_generating_does_not_matter():
    plain, model = write(talkative()), talkative()
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=5.0,
        max_new_tokens=2,
        num_beams=3,
        eos_token_id=NAMED_END,
    )
    own = model.generation_config
    assert same(write(model), plain)
    assert model.generation_config is own
    assert len({tuple(row.tolist()) for row in plain}) > len(plain) // 2


def test_a_seed_decides_and_batches_do_not():
    rows = write(talkative())
    assert same(rows, write(talkative()))
    assert same(rows, write(talkative(), batch_size=3))
    other = write(talkative(), seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(rows, other, strict=False) if len(a) > 4)


def test_generators_stay_as_they_are():
    model = llama()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    write(model)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", ["curlora", "lora", "norms", "injected"])
def test_an_adapter_is_left_out_and_the_model_left_as_it_was(kind):
    expected = write(talkative())
    if kind == "curlora":
        model = curlora(talkative())
    else:
        modules = ["q_proj", "lm_head"] if kind == "lora" else ["q_proj"]
        config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        config.modules_to_save = ["norm"] if kind == "norms" else None
        if kind == "injected":
            inject_adapter_in_model(config, model := talkative())
        else:
            model = get_peft_model(talkative(), config)
        if kind == "norms":
            model.base_model.model.model.norm.modules_to_save["default"].weight.data.fill_(5.0)
    model.gradient_checkpointing_enable()
    model.train()
    getattr(model, "get_base_model", lambda: model)().model.norm.eval()
    ids = torch.tensor([[5, 7, 9]])
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    modes, before = [module.training for module in model.modules()], model(ids).logits
    assert same(write(model), expected)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(model(ids).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing"))


def no_sampling(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("it was sampled again")

    monkeypatch.setattr(sys.modules["curlora.text.own_text"], "sample", fail)  # a function has the module's name


def test_it_is_kept(tmp_path, monkeypatch):
    rows = write(talkative(), cache=tmp_path / "new" / "folder")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.suffix == ".safetensors"
    no_sampling(monkeypatch)
    again = write(talkative(), cache=tmp_path / "new" / "folder", batch_size=5)
    assert same(rows, again)
    assert same(rows.counted, again.counted)
    assert same(rows, write(curlora(talkative()), cache=tmp_path / "new" / "folder"))  # the same base


def test_the_users_cache_is_where_the_demos_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path))
    rows = own_text(talkative(), tokenizer(), tokens=50, max_length=16, progress=False)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    no_sampling(monkeypatch)
    assert same(rows, own_text(talkative(), tokenizer(), tokens=50, max_length=16, progress=False))


@pytest.mark.parametrize("what", ["weight", "one weight", "config", "template", "tokens", "max_length", "seed", "end"])
def test_what_is_kept_is_of_one_model_and_one_way_to_ask(what, tmp_path):
    write(talkative(), cache=tmp_path)
    model, words, options = talkative(), tokenizer(), {}
    if what == "weight":
        model = talkative(seed=1)
    elif what == "one weight":
        model.model.layers[1].mlp.up_proj.weight.data *= 1.001
    elif what == "config":
        model.config.rms_norm_eps = 1e-3
    elif what == "template":
        words = tokenizer(TEMPLATE + " ")
    elif what == "end":
        model.generation_config.eos_token_id = 40
    else:
        options = {"tokens": {"tokens": 301}, "max_length": {"max_length": 17}, "seed": {"seed": 1}}[what]
    write(model, words, cache=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "folder"])
def test_a_damaged_file_is_written_anew(damage, tmp_path, monkeypatch):
    rows = write(talkative(), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "foreign":
        write(talkative(), cache=tmp_path, seed=1)
        (other,) = set(tmp_path.iterdir()) - {path}
        path.write_bytes(other.read_bytes())
    elif damage == "folder":  # a file cannot replace a folder, so nothing is cached
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert same(write(talkative(), cache=tmp_path), rows)
    if damage != "folder":
        assert path.read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_can_be_kept_nothing_is(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert same(write(talkative(), cache=tmp_path / "file"), write(talkative()))
    assert (tmp_path / "file").read_text() == "in the way"


def _writer(folder, barrier):
    torch.set_num_threads(1)
    barrier.wait()
    write(talkative(), cache=folder)


def test_several_may_write_at_once(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_writer, args=(tmp_path, barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    expected = write(talkative())
    assert len(list(tmp_path.iterdir())) == 1
    no_sampling(monkeypatch)
    assert same(write(talkative(), cache=tmp_path), expected)


def test_what_cannot_write_is_refused():
    small = T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(GuardError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        write(T5ForConditionalGeneration(small))
    with pytest.raises(GuardError, match=r"LlamaModel cannot generate"):
        write(LlamaModel(llama().config))
    for short in (gpt2(), multimodal()):
        with pytest.raises(GuardError, match=r"max_length is 65 and the model has 64 positions"):
            write(short, max_length=65)
    merged = curlora(llama())
    merged.merge_adapter()
    with pytest.raises(GuardError, match=r"merged adapters.*unmerge first"):
        write(merged)
    broken = llama()
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(GuardError, match=r"predictions are not finite"):
        write(broken)


@pytest.mark.parametrize("option", [{"tokens": 0}, {"max_length": 1}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(GuardError, match="must be at least 1 and max_length 2"):
        write(llama(), **option)


def test_learned_positions_are_counted_from_a_rows_first_token():
    """Chats of different lengths are padded and answered in one batch."""
    rows = write(gpt2(), max_length=24, tokens=600)
    assert same(rows, write(gpt2(), max_length=24, tokens=600, batch_size=1))
