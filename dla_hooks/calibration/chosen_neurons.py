"""The neurons of some layers, or a refusal that says why there are none."""

from __future__ import annotations

from dla_hooks.calibration.last_maps import NeuronSite, neuron_sites
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.residual.stream import Stream, WriteSite


def chosen_neurons(
    stream: Stream, layers: tuple[int, ...] | None
) -> list[tuple[WriteSite, NeuronSite, int]]:
    """The writes with neurons in some layers, each with its number among those of its block.

    Args:
        stream: the located model.
        layers: which; None for all that have neurons.

    Raises:
        InputError: for a layer that the model does not have.
        UnsupportedModelError: for a model, or a layer that was asked for, without neurons.
    """
    every = [block.layer for block in stream.blocks]
    unknown = [layer for layer in layers or () if layer not in every]
    if unknown:
        raise InputError(
            f"layers={unknown[0]} is not there: {stream.backend.name} runs the layers "
            f"{every[0]} to {every[-1]}"
        )
    sites = neuron_sites(stream)
    found = list[tuple[WriteSite, NeuronSite, int]]()
    for block in stream.blocks:
        own = [write for write in block.writes if write.label in sites]
        if layers is not None and block.layer not in layers:
            continue
        if layers is not None and not own:
            raise _no_neurons(f"layer {block.layer} of {stream.backend.name}", "leave it out")
        found += [(write, sites[write.label], sub) for sub, write in enumerate(own)]
    if not found:
        what = f"{stream.backend.name}{stream.extent}"
        raise _no_neurons(what, "attribute whole sublayers (leave out unit=)")
    return found


def _no_neurons(what: str, instead: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} has no MLP whose output one linear map makes, and so no neurons with a direct "
        "path to the stream; experts, and MLPs whose output is gated, have none. Instead, "
        f"{instead}"
    )
