"""The loop against that of transformers, on tiny random models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bismooth.engines.generation import Ended, Generation, pad_left
from bismooth.engines.sampling import GREEDY
from tests.models import VOCAB, random_model
from tests.torch_decoder import TorchDecoder

NEW = 12
PROMPTS = [[5, 9, 40, 7, 3], [8], [11, 12, 13]]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param)


def continued(model: Any, prompts: list[list[int]], stop: list[int]) -> list[list[int]]:
    """New tokens of ``generate``, up to and without the first of ``stop``."""
    ids, mask = map(torch.tensor, pad_left(prompts))
    tokens = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0
    )
    rows = tokens[:, ids.shape[1] :].tolist()
    return [row[: next((n for n, token in enumerate(row) if token in stop), NEW)] for row in rows]


def test_a_batch_is_continued_as_by_transformers(model: Any) -> None:
    free = continued(model, PROMPTS, [VOCAB - 1])
    stop = [free[0][3], VOCAB - 1]
    expected = continued(model, PROMPTS, stop)
    assert len({len(row) for row in expected}) > 1, "rows should end at different steps"
    generation = Generation(TorchDecoder(model), PROMPTS, GREEDY, stop=frozenset(stop), limit=NEW)
    list(generation)
    assert [row.tokens for row in generation.rows] == expected
    reasons = [Ended.LENGTH if len(row) == NEW else Ended.STOP for row in expected]
    assert [row.ended for row in generation.rows] == reasons


def test_a_turn_is_continued_as_by_transformers(model: Any) -> None:
    decoder = TorchDecoder(model)
    decoder.prefill(np.array([[5, 9, 40]]))
    generation = Generation(decoder, [[7, 3]], GREEDY, limit=NEW)
    list(generation)
    assert [generation.rows[0].tokens] == continued(model, [[5, 9, 40, 7, 3]], [VOCAB - 1])
