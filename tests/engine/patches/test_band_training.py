"""Training under position maps and temperatures: gradients equal those of the reference, and the Trainer works."""

import pytest
import torch
from families import FAMILIES
from long_text import IDS, MAPS, beyond_reach
from serving import difference, literal_attention
from transformers import Trainer, TrainingArguments

import ropewalk as rw

pytestmark = beyond_reach


@pytest.mark.parametrize("spec", [*MAPS, "sink-window:40", "ntk:4|rerope:20|logn", "yarn:4|dual-chunk|temperature:1.2"])
def test_gradients_equal_those_of_the_reference(llama64, spec):
    ids = IDS[:, :120]

    def gradients():
        llama64.zero_grad()
        llama64(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in llama64.named_parameters()}

    with rw.patch(llama64, spec, length=120 if "jet" in spec else None):
        ours = gradients()
        with literal_attention():
            twins = gradients()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        assert difference(gradient, twins[name]) < 1e-9, name


def loss(model):
    """The loss in float64. The loss of transformers rounds the logits to float32."""
    return torch.nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


@pytest.mark.parametrize("spec", ["logn", "yarn:4", "yarn:4|logn", "temperature:1.3"])
def test_gradients_of_the_simpler_tiers_equal_finite_differences(llama64, spec):
    weight = llama64.model.layers[0].self_attn.q_proj.weight
    with rw.patch(llama64, spec):
        llama64.zero_grad()
        loss(llama64).backward()
        direction = weight.grad / weight.grad.norm()  # the direction of the largest change, far above rounding
        losses = []
        with torch.no_grad():
            for step in (1e-3, -1e-3):  # the norms of Llama are float32
                weight += step * direction
                losses.append(loss(llama64))
                weight -= step * direction
        assert float((weight.grad * direction).sum()) == pytest.approx(float(losses[0] - losses[1]) / 2e-3, rel=1e-2)


def test_transformers_trainer_trains_a_patched_model(tmp_path):
    model = FAMILIES["llama"]()
    rows = [{"input_ids": IDS[0, i : i + 90], "labels": IDS[0, i : i + 90]} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    with rw.patch(model, "rerope:20|logn"):
        with torch.no_grad():
            before = model(input_ids=IDS[:, :90], labels=IDS[:, :90]).loss
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        model.eval()
        with torch.no_grad():
            assert model(input_ids=IDS[:, :90], labels=IDS[:, :90]).loss < before - 0.1
        with pytest.warns(UserWarning, match="without the patch"):
            model.save_pretrained(tmp_path / "saved")
    assert "ropewalk" not in (tmp_path / "saved" / "config.json").read_text()
