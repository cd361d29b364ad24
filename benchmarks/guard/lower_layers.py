"""Compute the outputs of the frozen lower layers once, so that a study runs only the layers above them."""

import torch
from torch import nn


@torch.no_grad()
def states_below(model, below, sequences):
    """Return the hidden states that enter layer ``below``, for each sequence."""
    layers, norm = model.model.layers, model.model.norm
    model.model.layers, model.model.norm = nn.ModuleList(list(layers)[:below]), nn.Identity()
    states = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for begin in range(0, len(order), 32):
        chosen = order[begin : begin + 32]
        ids, mask = torch.zeros(2, len(chosen), max(len(sequences[i]) for i in chosen), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, : len(sequences[i])], mask[row, : len(sequences[i])] = torch.tensor(sequences[i]), 1
        found = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, i in enumerate(chosen):
            states[i] = found[row, : len(sequences[i])].clone()
    model.model.layers, model.model.norm = layers, norm
    return states


def kept(model, below, data, path):
    """Replace each token of ``data`` by the index of its state, add the table of ``states``, and save the data."""
    states = states_below(model, below, [row for part in data.values() for row in part["rows"]])
    begin = 0
    for part in data.values():
        for number, row in enumerate(part["rows"]):
            part["rows"][number] = torch.arange(begin, begin + len(row))
            begin += len(row)
    data["states"] = torch.cat(states)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, path)
    return data
