"""Stand-ins in a rotated basis: they compute what their source does, and no scale per channel repairs them."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from bismooth.engines.onnxruntime import Session
from bismooth.export.errors import BismoothError
from bismooth.export.safetensors_file import read_header
from bismooth.passes.gates import Hop
from bismooth.passes.spec import ComputeType, StandinKind
from bismooth.tools import stages
from bismooth.tools.cli import main
from bismooth.tools.diagnose import diagnose
from bismooth.tools.standin import StandinResult, standin
from tests.models import make_model, random_model
from tests.tiny import Tiny, make_tiny, write_tokenizer

IDS = np.random.default_rng(0).integers(3, 90, (2, 16))
WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48}


def rotate(source: Path, output: Path, **options: Any) -> StandinResult:
    return standin(source, output, kind=StandinKind.ROTATE, **options)


def logits(source: Path, folder: Path) -> Any:
    artifact = stages.export(source, folder, dtype=ComputeType.FLOAT32).artifact
    with Session(artifact / "model.onnx", mode="plain") as session:
        return session.logits(IDS)


def silence(model: Any) -> None:
    """Remove a random direction from all that is written into the stream, so that to remove it changes nothing."""
    torch = cast(Any, import_module("torch"))
    width = model.config.hidden_size
    v = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(3)), dim=0)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table -= torch.outer(table @ v, v)
        for block in model.model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight -= torch.outer(v, v @ linear.weight)
                if linear.bias is not None:
                    linear.bias -= v * (v @ linear.bias)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_the_function_is_that_of_the_source(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """A model whose stream has a silent direction: it is found, and walls along it change nothing."""
    model = random_model(name, **overrides)
    silence(model)
    model.save_pretrained(tmp_path / "source")
    made = rotate(tmp_path / "source", tmp_path / "bad", factor=30, channels=2, blocks=(0, 1), seed=1)
    assert made.removed is not None
    assert made.removed < 1e-7
    expected, got = logits(tmp_path / "source", tmp_path / "a"), logits(tmp_path / "bad", tmp_path / "b")
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)
    config = json.loads((tmp_path / "bad/config.json").read_text("utf-8"))
    assert (config["tie_word_embeddings"], config["dtype"]) == (False, "float32")
    tensors = read_header(tmp_path / "bad/model.safetensors")
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), **WIDE)


def test_walls_are_found_and_smoothing_does_not_repair_them(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--factor", "60", "--channels", "4", "--blocks", "0,2", "-q", "--json"]
    assert main(["standin", str(tiny.source), "-o", str(tmp_path / "bad"), "--kind", "rotate", *options]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["kind"] == "rotate"
    record = json.loads((tmp_path / "bad/standin.json").read_text("utf-8"))
    assert record == {key: value for key, value in made.items() if key not in ("model", "wall_seconds")}
    planted = {linear: tuple(item["channels"]) for item in made["planted"] for linear in item["linears"]}
    assert len(planted) == 10
    assert {item.name: item.channels for item in diagnose(tmp_path / "bad").flagged} == planted
    assert main(["standin", str(tiny.source), "-o", str(tmp_path / "scaled"), *options]) == 0
    scaled, rotated = (divergence(tmp_path / name, tiny.text) for name in ("scaled", "bad"))
    assert rotated > 10 * scaled


def divergence(source: Path, text: Path) -> float:
    """KL of ``w8a8`` against the float graph."""
    artifact = stages.export(source, source.with_suffix(".art"), dtype=ComputeType.FLOAT32).artifact
    stages.calibrate(artifact, [str(text)], windows=3, length=24)
    quantized = stages.quantize(artifact, "w8a8", source.with_suffix(".q")).artifact
    report = stages.verify(quantized, [str(text)], hops=[Hop.REFERENCE], windows=3, length=24).to_json()
    return report["hops"][0]["metrics"]["kl"]


def test_shards_in_another_type(tiny: Tiny, tmp_path: Path) -> None:
    model = cast(Any, import_module("transformers")).AutoModelForCausalLM.from_pretrained(tiny.source, dtype="bfloat16")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    rotate(tmp_path / "shards", tmp_path / "bad", channels=2, blocks=(0,))
    index = json.loads((tmp_path / "bad/model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    types = {name: read_header(tmp_path / "bad" / file)[name].dtype for name, file in index.items()}
    assert types["lm_head.weight"] == types["model.layers.2.mlp.down_proj.weight"] == "F32"
    assert np.isfinite(logits(tmp_path / "bad", tmp_path / "art")).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 1}, r"--channels 1: Expected 2 to 6 of the 192 channels of the residual stream: one alone"),
        ({"channels": 7}, r"--channels 7: Expected 2 to 6 of the 192"),
        ({"factor": 0.5}, r"--factor 0\.5: Expected a number above 1"),
        ({"blocks": (5,)}, r"--blocks 5: .*source has 3 blocks"),
        ({"blocks": ()}, r"--blocks: these blocks have no norm .* It has 7, first model\.layers\.0\.input_layernorm,"),
    ],
)
def test_what_cannot_be_made(tiny: Tiny, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BismoothError, match=message):
        rotate(tiny.source, tmp_path / "bad", **({"blocks": (0,)} | arguments))
    assert not any(tmp_path.iterdir())


def test_models_that_cannot_be_rotated(tmp_path: Path) -> None:
    make_model("gpt_neox", tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    with pytest.raises(BismoothError, match=r"final_layer_norm.*LayerNormalization subtracts the mean"):
        rotate(tmp_path / "source", tmp_path / "bad", blocks=(0,))
