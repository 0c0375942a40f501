"""What tests on the pretended GPU share: models there, the paths of the API, and what a token costs."""

import itertools
from contextlib import contextmanager

import torch
from live import MORE, TEXT, greedy
from pretend_cuda import move
from transformers import AutoModelForCausalLM

import ropewalk as rw

LONG = (TEXT + MORE) * 6  # beyond the trained length


def on_gpu(folder, dtype):
    return move(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def check_a_token_waits_once(here, there, cuda, monkeypatch):
    """The model on the device computes what the one on the CPU does. A token costs one wait, and one upload."""
    with cuda.aside():
        scores, expected = here.score(LONG).logprobs, here.generate(LONG, greedy(6)).text
    torch.testing.assert_close(there.score(LONG).logprobs, scores, atol=1e-4, rtol=0)
    with steps_counted(there, cuda, monkeypatch) as counts:
        assert there.generate(LONG, greedy(6)).text == expected
    assert counts == [(1, 1)] * len(counts) and len(counts) >= 3  # the token


@contextmanager
def steps_counted(model, cuda, monkeypatch):
    """A list of the waits and uploads from each step to the next."""
    marks, counts, step = [], [], model._runner.step

    def counted(rows):
        marks.append((cuda.syncs.total(), cuda.uploads.total()))
        return step(rows)

    with monkeypatch.context() as patch:
        patch.setattr(model._runner, "step", counted)
        yield counts
    counts += [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(marks)]


def generated(model):
    params = rw.SamplingParams(
        max_new_tokens=6, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3, logprobs=2
    )
    return model.generate(TEXT, params).token_ids


def batch(model):
    return [answer.text for answer in model.generate([TEXT, TEXT + MORE, MORE], greedy(4))]


def contexts(model):
    return model.generate("def f(", greedy(4), contexts=[TEXT, MORE]).text


def session(model):
    one = model.session()
    one.append(LONG)
    texts = [one.generate("\ndef ", greedy(4)).text]
    other = one.fork()
    texts.append(other.generate("x", greedy(3)).text)
    model.rope = "yarn:4"
    texts.append(one.generate("y", greedy(3)).text)
    one.crop(100)
    return [*texts, one.generate("z", greedy(3)).text]


def covers(model):
    return model.generate(TEXT[:-2], greedy(4)).text, model.logprob(MORE[3:20], TEXT + MORE[:3])


def next_bytes(model):
    return model.next_byte_logprobs(TEXT[:-2]).tolist()


def descriptions(model):
    return model.fingerprint, model.checkpoint_fingerprint


def patched(model):
    ids = model.tokenizer(LONG, return_tensors="pt").input_ids.to(model.hf.device)
    with rw.patch(model.hf, "dynamic-ntk"):
        grown = model.hf.generate(ids, max_new_tokens=3, do_sample=False)
    short = torch.nn.functional.pad(ids[:, :50], (ids.shape[1] - 50, 0))
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, : ids.shape[1] - 50] = 0
    with rw.patch(model.hf, "rerope:64|logn"):
        two = model.hf.generate(torch.cat([ids, short]), attention_mask=mask, max_new_tokens=3, do_sample=False)
    with rw.patch(model.hf, "logn"):
        tempered = model.hf.generate(torch.cat([ids, short]), attention_mask=mask, max_new_tokens=3, do_sample=False)
    return grown.tolist(), two.tolist(), tempered.tolist()


PATHS = (generated, batch, contexts, session, covers, next_bytes, descriptions, patched)
