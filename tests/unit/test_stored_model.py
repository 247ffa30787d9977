"""Models whose weights stay in files: the outputs of models that are loaded whole, in the memory there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from bismooth.engines.memory import current_rss
from bismooth.export.errors import BismoothError
from bismooth.tools import stored_model, stored_tensor, torch_worker
from bismooth.tools.stored_model import StoredModel
from bismooth.tools.torch_model import load_model
from bismooth.tools.torch_worker import write_outputs
from tests.models import ARCHITECTURES, exported, make_model, tokens

Array = NDArray[np.float32]
IDS = tokens(2, 9)["input_ids"]
hf: Any = transformers


def whole(folder: Path, ids: NDArray[np.int64] = IDS) -> Array:
    with torch.no_grad():
        return load_model(folder)(input_ids=torch.tensor(ids))[0].float().numpy()


def outputs(folder: Path, scratch: Path, *, memory: int | None = None, ids: NDArray[np.int64] = IDS) -> Array:
    shape = write_outputs(folder, ids, scratch / "outputs", memory)
    return np.fromfile(scratch / "outputs", np.float32).reshape(shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = exported(name).folder
    np.testing.assert_array_equal(outputs(folder, tmp_path), whole(folder))


def test_slices_and_parts_of_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied head in slices, logits three positions at a time, and the body once for all of them."""
    folder = exported("llama").folder
    monkeypatch.setattr(stored_tensor, "MOST", 64)
    monkeypatch.setattr(stored_tensor, "SLICE", 1000)
    monkeypatch.setattr(stored_model, "LOGITS", 2 * 4 * 2 * 96 * 3)
    parts, bodies = list[tuple[int, int, tuple[int, ...]]](), list[int]()
    body = hf.LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bodies.append(len(parts))
        return body(self, *args, **kwargs)

    monkeypatch.setattr(hf.LlamaModel, "forward", forward)
    StoredModel(folder).run(IDS, lambda window, first, values: parts.append((window, first, values.shape)))
    assert bodies == [0]
    assert parts == [(0, 0, (2, 3, 96)), (0, 3, (2, 3, 96)), (0, 6, (2, 3, 96))]
    np.testing.assert_allclose(outputs(folder, tmp_path), whole(folder), rtol=1e-5, atol=1e-5)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Stacked weights of experts, saved as the module has them, and a buffer that the checkpoint has."""
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.DeepseekV3Config(
        **common,
        vocab_size=96,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    cast(Any, torch).manual_seed(0)
    module = hf.DeepseekV3ForCausalLM(config).eval()
    bias = module.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.randn(bias.shape))
    module.save_pretrained(tmp_path, save_original_format=False)
    result = outputs(tmp_path, tmp_path)
    np.testing.assert_array_equal(result, whole(tmp_path))
    bias.zero_()
    with torch.no_grad():
        assert not np.array_equal(result, module(input_ids=torch.tensor(IDS))[0].numpy())


def test_memory_decides_how_many_windows_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported("llama").folder
    monkeypatch.setattr(stored_model, "MARGIN", 1 << 40)
    with pytest.raises(
        BismoothError,
        match=re.escape(f"{folder}: --memory is too small for the torch model on a window of 9 tokens. Expected ")
        + r"110\d{4}MB or more, or leave the hop out with --hop\.",
    ):
        outputs(folder, tmp_path, memory=1 << 40)
    model = StoredModel(folder)
    need = model._need(1, 9)  # pyright: ignore[reportPrivateUsage]
    windows = list[int]()
    model.run(IDS, lambda window, _first, _values: windows.append(window), current_rss() + need + 1000)
    assert windows == [0, 1]


def nothing(_self: StoredModel, _count: int, _length: int) -> int:
    return 0


def test_a_weight_that_is_read_unseen_makes_the_model_load_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that computes past what torch tells of."""
    folder = exported("llama").folder
    expected = whole(folder)

    def forward(self: Any, x: Any) -> Any:
        with cast(Any, torch)._C.DisableTorchFunctionSubclass():
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(hf.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    np.testing.assert_array_equal(outputs(folder, tmp_path), expected)
    monkeypatch.setattr(torch_worker.StoredModel, "_need", nothing)
    message = (
        r"the model computes with model\.layers\.0\.mlp\.down_proj\.weight where it cannot be read on demand, and "
        r"does not fit whole\. Expected --memory \d+MB or more, or leave the hop out with --hop\."
    )
    with pytest.raises(BismoothError, match=message):
        outputs(folder, tmp_path, memory=current_rss() + 1000)


def test_outputs_that_are_no_numbers_are_not_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_model("llama", tmp_path)
    module.lm_head.weight.data[3] = float("nan")
    module.save_pretrained(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(StoredModel, "load_whole", refuse)
    assert np.isnan(outputs(tmp_path, tmp_path)[..., 3]).all()


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(BismoothError, match=r"transformers cannot load the source model again: .*Leave this hop out"):
        StoredModel(tmp_path)
