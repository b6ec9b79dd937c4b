"""The answers that are shown while a run trains are the model's own, whole."""

from __future__ import annotations

import numpy as np
import torch

from adapters_store.base.tokenizer import load_tokenizer
from server.demo.assets import demo_base_path
from support.trainers.training import tiny_spec
from trainer.data.types import EncodedExample
from trainer.model.model import load
from trainer.report.evaluated import EvaluationSamples


def test_an_answer_ends_at_the_end_that_is_learned_not_at_what_a_template_puts_behind_it() -> None:
    """ChatML puts a line break behind each turn: answers ended at their first one."""
    trainee, tokenizer = load(tiny_spec(demo_base_path()), torch.device("cpu")), load_tokenizer(demo_base_path())
    prompt = tokenizer.encode("Who pays for repairs?", add_special_tokens=False)
    with trainee.evaluating():
        likeliest = int(trainee.logits(torch.tensor([prompt]), torch.arange(len(prompt))[None])[-1].argmax())
    end = next(id_ for id_ in range(3, 9) if id_ != likeliest)
    ids = np.array([*prompt, 20, end, likeliest], dtype=np.int32)
    weights = np.array([*[0.0] * len(prompt), 1.0, 1.0, 0.0], dtype=np.float32)
    (sample,) = EvaluationSamples(trainee, tokenizer, [EncodedExample(ids, weights)], 1).taken()
    assert sample["answer"].startswith(tokenizer.decode([likeliest]))
    assert sample["expected"] == tokenizer.decode([20, end], skip_special_tokens=True)
