"""Loading checkpoints of transformers' classes: safetensors only, and errors that name the file and what to do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.errors import AccelWarning, WeightsError
from accel.strict import StrictError
from accel.strict import read_json as _read_object

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN = 8
_INSIDE = "; of a diffusers pipeline its model's part, as in subfolder='vision_language_encoder'"


def read_json(source: str, name: str, **options: Any) -> dict[str, Any] | None:
    """A JSON file of a folder or hub repository; None if there is none of this name.

    Raises:
        WeightsError: the source cannot be reached, or the file is not JSON.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
    except (OSError, ValueError) as error:  # no answer, no such repository; not an id of one
        raise WeightsError(f"{source}: cannot be reached: {' '.join(str(error).split())}") from error
    if path is None:
        return None
    try:
        return _read_object(Path(path))
    except (OSError, StrictError) as error:
        raise WeightsError(f"{path}: {error}. Download or save it again") from error


def class_name(source: str, **options: Any) -> str:
    """The model class that a checkpoint says it is: the first of config.json's "architectures".

    Raises:
        WeightsError: no folder, no config.json, or it names no class.
    """
    folder = Path(source) / options.get("subfolder", "")
    if Path(source).exists() and not (folder / "config.json").is_file():
        if any(folder.glob("[ct]2i_*")):
            return "LlamaGen"  # published as bare state dicts of these names
        raise WeightsError(
            f"{folder}: not a model folder (it has no config.json). Pass the folder that save_pretrained wrote{_INSIDE}"
        )
    config = read_json(source, "config.json", **options)
    if config is None:
        raise WeightsError(
            f"{source}: has no config.json. Pass a model folder or the id of a model on the hub{_INSIDE}"
        )
    names = config.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise WeightsError(
            f'{source}: its config.json names no model class ("architectures"). Add it, or save the model '
            "again with save_pretrained"
        )
    return str(names[0])


def check_weight_files(folder: Path, usual: str = "model.safetensors") -> None:
    """Name the broken file of a local folder before a loader fails on it with a message about something else.

    Args:
        usual: the name to say where there is none.

    Raises:
        WeightsError: no safetensors file, only pickles, or a file that is cut off or otherwise corrupt.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files and any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise WeightsError(
            f"{folder}: its weights are pickles ({', '.join(_PICKLES)}), which can run any code when loaded and "
            "are refused. Convert them: model.save_pretrained(folder) writes safetensors"
        )
    if not files:
        raise WeightsError(f"{folder}: weight file {usual} is missing. Download or save it again")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_shards(index)
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise WeightsError(f"{path}: corrupt weight file ({error}). Download or save it again") from error


def _check_shards(index: Path) -> None:
    """That the files which an index names are there."""
    try:
        named = _read_object(index).get("weight_map")
    except (OSError, StrictError) as error:
        raise WeightsError(f"{index}: {error}. Download or save it again") from error
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise WeightsError(f'{index}: names no weight files ("weight_map"). Download or save it again')
    for name in sorted(set(named.values())):
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index.parent / name}: weight file is missing, {index.name} names it")


def load_model(
    cls: Any, source: str, dtype: torch.dtype, *, report_unknown: bool = True, **options: Any
) -> nn.Module:
    """`cls.from_pretrained` for a transformers class, in eval mode, on the CPU.

    Args:
        report_unknown: warn of what the checkpoint has and the model does not.
        options: `from_pretrained`'s own (subfolder, revision, cache_dir, token, local_files_only).

    Raises:
        WeightsError: missing, corrupt or pickled weights; parameters that the checkpoint does not have.
    """
    if Path(source).exists():
        check_weight_files(Path(source) / options.get("subfolder", ""))
    try:
        with quiet_imports(), _without_report():
            model, info = cls.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with their names
                **options,
            )
    except Exception as error:  # a configuration that is anything makes constructors raise anything
        place = Path(source) / options.get("subfolder", "")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise WeightsError(f"{place}: cannot be loaded as {cls.__name__}: {reason}") from error
    unknown = info["unexpected_keys"]
    if missing := {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}:
        also = f" It has keys that the model does not know: {listed(unknown)}." if unknown else ""
        raise WeightsError(
            f"{Path(source) / options.get('subfolder', '')}: does not have these parameters of {cls.__name__}, or in another shape: "
            f"{listed(missing)}.{also} Check that config.json and the weights belong together"
        )
    if unknown and report_unknown:
        warnings.warn(
            f"{source}: unknown keys in the checkpoint were not loaded: {listed(unknown)}",
            AccelWarning,
            stacklevel=2,
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(source: str, **options: Any) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        WeightsError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_imports():
            return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # its Rust half raises bare Exceptions
        raise WeightsError(
            f"{source}: its tokenizer cannot be loaded: {' '.join(str(error).split())}"
        ) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers logs a table of what is missing, on many lines; the error says the same on one."""

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


@contextmanager
def quiet_imports() -> Any:
    """transformers builds its tokenizers through SWIG modules that lack __module__ (Python 3.12+)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message="builtin type .*")
        yield


def listed(keys: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
