"""What `print` says of a model, a session, a patch and their results."""

from __future__ import annotations

import torch

from ropewalk.engine.completion import Completion, Score, Token, Usage
from ropewalk.engine.patches.patch import patch
from ropewalk.engine.sampling import SamplingParams


def test_a_model_prints_its_description(model):
    assert str(model) == model.describe()
    assert repr(model) == f"<Model {model.name}, rope {str(model.rope)!r}>"


def test_a_session_prints_what_it_holds_and_how_its_text_ends(model):
    text = "def first(x):\n    return x\n\n" + "value = first(1)\n" * 5
    with model.session() as session:
        assert "0 tokens in the cache, 0 characters" in str(session)
        session.append(text)
        printed = str(session)
        assert f"{session.tokens} tokens in the cache, {len(text)} characters" in printed
        assert repr("..." + text[-60:]) in printed
        assert model.name in printed and str(model.rope) in printed
        assert len(printed.splitlines()) == 4
        assert repr(session) == f"<Session of {model.name}, {session.tokens} tokens held>"


def test_a_patch_prints_its_description_until_it_is_undone(llama):
    handle = patch(llama, "yarn:4")
    assert str(handle) == handle.describe()
    assert repr(handle) == "<PatchHandle 'yarn:4', active>"
    handle.undo()
    assert str(handle) == "the patch yarn:4, undone"
    assert repr(handle) == "<PatchHandle 'yarn:4', undone>"


def test_a_completion_prints_its_text_and_how_it_ended(model):
    completion = model.generate("def ", SamplingParams(max_new_tokens=5, temperature=0, logprobs=2))
    first, _, last = str(completion).rpartition("\n")
    assert first == completion.text
    assert last == f"[5 tokens after a prompt of {completion.usage.prompt_tokens}; finish_reason 'length']"


def test_the_repr_of_results_has_no_lists():
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    completion = Completion(
        text="ab", token_ids=[7, 8], finish_reason="stop", usage=usage, logprobs=[Token(id=7), Token(id=8)]
    )
    assert "[" not in repr(completion)
    assert "text='ab'" in repr(completion) and "finish_reason='stop'" in repr(completion)
    score = Score(token_ids=[1, 2, 3], logprobs=torch.tensor([-1.0, -2.0]), text_bytes=3)
    assert str(score) == "1.5000 nats a token over 2 tokens (perplexity 4.482, 1.443 bits a byte)"
    assert repr(score) == f"<Score {score}>"


def test_the_score_of_one_token_says_that_there_is_none():
    assert "no" in str(Score(token_ids=[1], logprobs=torch.empty(0), text_bytes=1))
