"""EVA's start: A from the principal directions of each layer's inputs on this data. Knows PEFT's routine; no loss.

Source: Explained Variance Adaptation, arXiv 2410.07170. PEFT redistributes ranks between layers and may leave some out.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from torch import Tensor

from trainer.data.types import PackedBatch
from trainer.model.model import Trainee

MAX_BATCHES = 64  # PEFT cycles through them until the directions have settled


def start_from_data(trainee: Trainee, batches: Iterable[PackedBatch]) -> None:
    """Replace the seeded A of every layer; B stays zero. batches: training forwards, the same in every start."""

    def forward(model: Any, batch: dict[str, Tensor]) -> None:
        trainee.logits(batch["input_ids"], batch["position_ids"])

    def rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
        tensor: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        return tensor.reshape(-1, tensor.shape[-1]).float()

    assert trainee.peft is not None, "only an adapter starts from data"
    with trainee.evaluating():
        initialize_lora_eva_weights(
            trainee.peft,
            [{"input_ids": each.input_ids, "position_ids": each.position_ids} for each in islice(batches, MAX_BATCHES)],
            forward_fn=forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=rows,
            show_progress_bar=False,
        )
    for weight in trainee.trained():
        weight.data = weight.data.to(torch.float32)
