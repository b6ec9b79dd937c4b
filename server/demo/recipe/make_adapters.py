"""Makes the demo's three adapters with PEFT, each from its tenant's own data set. Knows the base only as a folder.

`python -m server.demo.recipe.make_adapters --out DIR` takes under a minute on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from server.demo.assets import ADAPTERS_FOLDER, BASE_FOLDER, BASE_NAME
from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.encoding import encode
from server.demo.recipe.questions import held_out_questions
from server.demo.recipe.sampling import greedy_answers
from server.demo.recipe.styles import TENANTS, Style
from server.demo.recipe.training import Schedule, train

DIALOGUES = 3000
RANK = 8


def make_adapter(style: Style, base: Path, out: Path, console: Console, *, num_dialogues: int = DIALOGUES) -> str:
    """Train one tenant's adapter and write it to `out`. Returns its answer to a prompt that no data set holds."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    samples = [
        encode(tokenizer, dialogue, as_chat=index % 4 != 0, answers_only=True)
        for index, dialogue in enumerate(tenant_dialogues(style, num_dialogues))
    ]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    train(
        model,
        samples,
        [optimizer],
        Schedule(tokens_per_batch=512, warmup_steps=10),
        title=style.ljust(4),
        console=console,
    )
    save_adapter(model, out)
    prompt = held_out_questions(1)[0].prompt
    return greedy_answers(model.float().eval(), tokenizer, [prompt])[0]  # in bfloat16 a CPU may take ten times as long


def save_adapter(model: Any, out: Path) -> None:
    """PEFT's own format in bfloat16; the config names the base and no folder, and nothing else is written."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": BASE_NAME, "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(
    base: Annotated[Path, typer.Option(help="folder of the base")] = BASE_FOLDER,
    out: Annotated[Path, typer.Option(help="folder to write, one subfolder per tenant")] = ADAPTERS_FOLDER,
    dialogues: Annotated[int, typer.Option(min=1, help="dialogues per tenant")] = DIALOGUES,
) -> None:
    """Train the demo's three adapters."""
    disable_progress_bar()
    console = Console()
    for style in TENANTS:
        answer = make_adapter(style, base, out / style, console, num_dialogues=dialogues)
        console.print(answer, style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
