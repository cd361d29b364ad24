"""Text that the base model writes itself, sampled from its own distribution."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from curlora.cache import cache_directory
from curlora.errors import GuardError
from curlora.text.decoding import named_ends, sample
from curlora.text.evaluating import without_adapters
from curlora.text.processes import of_first, rank_and_count
from curlora.text.progress import Shown, stage
from curlora.text.rows import Rows, longest_row
from curlora.tuner.sharded import reshard, whole
from curlora.tuner.weight import running_device

__all__ = ["own_text"]

_VERSION = "1"
_PLACEHOLDER = "curlora-placeholder"


def own_text(
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int = 8192,
    max_length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    cache: Path | Literal["default"] | None = "default",
    progress: Shown = True,
) -> Rows:
    """Sample text from the base model.

    If the tokenizer has a chat template, half of the tokens are plain text and half are chats; otherwise all are plain
    text. The model writes plain text from its beginning-of-text token. In a chat it writes the user's turn after the
    template's header (as in Magpie, https://arxiv.org/abs/2406.08464), and then the assistant's answer.

    The text is sampled at temperature 1 from the whole distribution, without top-k or top-p, whatever the model's
    generation configuration says. Therefore the mean rise of the negative log-likelihood of the drawn tokens, from the
    base model to another model, is an unbiased estimate of the KL divergence ``KL(base || other)`` on such text, in
    nats per token. Tokens that were not drawn do not count: a row's first token, and those that the chat template adds
    around a turn (:attr:`Rows.counted <curlora.text.rows.Rows>`).

    PEFT adapters are disabled during sampling. The model and torch's random generators are left unchanged. For a given
    seed the rows do not depend on ``batch_size``, except for rounding. With ``torch.distributed``, every process has to
    call this function, and all get the rows of the first.

    Args:
        model: a causal language model of transformers, on any device, or a PEFT model of one.
        tokenizer: the model's tokenizer.
        tokens: the smallest number of tokens in all rows together. The last row may exceed it.
        max_length: the largest number of tokens in a row. A row is shorter if the model ends it.
        batch_size: the number of rows that are generated together.
        seed: the seed of the sampling.
        cache: a folder in which the rows are stored, as a safetensors file of about 9 bytes per token. Rows of the same
            model, tokenizer and options are then read instead of sampled again. ``"default"`` is a folder in
            ``CURLORA_CACHE_DIR`` or in the user's cache directory. With ``None``, or if the folder cannot be written
            to, nothing is stored.
        progress: whether to show a progress bar, or a function that shows it, see
            :data:`curlora.text.progress.Shown`.

    Returns:
        Rows of tokens on the CPU, with the mask of the drawn tokens.

    Raises:
        GuardError: if the model is an encoder-decoder or cannot generate, if adapters are merged into it, if its
            predictions are not finite, if the tokenizer has no token to begin with, or if an option is out of range.
    """
    reshard(model)
    plain: Any = extract_model_from_parallel(model)
    base: Any = getattr(plain, "get_base_model", lambda: plain)()
    _check(base, tokens, max_length, batch_size)
    layout = _layout(base, tokenizer, max_length)
    device = running_device(base)
    folder = cache_directory() / "own-text" if cache == "default" else cache
    # Not the template's header, because it may contain the date.
    asked = [_VERSION, tokens, max_length, seed, layout.begin, layout.ends, layout.turn_ends]
    digest = "" if folder is None else _digest(base, tokenizer, asked)
    path = Path(folder) / f"{digest[:32]}.safetensors" if folder is not None and digest else None
    found = of_first(None if path is None or rank_and_count()[0] else _load(path, digest), device)
    if found is None:
        with without_adapters(plain), stage(progress, f"the model writes {tokens:,} tokens", tokens) as advance:
            found = _written(plain, layout, tokens, max_length, batch_size, seed, device, advance)
        if path is not None and not rank_and_count()[0]:
            _save(path, digest, found)
    return Rows((row for row, _ in found), (drawn for _, drawn in found))


class _Layout(NamedTuple):
    """The tokens that begin and end rows and turns.

    Args:
        begin: the tokens that a plain text begins with.
        ends: the tokens that end a plain text.
        header: the tokens before a user's turn; empty if the tokenizer has no usable chat template.
        turn_ends: the tokens that end a turn.
        between: the tokens from the end of the user's turn, inclusive, to the answer.
        pad: the token to pad with; any token will do.
    """

    begin: list[int]
    ends: list[int]
    header: list[int]
    turn_ends: list[int]
    between: list[int]
    pad: int


def _layout(base: Any, tokenizer: Any, max_length: int) -> _Layout:
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise GuardError(
            "The tokenizer has neither a beginning-of-text nor an end-of-text token for the model to begin with: set "
            "tokenizer.bos_token."
        )
    ends = named_ends(base) | ({tokenizer.eos_token_id} - {None})
    pad = first if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    chat = _chat(tokenizer, max_length)
    if chat is None:
        return _Layout([first], sorted(ends), [], [], [], pad)
    header, between = chat
    # The end of a turn does not end a plain text, because such a text may continue as a chat.
    return _Layout([first], sorted(ends - {between[0]}), header, sorted(ends | {between[0]}), between, pad)


def _chat(tokenizer: Any, max_length: int) -> tuple[list[int], list[int]] | None:
    """Return the tokens that the chat template puts before a user's turn, and those from its end to the answer.

    ``None`` if there is no usable template: it fails, the model cannot end a turn with one special token, or the
    template takes more than half of ``max_length``.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": _PLACEHOLDER}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise any exception
        return None
    header, *others = text.split(_PLACEHOLDER)
    if len(others) != 1:
        return None
    before, between = (
        # No space at the end of the header, because a word's first token includes the space before it.
        list(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (header.rstrip(" "), others[0].lstrip())
    )
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    if not before or not between or between[0] not in special or len(before) + len(between) > max_length // 2:
        return None
    return before, between


def _check(base: Any, tokens: int, max_length: int, batch_size: int) -> None:
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise GuardError(
            f"{type(base).__name__} is an encoder-decoder, which cannot write text without an input. Use a causal "
            "language model."
        )
    if not hasattr(base, "generate") or getattr(base, "generation_config", None) is None:
        raise GuardError(f"{type(base).__name__} cannot generate text. Use a causal language model of transformers.")
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in base.modules()):
        raise GuardError("The model has merged adapters, so the base model cannot write text: unmerge first.")
    if tokens < 1 or max_length < 2 or batch_size < 1:
        raise GuardError(
            f"tokens and batch_size must be at least 1 and max_length 2, got {tokens}, {batch_size} and {max_length}."
        )
    most = longest_row(config)
    if most is not None and max_length > most:
        raise GuardError(f"max_length is {max_length:,} and the model has {most:,} positions: give a lower max_length.")


_Row = tuple[Tensor, Tensor]


def _written(
    model: Any, layout: _Layout, tokens: int, max_length: int, batch_size: int, seed: int, device: torch.device,
    advance: Any,
) -> list[_Row]:  # fmt: skip
    rows: list[_Row] = []
    kinds = [_text, _conversation] if layout.header else [_text]
    left = tokens
    for i, write in enumerate(kinds):
        goal, number = left // (len(kinds) - i), 0
        while goal > 0:
            count = min(batch_size, -(-goal // max_length))
            # A row's number determines its draws. Texts, users' turns and answers have different numbers (modulo 3).
            batch = write(model, layout, range(3 * number, 3 * (number + count), 3), max_length, seed)
            number += count
            # Rounding may differ between processes. All use the rows of the first, so that they stop together.
            for row, drawn in of_first(batch, device):
                if goal > 0:
                    rows.append((row, drawn))
                    goal, left = goal - len(row), left - len(row)
                    advance(len(row))
    return rows


def _text(model: Any, layout: _Layout, numbers: Sequence[int], max_length: int, seed: int) -> list[_Row]:
    begin, ends = layout.begin, frozenset(layout.ends)
    found = sample(
        model, [begin] * len(numbers), numbers=numbers, ends=ends, pad=layout.pad,
        max_new_tokens=max_length - len(begin), seed=seed,
    )  # fmt: skip
    return [_row((begin, False), (new, True)) for new in found]


def _conversation(model: Any, layout: _Layout, numbers: Sequence[int], max_length: int, seed: int) -> list[_Row]:
    header, between, ends = layout.header, layout.between, frozenset(layout.turn_ends)
    turns = sample(
        model, [header] * len(numbers), numbers=[number + 1 for number in numbers], ends=ends, pad=layout.pad,
        max_new_tokens=max_length - len(header), seed=seed,
    )  # fmt: skip
    # A turn that was cut off, or that leaves no room for an answer, gets none.
    answered = {
        number: [*header, *turn, *between[1:]]
        for number, turn in zip(numbers, turns, strict=True)
        if turn[-1] == between[0] and len(header) + len(turn) + len(between) - 1 < max_length
    }
    answers: dict[int, list[int]] = {}
    if answered:
        shortest = min(map(len, answered.values()))
        found = sample(
            model, list(answered.values()), numbers=[number + 2 for number in answered], ends=ends, pad=layout.pad,
            max_new_tokens=max_length - shortest, seed=seed,
        )  # fmt: skip
        answers = dict(zip(answered, found, strict=True))
    rows = []
    for number, turn in zip(numbers, turns, strict=True):
        parts = [(header, False), (turn, True)]
        if number in answers:
            parts += [(between[1:], False), (answers[number][: max_length - len(answered[number])], True)]
        rows.append(_row(*parts))
    return rows


def _row(*parts: tuple[list[int], bool]) -> _Row:
    tokens = torch.tensor([token for part, _ in parts for token in part], dtype=torch.int64, device="cpu")
    drawn = torch.tensor([drawn for part, drawn in parts for _ in part], dtype=torch.bool, device="cpu")
    return tokens, drawn


_ENTRIES = 16  # entries of each weight, at most, that identify a model


def _digest(base: nn.Module, tokenizer: Any, asked: Any) -> str:
    """Return a digest of everything that determines the rows; empty if all weights are on the meta device."""
    config: Any = base.config
    about = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "use_cache")}
    words = [len(tokenizer), getattr(tokenizer, "chat_template", None)]
    digest = hashlib.sha256(json.dumps([about, words, asked], sort_keys=True, default=str).encode())
    seen = 0
    for name, parameter in _weights(base):
        weight = whole(parameter.detach())
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if not weight.is_meta and weight.numel():
            entries = weight.reshape(-1)[:: -(-weight.numel() // _ENTRIES)]
            digest.update(entries.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            seen += 1
    return digest.hexdigest() if seen else ""


def _weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's own parameters with their names, without the wrappers and adapters of PEFT."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        within = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        assert isinstance(within, nn.Module)
        module = within
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


def _load(path: Path, digest: str) -> list[_Row] | None:
    """Read rows from a file; return ``None`` if it is missing, damaged or has another digest."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("curlora_own_text") != digest:
                return None
            tokens, drawn, lengths = (file.get_tensor(name) for name in ("tokens", "drawn", "lengths"))
        split = lengths.tolist()
        return list(zip(tokens.long().split(split), drawn.bool().split(split), strict=True))
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError):
        return None


def _save(path: Path, digest: str, rows: list[_Row]) -> None:
    """Write rows to a file, if possible. The file is replaced at once, so no reader sees a partial one."""
    lengths = torch.tensor([len(row) for row, _ in rows], device="cpu")
    state = {
        "tokens": torch.cat([row for row, _ in rows]),
        "drawn": torch.cat([d for _, d in rows]),
        "lengths": lengths,
    }
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
        os.close(handle)
        save_file(state, partial, {"curlora_own_text": digest})
        os.replace(partial, path)
        partial = None
    except (OSError, SafetensorError):
        return
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
