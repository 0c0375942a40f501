"""A tiny model whose tokens are bytes, and what several tests of perplexity do with it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ropewalk.engine.model import Model
from ropewalk.evals.data import Text
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.protocols.perplexity_cell import cells
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import parse

WORDS = "".join(f"word {n} of the text, and so on; " for n in range(60))


def byte_tokenizer(bos=False):
    """One token a byte, without training; with `bos`, a start token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_model(bos=False, uniform=False):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    hf = LlamaForCausalLM(config).eval()
    if uniform:
        torch.nn.init.zeros_(hf.lm_head.weight)
    return Model(hf, byte_tokenizer(bos), name="tiny")


def text(*documents):
    return Text(name="words", documents=documents, sha256="0" * 64)


def losses(model, ids):
    """Nats of ids[1:], by one forward pass of transformers."""
    with torch.inference_mode():
        logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()


def measure(model, cell, run):
    model.rope = cell.scaler
    return cell.measure(LocalModel(model), run, lambda past, count: None)


def run_plan(tmp_path, model, plan, *documents, scaler="none"):
    run = Run(tmp_path)
    for cell in cells(LocalModel(model), text(*documents), [parse(scaler)], plan):
        measure(model, cell, run)
    assert run.rows
    return run


def llama_cpp_nats(logits_of, tokens, n_ctx, bos=None):
    """The sum that llama.cpp's `perplexity` takes, and how many tokens are in it."""
    total, count, first = 0.0, 0, n_ctx // 2
    for chunk in range(len(tokens) // n_ctx):
        ids = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
        if bos is not None:
            ids = [bos, *ids[1:]]
        logits = torch.as_tensor(logits_of(ids)).double()
        for i in range(first, n_ctx - 1):
            total -= float(logits[i].log_softmax(-1)[ids[i + 1]])
            count += 1
    return total, count
