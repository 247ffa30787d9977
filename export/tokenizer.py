"""The tokenizer of a model as one file, ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from .errors import BismoothError

_OLDER = ("vocab.json", "vocab.txt", "*.model")


def complete_tokenizer(source: Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write ``tokenizer.json`` into ``folder`` if the model in ``source`` has only the files of an older tokenizer.

    Raises:
        BismoothError: transformers cannot convert them.
    """
    older = [path for pattern in _OLDER for path in source.glob(pattern)]
    if (folder / "tokenizer.json").is_file() or not older:
        return
    import transformers

    try:
        tokenizer = cast(Any, transformers).AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raise bare exceptions of many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BismoothError(
            f"{source}: the tokenizer cannot be converted to tokenizer.json: {reason[0]} "
            f"Save it with a current transformers, or remove {older[0].name} to export the model without a tokenizer."
        ) from error
