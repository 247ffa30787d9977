"""A GGUF file as a Hugging Face folder: dequantized tensor by tensor into safetensors."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .errors import BismoothError
from .safetensors_file import SafetensorsWriter
from .source import WEIGHTS

_FLOAT32 = np.dtype(np.float32)


def convert_gguf(path: Path, folder: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write ``config.json``, tokenizer and ``model.safetensors`` (FP32) of a GGUF file into ``folder``.

    Holds one dequantized tensor at a time. Names, and the row order of Q and K where llama.cpp permutes them, are
    restored by the tables of transformers.

    Raises:
        BismoothError: the file is damaged or its architecture is unknown to transformers.
    """
    import torch
    import transformers

    auto: Any = transformers
    with _unreadable(path), _read_once(path) as reader:
        config = auto.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = auto.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            skeleton = auto.AutoModelForCausalLM.from_config(config)
        convert, names = _converter(reader, config, skeleton)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tensors = [tensor for tensor in reader.tensors if tensor.name in names]
    declared = [(names[tensor.name], _FLOAT32, shapes[names[tensor.name]]) for tensor in tensors]
    with SafetensorsWriter(folder / WEIGHTS, declared, {"format": "pt"}) as writer:
        for done, tensor in enumerate(tensors):
            name = names[tensor.name]
            with _unreadable(path):
                values = convert(tensor)
            if values.shape != shapes[name]:
                raise BismoothError(
                    f"{path}: tensor {tensor.name} has shape {list(values.shape)}, but the model's configuration makes "
                    f"it {list(shapes[name])}. Download or convert the file again."
                )
            writer.write(name, values)
            if progress:
                progress("dequantize", done + 1, len(tensors))
    config.architectures = [type(skeleton).__name__]
    config.dtype = torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gguf_licence(path: Path) -> str | None:
    """The licence that the metadata of a GGUF file names, as an identifier.

    Raises:
        BismoothError: the file is damaged.
    """
    import gguf

    with _unreadable(path):
        reader: Any = gguf.GGUFReader(path)
        field = reader.fields.get("general.license")
        return None if field is None else str(field.contents())


@contextmanager
def _read_once(path: Path) -> Generator[Any]:
    """A reader of the file. Transformers gets the same one, and tables of names are made once.

    It would parse the file for each of configuration and tokenizer, and make the tables for each module, for seconds.
    """
    import gguf

    package: Any = gguf
    reader_class, name_map = package.GGUFReader, package.get_tensor_name_map
    reader = reader_class(str(path))

    def known(_path: Any) -> Any:
        return reader

    package.GGUFReader, package.get_tensor_name_map = known, cache(name_map)
    try:
        yield reader
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader_class, name_map


def _converter(reader: Any, config: Any, skeleton: Any) -> tuple[Callable[[Any], NDArray[np.float32]], dict[str, str]]:
    """A function from a tensor of the file to its values in the model, and the tensors' names in the model."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    tables: Any = modeling_gguf_pytorch_utils
    architecture = reader.get_field("general.architecture").contents()
    processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)(config=config.to_dict())
    names: dict[str, str] = tables.get_gguf_hf_weights_map(skeleton, processor)

    def convert(tensor: Any) -> NDArray[np.float32]:
        weights = cast(Any, gguf).dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={})
        return np.ascontiguousarray(result.weights, np.float32)

    return convert, names


@contextmanager
def _unreadable(path: Path) -> Generator[None]:
    """gguf and transformers raise bare errors of many kinds on damaged and unknown files."""
    try:
        yield
    except Exception as error:  # of no common class, and the block does nothing but read
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BismoothError(
            f"{path}: this GGUF file cannot be read: {reason[0]} "
            "Expected a whole file of a model that transformers knows."
        ) from error
