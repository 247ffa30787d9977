"""Models without weights: their classes, their blocks, and what each block computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as _transformers
from transformers.models.llama import modeling_llama

from bismooth.export.errors import BismoothError
from bismooth.export.model_class import model_class
from bismooth.export.record import record_blocks
from bismooth.export.skeleton import Skeleton, build_skeleton
from tests.models import ARCHITECTURES

transformers: Any = _transformers
llama: Any = modeling_llama


def config_of(name: str, **overrides: Any) -> Any:
    class_name, arguments = ARCHITECTURES[name]
    return getattr(transformers, class_name)(**(arguments | overrides))


def kinds(skeleton: Skeleton) -> tuple[int, ...]:
    assert skeleton.blocks is not None
    return skeleton.blocks.kinds


def test_weights_have_no_storage_and_buffers_do() -> None:
    model = build_skeleton(config_of("llama")).model
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert set(buffers) == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], 10000.0 ** -(torch.arange(4) / 4))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu", "modules made later are as ever"


@pytest.mark.parametrize(
    ("name", "overrides", "expected", "traced"),
    [
        ("llama", {"num_hidden_layers": 7}, (0,) * 7, (0, 1)),
        ("llama", {"num_hidden_layers": 2}, (0, 0), ()),
        ("llama", {"num_hidden_layers": 1}, None, ()),
        ("gemma2", {"num_hidden_layers": 7}, (0, 1, 0, 1, 0, 1, 0), (0, 1, 2, 3)),
        ("gemma3", {"num_hidden_layers": 14, "layer_types": None}, (0, 0, 0, 0, 0, 1) * 2 + (0, 0), (0, 1, 5, 11)),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, (0, 1, 2), ()),
        ("bert", {"num_hidden_layers": 12}, (0,) * 12, (0, 1)),
    ],
)
def test_kinds_of_blocks(
    name: str, overrides: dict[str, Any], expected: tuple[int, ...] | None, traced: tuple[int, ...]
) -> None:
    skeleton = build_skeleton(config_of(name, **overrides))
    assert (skeleton.blocks and skeleton.blocks.kinds) == expected
    assert skeleton.short_blocks == traced
    if traced:
        assert skeleton.short_config is not None
        assert skeleton.short_config.num_hidden_layers == len(traced)


def test_the_whole_model_on_demand() -> None:
    skeleton = build_skeleton(config_of("llama"), shorten=False)
    assert kinds(skeleton) == (0, 0, 0)
    assert skeleton.short_config is None


Change = Callable[[Any, torch.Tensor], torch.Tensor]
DIFFERENCES: dict[str, Change] = {
    "a constant": lambda module, y: y * (2.0 if module.layer_idx == 3 else 1.0),
    "an operation": lambda module, y: y.relu() if module.layer_idx == 3 else y,
    "a type": lambda module, y: y.double().float() if module.layer_idx == 3 else y,
    "a tensor of the code": lambda module, y: y * torch.tensor(float(module.layer_idx // 3)),
    "an index": lambda module, y: y.roll(module.layer_idx // 3, 1),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_that_only_a_run_shows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = llama.LlamaAttention.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, *args, **kwargs)
        return DIFFERENCES[case](self, output), weights

    monkeypatch.setattr(llama.LlamaAttention, "forward", changed)
    skeleton = build_skeleton(config_of("llama", num_hidden_layers=5))
    assert kinds(skeleton)[:4] == (0, 0, 0, 1)


def test_a_parameter_of_another_block_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    init = llama.LlamaModel.__init__

    def share(self: Any, config: Any) -> None:
        init(self, config)
        self.layers[3].mlp.up_proj.weight = self.layers[2].mlp.up_proj.weight

    monkeypatch.setattr(llama.LlamaModel, "__init__", share)
    skeleton = build_skeleton(config_of("llama", num_hidden_layers=5))
    assert kinds(skeleton) == (0, 0, 0, 1, 0)
    assert skeleton.short_config is None, "the model's code cannot make a shorter one"


def with_gains(monkeypatch: pytest.MonkeyPatch, gains: list[float]) -> None:
    """Each block multiplies by a buffer that no checkpoint stores."""
    init, forward = llama.LlamaMLP.__init__, llama.LlamaMLP.forward
    numbers = iter(range(100))

    def changed_init(self: Any, config: Any) -> None:
        init(self, config)
        gain = gains[next(numbers) % len(gains)]
        self.register_buffer("gain", torch.full((1,), gain), persistent=False)

    def changed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * self.gain

    monkeypatch.setattr(llama.LlamaMLP, "__init__", changed_init)
    monkeypatch.setattr(llama.LlamaMLP, "forward", changed)


def test_buffers_of_a_block_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gains(monkeypatch, [1.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    skeleton = build_skeleton(config_of("llama", num_hidden_layers=6))
    assert kinds(skeleton) == (0, 0, 1, 0, 1, 0)
    assert skeleton.short_blocks == (0, 1, 2, 4)
    short = {name: value for name, value in skeleton.short_buffers.items() if "gain" in name}
    assert {name: value.item() for name, value in short.items()} == {
        "model.layers.0.mlp.gain": 1.0,
        "model.layers.1.mlp.gain": 1.0,
        "model.layers.2.mlp.gain": 2.0,
        "model.layers.3.mlp.gain": 2.0,
    }


def test_a_shorter_model_that_computes_something_else_does_not_stand_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residual branches scaled by the depth, as some models do."""
    forward = llama.LlamaMLP.forward

    def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) / self.config.num_hidden_layers**0.5

    monkeypatch.setattr(llama.LlamaMLP, "forward", scaled)
    skeleton = build_skeleton(config_of("llama", num_hidden_layers=5))
    assert kinds(skeleton) == (0, 0, 0, 0, 0)
    assert (skeleton.short_config, skeleton.short_blocks) == (None, ())


def test_a_head_that_depends_on_the_depth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = llama.LlamaModel.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * len(self.layers)
        return output

    monkeypatch.setattr(llama.LlamaModel, "forward", scaled)
    assert build_skeleton(config_of("llama", num_hidden_layers=5)).short_config is None


def test_a_value_of_an_inner_block_that_is_used_at_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = llama.LlamaModel.forward

    def early(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken: list[torch.Tensor] = []

        def take(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            taken.append(output)

        hook = self.layers[2].register_forward_hook(take)
        output = forward(self, *args, **kwargs)
        hook.remove()
        output.last_hidden_state = output.last_hidden_state + taken[0]
        return output

    monkeypatch.setattr(llama.LlamaModel, "forward", early)
    config = config_of("llama", num_hidden_layers=5)
    record = record_blocks(transformers.LlamaForCausalLM, config, "model.layers", {})
    used = [name for _, arguments, _ in record.around for name in arguments[0] if name[0] == "block"]
    assert [name[1] for name in used] == [2]


@pytest.mark.parametrize(
    ("values", "expected"), [([2.0, 2.0, 2.0], (0, 0, 0)), ([2.0, 2.0, 3.0], (0, 0, 1))], ids=["equal", "different"]
)
@pytest.mark.parametrize("made", ["with the model", "while it runs"])
def test_tensors_that_are_no_parameters_or_buffers(
    values: list[float], expected: tuple[int, ...], made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, forward = llama.LlamaMLP.__init__, llama.LlamaMLP.forward
    numbers = iter(range(100))

    def changed_init(self: Any, config: Any) -> None:
        init(self, config)
        self.gain = values[next(numbers) % len(values)]
        if made == "with the model":
            object.__setattr__(self, "gain", torch.full((32,), self.gain))

    def changed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * (torch.tensor([self.gain] * 32) if made == "while it runs" else self.gain)

    monkeypatch.setattr(llama.LlamaMLP, "__init__", changed_init)
    monkeypatch.setattr(llama.LlamaMLP, "forward", changed)
    assert kinds(build_skeleton(config_of("llama"))) == expected


def test_tensors_of_unknown_origin_are_equal_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they hide in a list of the module."""
    init, forward = llama.LlamaMLP.__init__, llama.LlamaMLP.forward

    def changed_init(self: Any, config: Any) -> None:
        init(self, config)
        self.hidden = [torch.ones(1)]

    def changed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + self.hidden[0]

    monkeypatch.setattr(llama.LlamaMLP, "__init__", changed_init)
    monkeypatch.setattr(llama.LlamaMLP, "forward", changed)
    assert kinds(build_skeleton(config_of("llama"))) == (0, 1, 2)


def test_the_class_that_the_configuration_names() -> None:
    config = config_of("llama")
    config.architectures = ["LlamaForSequenceClassification"]
    assert model_class(config) is transformers.LlamaForSequenceClassification
    config.architectures = None
    assert model_class(config) is transformers.LlamaForCausalLM
    assert model_class(transformers.ViTConfig()) is transformers.ViTModel


def test_an_architecture_that_transformers_does_not_know() -> None:
    class NovelConfig(transformers.PretrainedConfig):
        model_type = "novel"

    with pytest.raises(
        BismoothError,
        match=r"model type 'novel' \(no architecture named\) is unknown to transformers\. Expected a model",
    ):
        build_skeleton(NovelConfig())
    for name in ("NovelModel", "pipeline", "AutoModel"):
        with pytest.raises(BismoothError, match=rf"model type 'novel' \({name}\) is unknown"):
            build_skeleton(NovelConfig(architectures=[name]))


def test_code_of_the_model_is_used_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    code = "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM):\n    pass\n"
    (tmp_path / "modeling_mine.py").write_text(code, "utf-8")
    config = config_of("llama", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    config.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert model_class(config) is transformers.LlamaForCausalLM
    assert model_class(config, trust_remote_code=True).__name__ == "Mine"
