"""Classes of transformers, and models of them without weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch

from .errors import BismoothError


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class that ``config.architectures`` names; the causal one of the model type when it names none.

    With ``trust_remote_code``, code that the model brings along goes before that of transformers.

    Raises:
        BismoothError: transformers does not know the model.
    """
    import transformers

    names = cast(list[str], config.architectures or [])
    autos = ("AutoModelForCausalLM", "AutoModel")
    remote = cast(dict[str, str], getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    if auto := next((auto for auto in autos if auto in remote), None):
        from transformers import dynamic_module_utils

        return cast(Any, dynamic_module_utils).get_class_from_dynamic_module(remote[auto], config.name_or_path)
    named = getattr(transformers, names[0], None) if names else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    for auto in autos:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
    raise BismoothError(
        f"model type {config.model_type!r} ({', '.join(names) or 'no architecture named'}) is unknown to transformers. "
        "Expected a model that the installed transformers has a class for: update it, or export an ONNX file."
    )


@contextmanager
def parameters_without_storage() -> Generator[None]:
    """Modules made inside have parameters on the ``meta`` device and real buffers; their initializers do nothing."""
    from transformers.initialization import no_init_weights

    module_class = cast(Any, torch.nn.Module)
    register = module_class.register_parameter

    def register_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    module_class.register_parameter = register_meta
    try:
        with no_init_weights():
            yield
    finally:
        module_class.register_parameter = register
