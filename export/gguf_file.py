"""A GGUF file as a Hugging Face folder: dequantized tensor by tensor into safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .errors import BismoothError
from .safetensors_file import SafetensorsWriter


def convert_gguf(path: Path, folder: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write ``config.json``, tokenizer and ``model.safetensors`` (FP32) of a GGUF file into ``folder``.

    Holds one dequantized tensor at a time. Names, and the row order of Q and K where llama.cpp permutes them, are restored by the tables
    of transformers.

    Raises:
        BismoothError: the file is damaged or its architecture is unknown to transformers.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as tables

    gguf_options: dict[str, Any] = {"gguf_file": path.name}
    try:
        reader = cast(Any, GGUFReader(str(path)))
        config = cast(Any, AutoConfig.from_pretrained(path.parent, **gguf_options))
        config.architectures = config.architectures or [_causal_class_name(config)]
        with torch.device("meta"):
            skeleton = cast(Any, AutoModelForCausalLM).from_config(config)
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(path.parent, **gguf_options)
    except Exception as error:  # gguf and transformers raise bare ValueErrors, KeyErrors, IndexErrors on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BismoothError(
            f"{path}: this GGUF file cannot be read: {reason}. Expected a model that transformers knows."
        ) from error
    processor_class = tables.TENSOR_PROCESSORS.get(_architecture(reader), tables.TensorProcessor)
    processor = cast(Any, processor_class)(config=config.to_dict())
    names = cast(dict[str, str], tables.get_gguf_hf_weights_map(skeleton, processor))
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}

    def convert(tensor: Any) -> tuple[str, NDArray[np.float32]] | None:
        weights = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        )
        name = names.get(result.name)
        return None if name is None else (name, np.ascontiguousarray(result.weights, np.float32))

    known = [tensor for tensor in reader.tensors if names.get(tensor.name)]
    declared = [(names[tensor.name], np.dtype(np.float32), shapes[names[tensor.name]]) for tensor in known]
    with SafetensorsWriter(folder / "model.safetensors", declared) as writer:
        for done, tensor in enumerate(known):
            converted = convert(tensor)
            if converted is None or converted[1].shape != shapes[converted[0]]:
                raise BismoothError(
                    f"{path}: tensor {tensor.name} does not fit the model's configuration. Is the file complete?"
                )
            writer.write(*converted)
            if progress:
                progress("dequantize", done + 1, len(known))
    config.quantization_config = None
    del config.quantization_config
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _architecture(reader: Any) -> str:
    field = reader.fields["general.architecture"]
    return bytes(field.parts[field.data[0]]).decode()


def _causal_class_name(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = cast(dict[str, str], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).get(config.model_type)
    if name is None:
        raise ValueError(f"model type {config.model_type} has no causal language model class")
    return name
