"""Changes of a model in memory that its config and weights do not show, each with the words of the refusal."""

import types

import torch
from torch import nn
from transformers import LlamaForCausalLM


def layer(model, number=1):
    return model.model.layers[number]


def replace_a_forward(model):
    module = layer(model).mlp
    module.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), module)


def hook_a_module(model):
    layer(model).register_forward_hook(lambda _module, _args, out: out * 1.2)


def hook_an_input(model):
    layer(model).mlp.register_forward_pre_hook(lambda _module, args: (args[0] * 1.2,))


def hook_the_model(model):
    def louder(_module, _args, out):
        out.logits = 1.1 * out.logits

    model.register_forward_hook(louder)


def replace_an_activation(model):
    layer(model).mlp.act_fn = nn.GELU()


def replace_a_module_by_one_of_the_same_weights(model):
    class Clipped(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(-0.01, 0.01)

    old = layer(model).mlp.down_proj
    layer(model).mlp.down_proj = Clipped(old.in_features, old.out_features, bias=False)
    layer(model).mlp.down_proj.weight = old.weight


def change_an_epsilon(model):
    layer(model).input_layernorm.variance_epsilon = 0.1


def change_a_small_epsilon(model):
    model.model.norm.variance_epsilon *= 1.5


def change_a_scale(model):
    layer(model).self_attn.scaling *= 3


def change_the_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.25)


def change_the_slowest_frequency(model):
    model.model.rotary_emb.inv_freq[-1] *= 0.9


def change_the_rotation_factor(model):
    model.model.rotary_emb.attention_scaling = 1.2


def break_a_forward(model):
    layer(model).mlp.forward = lambda: None


def change_a_layer_number(model):
    layer(model).self_attn.layer_idx = 0


def edit_the_base(model):
    model.config.rope_parameters["rope_theta"] = 5e5


def edit_the_scaling(model):
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def edit_the_epsilon(model):
    model.config.rms_norm_eps = 0.1


def edit_the_activation(model):
    model.config.hidden_act = "gelu"


def derive_a_class(model):
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model.__class__ = Doubled


def use_a_layer_twice(model):
    model.model.layers[1] = model.model.layers[0]


def share_a_weight(model):
    layer(model).mlp.up_proj.weight = layer(model).mlp.gate_proj.weight


def share_storage(model):
    rows = nn.Parameter(torch.randn(600, 128))
    layer(model).mlp.up_proj.weight, layer(model).mlp.gate_proj.weight = (
        nn.Parameter(rows[:384]),
        nn.Parameter(rows[200:584]),
    )


CHANGES = {
    replace_a_forward: r"logits differ by .*; the forward of 'model\.layers\.1\.mlp' was replaced",
    hook_a_module: r"logits differ by .*; 'model\.layers\.1' has a forward hook",
    hook_an_input: r"logits differ by .*; 'model\.layers\.1\.mlp' has a forward hook",
    hook_the_model: r"logits differ by .*; the model has a forward hook",
    replace_an_activation: r"'model\.layers\.1\.mlp\.act_fn' is of the class GELU\w*, and in a new model SiLU\w*",
    replace_a_module_by_one_of_the_same_weights: r"'model\.layers\.1\.mlp\.down_proj' is of the class Clipped",
    change_an_epsilon: r"model\.layers\.1\.input_layernorm\.variance_epsilon is 0\.1, and in a new .* 1e-0\d",
    change_a_small_epsilon: r"model\.norm\.variance_epsilon is 1\.5",
    change_a_scale: r"model\.layers\.1\.self_attn\.scaling is 0\.53\d+, and in a new model of the config 0\.17",
    change_the_frequencies: r"the buffer 'model\.rotary_emb\.inv_freq' holds other numbers",
    change_the_slowest_frequency: r"the buffer 'model\.rotary_emb\.inv_freq' holds other numbers",
    change_the_rotation_factor: r"model\.rotary_emb\.attention_scaling is 1\.2",
    break_a_forward: r"does not run on a text of 48 tokens \(TypeError: .*; undo the changes",
    change_a_layer_number: r"model\.layers\.1\.self_attn\.layer_idx is 0, and in a new model of the config 1",
    edit_the_base: r"the buffer 'model\.rotary_emb\.inv_freq' holds other numbers",
    edit_the_scaling: r"model\.rotary_emb\.rope_type is 'default', and in a new model of the config 'linear'",
    edit_the_epsilon: r"variance_epsilon is 1e-0\d, and in a new model of the config 0\.1",
    edit_the_activation: r"act_fn' is of the class SiLU\w*, and in a new model GELU\w*",
    derive_a_class: r"the model is of the class Doubled, and in a new model LlamaForCausalLM",
    use_a_layer_twice: r"'model\.layers\.0\.\S+' and 'model\.layers\.1\.\S+' are the same memory.*copy\.deepcopy",
    share_a_weight: r"'model\.layers\.1\.mlp\.gate_proj\.weight' and 'model\.layers\.1\.mlp\.up_proj\.weight' are",
    share_storage: r"are the same memory",
}
