"""Greedy decoding of exported graphs against ``generate`` of transformers: 64 tokens, batch 4, left padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]: the package has no stubs
import pytest
import torch
import transformers
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.export.model import export_model
from bismooth.tools.demo import demo_model
from tests.models import ARCHITECTURES, VOCAB, exported, positions

ORT: Any = onnxruntime
NEW, PADDING = 64, (0, 3, 6, 1)
MARGIN = 1e-4
"""Two largest logits that are closer than this may change places."""


def prompts(size: int, vocab: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random ids and mask [4, size]."""
    ids = np.random.default_rng(0).integers(3, vocab, (len(PADDING), size))
    mask = np.array([[0] * padding + [1] * (size - padding) for padding in PADDING])
    return np.where(mask == 1, ids, 0), mask


def expected_of(module: Any, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tokens [B, NEW] of transformers, and the logits [NEW, B, V] that they follow from."""
    result = module.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[:, ids.shape[1] :].numpy(), np.stack([step.numpy() for step in result.logits])


def decoded_logits(
    graph: Path, ids: NDArray[np.int64], mask: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits [NEW, B, V] of the prompts' last position, and then behind each of ``tokens`` [B, NEW] but the last."""
    session = ORT.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    shapes = {port.name: port.shape for port in session.get_inputs()}
    outputs = [port.name for port in session.get_outputs()]
    caches = {
        name: np.zeros([len(ids), shape[1], 0, shape[3]], np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }
    steps: list[NDArray[np.float32]] = []
    for piece in (ids, *np.split(tokens[:, :-1], NEW - 1, axis=1)):
        if steps:
            mask = np.concatenate([mask, np.ones_like(piece)], axis=1)
        feeds = {
            "input_ids": piece,
            "attention_mask": mask,
            "position_ids": positions(mask)[:, -piece.shape[1] :],
            **caches,
        }
        values = dict(zip(outputs, session.run(None, feeds), strict=True))
        caches = {name.replace("present", "past_key_values"): values[name] for name in outputs if "present" in name}
        steps.append(values["logits"][:, -1])
    return np.stack(steps)


def assert_same_tokens(logits: NDArray[np.float32], tokens: NDArray[np.int64], reference: NDArray[np.float32]) -> int:
    """Greedy tokens are the same in each row up to the first near tie; returns how many were compared."""
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()
    second, first = np.moveaxis(np.sort(reference, axis=-1)[..., -2:], -1, 0)
    clear = np.logical_and.accumulate(first - second > MARGIN, axis=0).T
    np.testing.assert_array_equal(logits.argmax(-1).T[clear], tokens[clear])
    return int(np.count_nonzero(clear))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bert"])
def test_greedy_decoding_is_that_of_transformers(name: str) -> None:
    model = exported(name)
    ids, mask = prompts(9, VOCAB)
    tokens, reference = expected_of(model.module, ids, mask)
    compared = assert_same_tokens(decoded_logits(model.graph, ids, mask, tokens), tokens, reference)
    assert compared >= 2 * NEW


@pytest.mark.slow
def test_all_tokens_of_a_real_model(tmp_path: Path) -> None:
    export_model(demo_model(), tmp_path)
    module = cast(Any, transformers).AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = cast(Any, transformers).AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    texts = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time, in a small village,"]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (mask == 0).any()
    tokens, reference = expected_of(module, ids, mask)
    logits = decoded_logits(tmp_path / "model.onnx", ids, mask, tokens)
    np.testing.assert_array_equal(logits.argmax(-1).T, tokens)
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()


def test_a_state_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    config = cast(Any, transformers).MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4
    )
    cast(Any, transformers).MambaForCausalLM(config).save_pretrained(tmp_path / "source")
    message = r"^MambaForCausalLM: the model keeps no keys and values of attention in a cache\. Export it with --no-kv-"
    (tmp_path / "artifact").mkdir()
    with pytest.raises(BismoothError, match=message):
        export_model(tmp_path / "source", tmp_path / "artifact")


def test_an_onnx_file_stays_as_it_is(tmp_path: Path) -> None:
    message = r"model\.onnx: --kv-cache and --no-kv-cache have no effect on an ONNX file\. Leave the option out\.$"
    with pytest.raises(BismoothError, match=message):
        export_model(exported("llama").graph, tmp_path, kv_cache=False)
