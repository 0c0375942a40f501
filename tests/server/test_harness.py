"""Our own harness measures the server as it measures the model itself."""

import numpy as np
import pytest

from ropewalk.evals.models.served import ServedModel

TEXT = "def walk(top):\n    for name in sorted(names):\n        yield name\n"


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_losses_are_those_of_the_model(model, served, tiny_folder, form, monkeypatch):
    url, _ = served
    ids = model.vocabulary.encode(TEXT * 12)
    endpoint = ServedModel(str(tiny_folder), f"{url}/v1")
    from ropewalk.evals.models import served as module

    endpoint.form = next(each for each in module.FORMS if each.name == form)
    losses = endpoint.losses(ids, 5, lambda *_: None)
    expected = -model.score_ids(ids, 5).numpy()
    assert np.abs(losses - expected).max() < 1e-5
