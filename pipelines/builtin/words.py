"""The built-in models know the words of Scenes and no others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from accel.errors import AccelWarning


def known_prompts(prompts: list[str], vocabulary: Iterable[str], stacklevel: int) -> list[str]:
    """Prompts in lower case, as the models were trained; warns of words that are not in the vocabulary.

    Args:
        vocabulary: a SentencePiece-like tokenizer's, where a word starts with "▁".
        stacklevel: of the warning, counted from the caller of this function.
    """
    known = {token.removeprefix("▁") for token in vocabulary}
    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}
    # Letters are tokens, so that any word can be read, but "a" is the only one that is a word.
    unknown = sorted(word for word in words if word not in known or (len(word) == 1 and word != "a"))
    if unknown:
        warnings.warn(
            f"the built-in model knows only Scenes; these words mean nothing to it: {', '.join(unknown)}",
            AccelWarning,
            stacklevel=stacklevel + 1,
        )
    return [prompt.lower() for prompt in prompts]
