"""Too little memory in the middle of a text: smaller chunks are tried, then it is said, and nothing read is lost."""

import pytest
import torch

import ropewalk as rw

pytestmark = pytest.mark.usefixtures("untouched")

TEXT = "import os\n\n\ndef walk(top):\n    return [name for name in os.listdir(top)]\n\n\n" * 30
ERRORS = {
    "numpy": MemoryError("cannot allocate"),
    "torch on the CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory"),
}


def limit(monkeypatch, model, most, error=ERRORS["numpy"]):
    """No step of more than `most` tokens fits; what is too long fails when its first layer has written the cache."""
    forward, sizes = model.network.forward, []

    def limited(ids, cache, keep):
        sizes.append(len(ids))
        if len(ids) > most:
            layer = cache.layers[0]
            if layer.get_seq_length():
                layer.update(layer.keys[:, :, :5].clone(), layer.values[:, :, :5].clone())
            raise error
        return forward(ids, cache, keep=keep)

    monkeypatch.setattr(model.network, "forward", limited)
    return sizes


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_smaller_chunks_are_tried(model, monkeypatch, error):
    expected = model.score(TEXT)
    sizes = limit(monkeypatch, model, 200, error)
    found = model.score(TEXT)
    assert max(sizes) > 200 >= sizes[-1]
    assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_when_nothing_fits_it_is_said_and_the_model_goes_on(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=4, temperature=0)
    expected = model.generate(TEXT, params)
    with monkeypatch.context() as tight:
        limit(tight, model, 10)
        with pytest.raises(rw.ContextOverflow, match=r"out of memory after 0 tokens, even for \d+ at a time"):
            model.generate(TEXT, params)
    assert model.generate(TEXT, params) == expected


def test_a_session_keeps_what_it_had_read(model, monkeypatch):
    with model.session() as session:
        session.append(TEXT[:700])
        read = session.tokens
        with monkeypatch.context() as tight:
            limit(tight, model, 10)
            with pytest.raises(rw.ContextOverflow, match=f"out of memory after {read} tokens"):
                session.append(TEXT[700:])
        assert (session.text, session.tokens) == (TEXT[:700], read)
        session.append(TEXT[700:])
        params = rw.SamplingParams(max_new_tokens=4, temperature=0)
        assert session.generate("", params).token_ids == model.generate(TEXT, params).token_ids


def test_other_errors_are_not_taken_for_it(model, monkeypatch):
    limit(monkeypatch, model, 10, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        model.score(TEXT)
