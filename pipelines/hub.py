"""Whether the hub can be asked at all, found out in seconds: its client tries each file five times, a minute each."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from accel.errors import AccelWarning, WeightsError

SECONDS = 3.0


def where(model: str) -> dict[str, Any]:
    """What loaders need to be told about a hub id: `local_files_only` where only the cache can answer.

    Raises:
        WeightsError: not in the cache, and the hub cannot be asked.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and answers():
        return {}
    cached = _is_cached(model)
    if constants.HF_HUB_OFFLINE:
        if not cached:
            raise WeightsError(
                f"{model}: there is no such folder, it is not in the cache, and HF_HUB_OFFLINE forbids to download "
                "it. Unset that, or give the path of a folder with the model"
            )
    elif cached:
        text = f"no network ({constants.ENDPOINT} cannot be reached): the cached copy of {model} is used"
        warnings.warn(text, AccelWarning, stacklevel=3)
    else:
        raise WeightsError(
            f"{model}: there is no such folder, it is not in the cache, and there is no network "
            f"({constants.ENDPOINT} cannot be reached). Connect, or give the path of a folder with the model"
        )
    return {"local_files_only": True}


def answers(seconds: float = SECONDS) -> bool:
    """Whether the hub sends any answer to one request. By the hub client's own session, with its proxies."""
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception:  # of one of two HTTP libraries, by version; whatever it is, there was no answer
            return
        answered.set()

    # In a thread: looking a name up heeds no timeout.
    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(seconds + 1)
    return answered.is_set()


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        names = ("model_index.json", "config.json")
        return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)
    except HFValidationError as error:
        raise WeightsError(f"{model}: neither a folder nor a hub id: {error}") from error
