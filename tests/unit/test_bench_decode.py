"""Benchmarks of decoding: the peer computes what its model does, and ratios say how many times faster."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bismooth.tools.bench_decode import NEW_TOKENS, speed_rows
from bismooth.tools.bench_torch import TorchDecoder
from tests.models import VOCAB, exported


def test_the_peer_decodes_with_its_cache() -> None:
    model = exported("qwen2")
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 9))
    with torch.no_grad():
        expected = model.module(input_ids=torch.tensor(ids)).logits.numpy()
    with TorchDecoder(model.source) as decoder:
        assert (decoder.vocab_size, decoder.capacity, decoder.length) == (VOCAB, 96, 0)
        for _ in range(2):
            np.testing.assert_allclose(decoder.prefill(ids[:, :7]), expected[:, 6], atol=1e-4)
            np.testing.assert_allclose(decoder.decode(ids[:, 7]), expected[:, 7], atol=1e-4)
            np.testing.assert_allclose(decoder.decode(ids[:, 8]), expected[:, 8], atol=1e-4)
            assert decoder.length == 9
            decoder.reset()
            assert decoder.length == 0


def test_ratios_are_of_medians() -> None:
    runs = {
        "float32": [{"prefill": 1.0, "decode": 4.0}, {"prefill": 9.0, "decode": 4.0}, {"prefill": 2.0, "decode": 40.0}],
        "w8a8": [{"prefill": 0.5, "decode": 2.0}],
        "transformers": [{"prefill": 3.0, "decode": 6.0}],
    }
    rows = {row["engine"]: row for row in speed_rows(runs)}
    assert rows["w8a8"]["prefill_ratio_to_float32"] == pytest.approx(4)
    assert rows["w8a8"]["decode_ratio_to_float32"] == pytest.approx(2)
    assert rows["w8a8"]["decode_ratio_to_transformers"] == pytest.approx(3)
    assert rows["float32"]["decode_tokens_per_second"] == pytest.approx((NEW_TOKENS - 1) / 4)
    assert rows["transformers"]["prefill_seconds"] == 3
