"""What the tests of a patch share: a text, scalers that replace the attention function, and a forward pass."""

import torch

SPECS = ["logn", "rerope:20", "yarn:2|rerope:20|logn", "dynamic-ntk"]
IDS = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def read(model, ids=IDS, **inputs):
    """The logits of a text, [B, N, V]."""
    return model(input_ids=ids, **inputs).logits
