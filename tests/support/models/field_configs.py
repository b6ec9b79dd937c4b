"""adapter_config.json files as found, against PEFT: `python -m support.models.field_configs FOLDER` in `tests/`.

FOLDER/FAMILY/*.json. FAMILY is a toy base of `models` or an architecture of `picture_models`; files of other folders
are counted by the folder's name. PEFT reads each file, makes the adapter that it describes on the toy base with random
values and saves it. Then PEFT and our reader load the file as found with PEFT's weights, and the logits are compared.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from adapters_store.base.converted.door import folder_of
from adapters_store.errors import AdapterRejected
from adapters_store.parsing.adapter_files import CONFIG_FILE
from server.engine.model.base_model import BaseModel, load_base
from support.models import picture_models
from support.models.models import FAMILY_NAMES, MORE_FAMILY_NAMES, config_of, save_base
from support.models.packed_forward import PackedForward

EQUAL, DIFFERENT = "equal", "different"
TOLERANCE = 1e-4  # of the largest logit, or absolute where that is below 1
PROMPT = [5, 9, 30, 41, 7, 77, 3, 120, 64, 64, 8, 19, 33, 90, 150, 11]


@dataclass(frozen=True)
class Toy:
    """A base of a family, and the same as it is served. folder: what PEFT loads."""

    folder: Path
    served: BaseModel
    has_pictures: bool

    def plain(self) -> Any:
        kind = AutoModelForImageTextToText if self.has_pictures else AutoModelForCausalLM
        return kind.from_pretrained(self.folder, local_files_only=True, attn_implementation="eager").eval()


@dataclass(frozen=True)
class Outcome:
    """verdict: EQUAL, DIFFERENT or the refusal's code."""

    name: str
    verdict: str
    detail: str = ""


def num_layers(body: dict[str, Any]) -> int:
    """One more than the last layer that the config names, or 0."""
    named = body.get("layers_to_transform") or []
    indices = [named] if isinstance(named, int) else list(named)
    indices += [int(index) for index in re.findall(r"layers\.(\d+)\.", str(body.get("target_modules")))]
    return max(indices, default=-1) + 1


def make_toy(folder: Path, family: str, layers: int) -> Toy:
    """layers: how many it has at least."""
    if family in picture_models.CONFIGS:
        whole = picture_models.save_whole(folder, family)
        return Toy(whole, load_base(folder_of(whole), dtype="float32"), has_pictures=True)
    changes: dict[str, Any] = {}
    config = config_of(family)
    if layers > config.num_hidden_layers:
        changes["num_hidden_layers"] = layers
        if types := getattr(config, "layer_types", None):
            changes["layer_types"] = (types * layers)[:layers]
    save_base(folder, family, **changes)
    return Toy(folder, load_base(folder, dtype="float32"), has_pictures=False)


def make_adapter(file: Path, toy: Toy, folder: Path) -> None:
    """What the file describes, by PEFT: random A, B and trained copies; then the file as it was found."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(file.read_bytes())
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    model = get_peft_model(toy.plain(), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))
    (folder / CONFIG_FILE).write_bytes(file.read_bytes())


def outcome(file: Path, toy: Toy, folder: Path) -> Outcome:
    """folder: where the adapter goes, not there yet."""
    make_adapter(file, toy, folder)
    try:
        forward = PackedForward(toy.served, [folder], num_sequences=1)
    except AdapterRejected as error:
        return Outcome(file.name, error.code, error.message)
    [got] = forward.logits([forward.request(0, PROMPT, 0)])
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        without = toy.plain()(input_ids=tokens).logits[0]
        expected = PeftModel.from_pretrained(toy.plain(), str(folder)).eval()(input_ids=tokens).logits[0]
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    error, effect = (float((other - expected).abs().max()) for other in (got, without))
    verdict = EQUAL if error <= limit < effect / 10 else DIFFERENT
    return Outcome(file.name, verdict, f"error {error:.1e}, limit {limit:.1e}, the adapter's effect {effect:.1e}")


def outcomes(folder: Path, family: str, space: Path) -> Iterator[Outcome]:
    """Of all files of the folder, by name. space: an empty folder for bases and adapters."""
    toys: dict[int, Toy] = {}
    for file in sorted(folder.glob("*.json")):
        layers = num_layers(json.loads(file.read_bytes()))
        if layers not in toys:
            toys[layers] = make_toy(space / f"base-{layers}", family, layers)
        yield outcome(file, toys[layers], space / f"adapter-{file.stem}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m support.models.field_configs")
    parser.add_argument("folder", type=Path, help="holds a folder of adapter_config.json files for each family")
    folder = parser.parse_args(arguments).folder
    disable_progress_bar()
    families = {*FAMILY_NAMES, *MORE_FAMILY_NAMES, *picture_models.CONFIGS}
    total = Counter[str]()
    for each in sorted(path for path in folder.iterdir() if path.is_dir()):
        if each.name not in families:
            print(f"{each.name}: {len(list(each.glob('*.json')))}, not served")
            continue
        with TemporaryDirectory() as space:
            found = list(outcomes(each, each.name, Path(space)))
        verdicts = Counter(one.verdict for one in found)
        total += verdicts
        print(f"{each.name}: {dict(verdicts)}", flush=True)
        for one in found:
            if one.verdict != EQUAL:
                print(f"  {one.name}: {one.verdict}: {one.detail}")
    print(f"of served families: {dict(total)}")


if __name__ == "__main__":
    main()
