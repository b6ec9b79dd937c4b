"""Launchers with other tiles than the table's, for a while: what a row of the table is decided with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lora_kernels.attention import triton_launch as attention
from lora_kernels.lora import triton_launch as lora
from lora_kernels.nf4 import triton_nf4 as nf4
from lora_kernels.triton_common.tiles import DeviceTiles, device_tiles

OVERLAPS_FROM = (9, 0)  # compute capability
NO_LIMIT = 1 << 62


@contextmanager
def tiles_instead(tiles: DeviceTiles) -> Iterator[None]:
    """The launchers look it up by name."""

    def chosen(device: torch.device) -> DeviceTiles:
        return tiles

    try:
        _use(chosen)
        yield
    finally:
        _use(device_tiles)


def _use(look_up: object) -> None:
    for module in (lora, nf4, attention):
        setattr(module, "device_tiles", look_up)  # noqa: B010  (it is no part of what they export)


def launch_forms(device: torch.device) -> dict[str, DeviceTiles]:
    """By name, what this device can do for decode rows beside the table's own way."""
    own = device_tiles(device)
    one_launch = replace(own.tiles, one_launch=replace(own.tiles.one_launch, max_bytes=NO_LIMIT))
    forms = {"one_launch": replace(own, tiles=one_launch)}
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= OVERLAPS_FROM:
        forms["overlapped"] = replace(own, tiles=replace(own.tiles, overlaps=True))
    return forms
