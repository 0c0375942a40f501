"""A model of text that can only copy: what it knows comes from its context."""

import torch

VOCABULARY = 5000


def copier(ids):
    """Sure that what followed a token the last time follows it again; knows nothing of new tokens."""
    logits, followed = torch.zeros(len(ids), VOCABULARY), {}
    for i, token in enumerate(ids):
        if token in followed:
            logits[i, followed[token]] = 100.0
        if i + 1 < len(ids):
            followed[token] = ids[i + 1]
    return logits
