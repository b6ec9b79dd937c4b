"""Makes the demo's two agents with this project's own trainer, and scores their calls as the gate does.

`python -m server.demo.recipe.make_agents --out DIR` takes some minutes on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from adapters_store.base.tokenizer import load_tokenizer
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from server.demo.assets import AGENTS_FOLDER, BASE_FOLDER, BASE_NAME
from server.demo.recipe.agents import Agent, Line, load_agents
from server.engine.model.base_model import load_base
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.calls import measure_calls
from server.jobs.gate.serving_scorer import ScorerSettings, ServingScorer, pack_folder
from trainer.data.encode import Encoder, encode_all
from trainer.data.jsonl import read_jsonl
from trainer.gate.answers.calls import CallScores
from trainer.run import train
from trainer.run_folder.folder import Exit, RunFolder
from trainer.spec import AdapterSpec, BatchSpec, OptimSpec, TrainSpec

EPOCHS = 2
RANK = 8
# The base has read no brackets and few digits, so their rows of its head are all alike: the adapters learn these, too.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
HELD_OUT = 40  # of which the gate asks 32
MAX_TOKENS = 256


def make_agent(agent: Agent, base: Path, out: Path, *, num_lines: int | None = None) -> None:
    """Train one agent and write its adapter to `out`: bfloat16, and the config holds its dialect and template."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        spec = TrainSpec(
            base=base,
            data=write_lines(agent.lines(num_lines or agent.num_lines), Path(folder) / "lines.jsonl"),
            validation=write_lines(agent.lines(HELD_OUT, held_out=True), Path(folder) / "held_out.jsonl"),
            adapter=AdapterSpec(rank=RANK, target_modules=MODULES),
            optim=OptimSpec(learning_rate=6e-3, epochs=EPOCHS),
            batch=BatchSpec(examples=16, max_sequence_length=MAX_TOKENS, micro_tokens=1024),
            tool_dialect=agent.dialect,
            adapter_dtype=None,
            chat_template=agent.template,
        )
        if train(spec, run) != Exit.SUCCEEDED:
            raise SystemExit(f"the training of {agent.tenant} was stopped")
        _write_small(RunFolder(run).adapter, out)


def write_lines(lines: Iterable[Line], path: Path) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _write_small(adapter: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": BASE_NAME, "target_modules": sorted(config["target_modules"])}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def score_agent(agent: Agent, base: Path, adapter: Path) -> CallScores:
    """The adapter's answers to questions that no training line has, asked as the server asks."""
    served, tokenizer = load_base(base), Tokenizer.load(base)
    settings = ScorerSettings(max_tokens=1024, vocabulary=tokenizer.vocabulary(served.num_embeddings))
    scorer = ServingScorer(served, pack_folder(adapter, served), settings)
    with TemporaryDirectory() as folder:
        path = write_lines(agent.lines(HELD_OUT, held_out=True), Path(folder) / "held_out.jsonl")
        encoder = Encoder(
            load_tokenizer(base),
            max_sequence_length=MAX_TOKENS,
            tool_dialect=agent.dialect,
            chat_template=agent.template,
        )
        examples = encode_all(read_jsonl(path).records(), encoder, what="validation")
        scores = measure_calls(scorer, tokenizer, path, examples, agent.dialect, template=agent.template)
    assert scores is not None, "every held-out line has tools"
    return scores


def main(
    base: Annotated[Path, typer.Option(help="folder of the base")] = BASE_FOLDER,
    out: Annotated[Path, typer.Option(help="folder to write, one subfolder per tenant")] = AGENTS_FOLDER,
    lines: Annotated[int | None, typer.Option(min=40, help="training lines per agent")] = None,
) -> None:
    """Train and score the demo's two agents."""
    disable_progress_bar()
    console = Console()
    for tenant, agent in load_agents().items():
        make_agent(agent, base, out / tenant, num_lines=lines)
        console.print(tenant, agent.dialect, score_agent(agent, base, out / tenant), highlight=False)


if __name__ == "__main__":
    typer.run(main)
