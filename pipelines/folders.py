"""Looks through a diffusers folder before its loaders do.

They name the wrong file or none, fill in random numbers for what a text encoder's file lacks, and make up an empty
tokenizer where there is none: pictures of something else, without a word.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accel.backends import dtype_argument
from accel.errors import AccelError, AccelWarning, WeightsError
from accel.strict import StrictError, read_json

from .autoregressive.loading import check_weight_files, listed, load_model, quiet_imports

INDEX = "model_index.json"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "Scheduler")
AGAIN = "Download or save it again"


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline in a folder that `save_pretrained` wrote, onto the CPU.

    Of a class that diffusers does not have it is loaded as the nearest one, with a warning; no code of the folder's
    own is ever run.

    Raises:
        WeightsError: a file is missing, corrupt, pickled or not what it should be; names it.
    """
    index = read_index(folder)
    return load_as(pipeline_class(index, folder), folder, dtype)


def load_as(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """As `load`, for a given class of pipelines."""
    index = read_index(folder)
    models: dict[str, Any] = {}
    taken = inspect.signature(cls.__init__).parameters
    for name, library, class_name in _components(index, folder):
        part = folder / name
        component = _component_class(library, class_name, folder / INDEX, name)
        _check_component(part, class_name, component)
        if library == "transformers" and name in taken and _is_model(component):
            # Loaded here, because diffusers does not look at what was missing.
            models[name] = load_model(component, str(folder), dtype, subfolder=name, report_unknown=False)
    try:
        with quiet_imports():
            pipe = cls.from_pretrained(
                str(folder), **dtype_argument(dtype), use_safetensors=True, local_files_only=True, **models
            )
    except AccelError:
        raise
    except Exception as error:  # loaders of two libraries, on files that may be anything, raise anything
        raise WeightsError(f"{folder}: cannot be loaded as a {cls.__name__}: {said(error)}") from error
    _check_complete(pipe, folder)
    return pipe


def said(error: Exception) -> str:
    """What a foreign error says; with its class, if that alone tells what happened."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def read_index(folder: Path) -> dict[str, Any]:
    """Raises `WeightsError` if there is no readable model_index.json."""
    return _read(folder / INDEX)


def pipeline_class(index: Mapping[str, Any], folder: Path) -> Any:
    """The class of pipelines that a folder says it is, or the nearest one that can be told.

    Raises:
        WeightsError: none can be told; names the class and the file.
    """
    import diffusers

    named = index.get("_class_name")
    if isinstance(named, list) and named:  # [file, class]: with code of its own
        named = named[-1]
    if not isinstance(named, str):
        raise WeightsError(f'{folder / INDEX}: names no pipeline class ("_class_name"). {AGAIN}')
    if named == "ScenesFluxPipeline":
        from .builtin.scenes_flux import ScenesFluxPipeline

        return ScenesFluxPipeline
    if named == "ScenesTurboPipeline":
        from .builtin.turbo import ScenesTurboPipeline

        return ScenesTurboPipeline
    known = getattr(diffusers, named, None)
    if inspect.isclass(known) and issubclass(known, diffusers.DiffusionPipeline):
        return known
    nearest = _nearest(named, index, folder)
    if len(nearest) != 1:
        choice = f"one of {', '.join(c.__name__ for c in nearest)}" if nearest else "the one it derives from"
        raise WeightsError(
            f"{folder / INDEX}: is of class {named}, which diffusers {diffusers.__version__} does not have, and "
            f'code from a folder is not run. Write {choice} there as "_class_name", or load the pipeline from Python '
            "and pass it to accel.accelerate"
        )
    warnings.warn(
        f"{folder / INDEX}: is of class {named}, which diffusers does not have; loaded as {nearest[0].__name__}, "
        "without what the class adds",
        AccelWarning,
        stacklevel=4,
    )
    return nearest[0]


def _nearest(named: str, index: Mapping[str, Any], folder: Path) -> list[Any]:
    """The text-to-image pipelines made of the same parts; of several, those whose name the class's contains."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    parts = {name: class_name for name, _, class_name in _components(index, folder)}
    absent = {name for name, value in index.items() if value == [None, None]}
    found = []
    for cls in dict.fromkeys(AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()):
        parameters = dict(inspect.signature(cls.__init__).parameters)
        parameters.pop("self")
        needed = {n for n, p in parameters.items() if p.default is p.empty and n not in absent}
        denoiser = next((n for n in ("transformer", "unet") if n in parts), None)
        if denoiser is None or not needed <= parts.keys() <= parameters.keys():
            continue
        if parts[denoiser] in str(parameters[denoiser].annotation):
            found.append(cls)
    by_name = [cls for cls in found if cls.__name__ in named]
    return [max(by_name, key=lambda cls: len(cls.__name__))] if by_name else found


def _components(index: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str, str]]:
    """(name, library, class) of what the pipeline is made of; None stands for what it does without."""
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(item, str) for item in value):
            raise WeightsError(f"{folder / INDEX}: {name!r} is not [library, class]. {AGAIN}")
        yield name, value[0], value[1]


def _component_class(library: str, class_name: str, index: Path, name: str) -> Any:
    """None where the library is another one than the two: its loader then says what is wrong."""
    import diffusers
    import transformers

    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if module is None:
        return None
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        raise WeightsError(
            f"{index}: its {name} is a {class_name}, which {library} {module.__version__} does not have. Save it as a "
            f"class of {library}, or install the release that has it"
        )
    return found


def _is_model(component: Any) -> bool:
    import transformers

    return component is not None and issubclass(component, transformers.PreTrainedModel)


def _check_component(part: Path, class_name: str, component: Any) -> None:
    if not part.is_dir():
        raise WeightsError(f"{part}: this part of the pipeline is missing. {AGAIN}")
    for file in sorted(part.glob("*.json")):
        _read(file)
    if "Tokenizer" in class_name:
        if not any(any(part.glob(pattern)) for pattern in _VOCABULARIES):
            raise WeightsError(f"{part}: the tokenizer's vocabulary is missing (tokenizer.json). {AGAIN}")
        if not (part / "tokenizer_config.json").is_file():
            raise WeightsError(f"{part / 'tokenizer_config.json'}: file is missing. {AGAIN}")
    elif component is not None and not class_name.endswith(_WITHOUT_WEIGHTS):
        if not (part / "config.json").is_file():
            raise WeightsError(f"{part / 'config.json'}: file is missing. {AGAIN}")
        check_weight_files(part, "model.safetensors" if _is_model(component) else _DIFFUSERS_WEIGHTS)


def _check_complete(pipe: Any, folder: Path) -> None:
    """diffusers leaves what a file lacks on the meta device, and fails when it is moved from there."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            empty = [key for key, tensor in part.named_parameters() if tensor.is_meta]
            if empty:
                raise WeightsError(f"{folder / name}: its weights lack {listed(empty)}. {AGAIN}")


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}). {AGAIN}") from error
    except StrictError as error:
        raise WeightsError(f"{file}: {error}. {AGAIN}") from error
