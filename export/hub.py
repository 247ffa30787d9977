"""Models of the Hugging Face hub, through its local cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .errors import BismoothError


def hub_folder(name: str, files: Sequence[str], index: str) -> Path:
    """The folder of the hub's cache that holds the model ``name`` (``organisation/model``).

    Downloaded, if the cache does not have it, is what matches ``files``, and the weight files that are listed in the
    file ``index``: not the copies in other formats that many repositories hold.

    Raises:
        BismoothError: the hub cannot be reached, or does not have this model, or not for this user.
    """
    import huggingface_hub

    download = cast(Any, huggingface_hub).snapshot_download
    try:
        folder = Path(download(name, allow_patterns=[*files, index]))
        if (folder / index).is_file():
            shards = sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()))
            folder = Path(download(name, allow_patterns=[*files, index, *shards]))
        return folder
    except Exception as error:  # the hub client has no common base class for its network, id and cache errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BismoothError(
            f"{name}: no such file or folder, and the Hugging Face hub does not give it: {reason[0].rstrip('.')}. "
            "Check the name, or download the model and pass its folder."
        ) from error
