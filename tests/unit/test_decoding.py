"""Text token by token with a cache, against whole windows and against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bismooth.engines.onnxruntime import Session
from bismooth.export.artifact import Artifact
from bismooth.export.graph_names import has_caches
from bismooth.passes.gates import Gates, Hop
from bismooth.tools.decoding import CachedRun, common_prefix, cut_prompts, greedy, stepwise
from bismooth.tools.verify import verify_artifact
from tests.models import VOCAB, export, exported, make_model

IDS = np.random.default_rng(1).integers(3, VOCAB, (3, 12))


def test_logits_token_by_token_are_those_of_the_window() -> None:
    steps: list[str] = []
    with Session(exported("llama").graph) as session:
        whole = session.logits(IDS[:2])
        decoded = stepwise(CachedRun(session, session.outputs[0].name), IDS[:2], 9, steps.append)
    assert decoded.shape == whole.shape
    np.testing.assert_allclose(decoded, whole, atol=1e-5 * np.abs(whole).max())
    assert steps == ["token 9", "token 10", "token 11"]


def test_greedy_continuations_are_those_of_transformers() -> None:
    model = exported("qwen3")
    steps: list[str] = []
    with Session(model.graph) as session:
        tokens = greedy(session, np.repeat(IDS, 6, axis=0), 10, steps.append)
    generated = model.module.generate(torch.tensor(IDS), max_new_tokens=10, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(tokens, np.repeat(generated.numpy()[:, 12:], 6, axis=0))
    assert steps == [f"prompt {number}" for number in range(18)]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_which_graphs_have_a_cache(name: str) -> None:
    with Session(exported(name).graph) as session:
        assert has_caches(port.name for port in session.inputs) == (name == "llama")


def test_a_model_that_generates_can_be_exported_without_a_cache(tmp_path: Path) -> None:
    module = make_model("llama", tmp_path / "source", num_hidden_layers=1)
    model = export(module, tmp_path / "source", tmp_path / "artifact", kv_cache=False)
    with Session(model.graph) as session, Session(exported("llama").graph) as other:
        assert [port.name for port in session.inputs] == ["input_ids", "attention_mask"]
        assert not has_caches(port.name for port in session.inputs)
        assert has_caches(port.name for port in other.inputs)


def test_the_common_prefix_ends_with_the_first_difference() -> None:
    a = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]])
    b = np.array([[1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 4]])
    assert common_prefix(a, b).tolist() == [4, 2, 0]


@pytest.mark.parametrize(
    ("count", "length", "starts"), [(4, 3, [0, 6]), (2, 5, [0]), (9, 4, [0, 4, 8]), (3, 3, [0, 6])]
)
def test_prompts_are_spread_over_the_windows(count: int, length: int, starts: list[int]) -> None:
    windows = np.arange(24).reshape(2, 12)
    prompts = cut_prompts(windows, count, length)
    assert len(prompts) == min(count, 2 * len(starts))
    assert prompts.shape[1] == length
    expected = [window[start : start + length].tolist() for window in windows for start in starts][:count]
    assert prompts.tolist() == expected


def test_a_graph_without_a_cache_is_not_judged_on_decoding() -> None:
    model = exported("bert")
    result = verify_artifact(Artifact(model.folder, model.manifest), IDS, Gates(), [Hop.DECODE])
    assert [(hop.verdict, hop.skipped) for hop in result.hops] == [("skipped", "the graph has no cache")]
    assert result.failures == ("no hop was judged: decode: the graph has no cache.",)
