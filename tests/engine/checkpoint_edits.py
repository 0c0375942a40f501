"""Changes of a checkpoint on disk."""

import json
import shutil

from safetensors.torch import load_file, save_file


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_with_tokenizer(model, folder, tokenizer_folder):
    """Save a transformers model with the tokenizer of another folder."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / file, folder)
