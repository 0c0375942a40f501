"""Train the tiny Llama of the tests on the standard library's sources, and save it as a Hugging Face folder.

    python tests/train_tiny.py --out tests/data/tiny-llama
    python tests/train_tiny.py --held-out FOLDER    # no training: writes the files that the model never saw

0.9M parameters, trained length 256, minutes on two CPU cores. Everything is seeded, but the sources differ
between Python releases, so that another release gives another, equally useful, model. One source file in
sixteen is held out by a hash of its name; `training.json` beside the weights lists those files and the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
VOCABULARY = 1024
BATCH = 8
STEPS = 3000
WARMUP = 150
PEAK_RATE = 3e-3
SEED = 1
SAVED = Path(__file__).parent / "data" / "tiny-llama"
END = "<|endoftext|>"
# Test suites, tables of characters and generated text: much volume, little that reads like a program.
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "lib2to3"}


def source_files(library: Path) -> list[Path]:
    """The library's Python sources worth reading, relative to it, in a fixed order."""
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = (f for f in files if not SKIPPED & set(f.parts[:-1]) and not f.name.startswith("_sysconfigdata"))
    return sorted(f for f in kept if (library / f).stat().st_size > 0)


def is_held_out(file: Path) -> bool:
    """One file in sixteen, by its name alone: the same files in every Python release."""
    return zlib.crc32(file.as_posix().encode()) % 16 == 0


def write_held_out(library: Path, folder: Path) -> list[Path]:
    """Write what the saved model never saw, as far as this Python has it, into `folder`; returns the files written."""
    record = json.loads((SAVED / "training.json").read_text(encoding="utf-8"))
    sources = {folder / name: library / name for name in record["held_out_files"] if (library / name).is_file()}
    for file, source in sources.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.read_text(encoding="utf-8", errors="replace"), encoding="utf-8")
    return list(sources)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries; any UTF-8 text goes in and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def as_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts as one row of token ids, int64 [tokens], each text followed by the end token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return torch.tensor([token for text in encoded for token in (*text.ids, end)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Four layers, four query heads of 32 on two key-value heads, tied embeddings; float32."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(steps - WARMUP, 1)
    return PEAK_RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def crops(stream: Tensor, steps: int) -> Iterator[Tensor]:
    """`steps` batches of windows that start anywhere, int64 [BATCH, CONTEXT]."""
    generator = torch.Generator().manual_seed(SEED)
    windows = stream.unfold(0, CONTEXT, 1)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (BATCH,), generator=generator)]


def train(model: LlamaForCausalLM, stream: Tensor, steps: int) -> float:
    """Train in place; returns the mean loss (nats per token) of the last hundred steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(crops(stream, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {left / 60:.1f} min left", flush=True)
    model.eval()
    return sum(losses[-100:]) / len(losses[-100:])


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Mean loss over disjoint windows of the trained length, nats per token."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(BATCH)]
    return float(sum(losses)) / len(windows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights rounded to float16 to halve the file; the config says float32, so that they load as that."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Llama of the tests.")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path, help="train, and write the model into this folder")
    goal.add_argument("--held-out", type=Path, help="write the files that the saved model never saw into this folder")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches of {BATCH} x {CONTEXT} tokens")
    options = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    if options.held_out is not None:
        print(f"{len(write_held_out(library, options.held_out))} files in {options.held_out}")
        return
    torch.manual_seed(SEED)

    files = source_files(library)
    held_out = [file for file in files if is_held_out(file)]
    read = [(library / file).read_text(encoding="utf-8", errors="replace") for file in files]
    texts = [text for file, text in zip(files, read, strict=True) if not is_held_out(file)]
    rest = [text for file, text in zip(files, read, strict=True) if is_held_out(file)]
    tokenizer = train_tokenizer(texts)
    stream, held_out_stream = as_stream(texts, tokenizer), as_stream(rest, tokenizer)
    print(f"{len(texts)} files, {len(stream):,} tokens; held out {len(rest)} files, {len(held_out_stream):,} tokens")

    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads", flush=True)
    loss = train(model, stream, options.steps)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        "steps": options.steps,
        "tokens_per_step": BATCH * CONTEXT,
        "training_loss": round(loss, 4),
        "held_out_loss": round(held_out_loss(model, held_out_stream), 4),
        "held_out_files": [file.as_posix() for file in held_out],
    }
    save(model, tokenizer, options.out)
    text = json.dumps(record, indent=2) + "\n"
    (options.out / "training.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
