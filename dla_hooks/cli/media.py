"""``--image`` and ``--audio``: files beside a prompt, as a model's processor reads them."""

from __future__ import annotations

import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dla_hooks.cli.loading import source_of
from dla_hooks.cli.options import Loading, Media
from dla_hooks.errors import CheckpointError, InputError


def with_media(model: str, loading: Loading, prompt: str, media: Media, loaded: Any) -> Any:
    """The prompt with its images and sounds, as arguments of the model's forward.

    A prompt without placeholders gets one for each file, ahead of the text.

    Args:
        model: as ``MODEL`` was typed.
        loading: how it was loaded.
        prompt: the text.
        media: the files.
        loaded: the model, for its dtype.

    Raises:
        InputError: for a file that cannot be read, and a package that is missing.
        CheckpointError: where the model has no processor.
    """
    images = [_image(path) for path in media.image or ()]
    processor = _processor(model, loading, "images" if images else "sounds")
    sounds = [_sound(path, _rate(processor)) for path in media.audio or ()]
    text = _placed(prompt, processor, "image", len(images))
    text = _placed(text, processor, "audio", len(sounds))
    given: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if images:
        given["images"] = images if len(images) == 1 else [images]
    if sounds:
        given |= {"audio": sounds, "sampling_rate": _rate(processor)}
    try:
        found = processor(**given)
    except (TypeError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        raise InputError(
            f"the processor of {model} ({type(processor).__name__}) does not read this: {error}"
        ) from error
    return {
        name: value.to(loaded.dtype) if _is_float(value) else value for name, value in found.items()
    }


def check_media(media: Media) -> None:
    """Refuse what cannot be read, before a model is loaded.

    Raises:
        InputError: for a file that is not there, and a package that is missing.
    """
    for path in (*(media.image or ()), *(media.audio or ())):
        if not path.is_file():
            raise InputError(f"there is no file {path}")
    if media.image and find_spec("PIL") is None:
        raise InputError("--image needs the package Pillow: run `pip install pillow`")


def _image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _sound(path: Path, rate: int) -> Any:
    import numpy as np

    try:
        with wave.open(str(path)) as file:
            own, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a WAV file ({error}); make one with "
            f"`ffmpeg -i {path} -ac 1 -ar {rate} -c:a pcm_s16le sound.wav`"
        ) from error
    if (own, width) != (rate, 2):
        raise InputError(
            f"{path} has {own} samples a second, of {8 * width} bits, and the model reads {rate} "
            f"of 16; make those with `ffmpeg -i {path} -ac 1 -ar {rate} -c:a pcm_s16le sound.wav`"
        )
    samples = np.frombuffer(frames, dtype="<i2").reshape(-1, channels).mean(-1)
    return (samples / 32768).astype(np.float32)


def _rate(processor: Any) -> int:
    found = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
    return found if isinstance(found, int) else 16000


def _processor(model: str, loading: Loading, what: str) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    source = source_of(model)
    try:
        found = AutoProcessor.from_pretrained(source, trust_remote_code=loading.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{model} has no processor that reads {what} ({str(error).strip().splitlines()[0]}); "
            "save one into the folder with processor.save_pretrained(folder)"
        ) from error
    if not isinstance(found, ProcessorMixin):
        raise CheckpointError(
            f"{model} has no processor that reads {what}, only a {type(found).__name__}; save one "
            "into the folder with processor.save_pretrained(folder)"
        )
    return found


def _placed(text: str, processor: Any, kind: str, count: int) -> str:
    """The text with a placeholder for each file: as many as it has, or ahead of it."""
    token = getattr(processor, f"{kind}_token", None)
    if not isinstance(token, str):
        if count:
            raise InputError(
                f"{type(processor).__name__} has no placeholder for {kind} files; attribute the "
                "mapping that it makes with dla_hooks.direct_logit_attribution"
            )
        return text
    given = text.count(token)
    if given not in (0, count):
        raise InputError(f"the prompt has {given} of {token!r}, and there are {count} {kind} files")
    return text if given or not count else token * count + text


def _is_float(value: Any) -> bool:
    return bool(getattr(value, "is_floating_point", bool)())
