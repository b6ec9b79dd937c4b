"""What of an adapter is served, by family of its base and by field of its config: the tables of docs/adapters.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

from adapters_store.base.families import FAMILIES, HEAD
from adapters_store.format.config_fields import FIXED_FIELDS, FREE_FIELDS, READ_FIELDS, UNSUPPORTED_FIELDS
from support.reference.table import table

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
BEGIN, END = "<!-- written by make reference -->\n", "<!-- end -->\n"
_PARTS = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)

# READ_FIELDS -> what is served of each.
SERVED = {
    "r": "1 to 256",
    "lora_alpha": "any number up to a million, also negative or a fraction",
    "use_rslora": "true and false",
    "use_dora": "true and false; on the embedding and with `alora_invocation_tokens` `unsupported_dora`",
    "rank_pattern": "plain names, also behind `.*\\.`; another regular expression is `regex_pattern`",
    "alpha_pattern": "as `rank_pattern`",
    "target_modules": "names, ends of paths, whole paths, `all-linear`, or a regular expression; empty only "
    "beside `target_parameters`",
    "exclude_modules": "names, ends of paths, whole paths, or a regular expression",
    "layers_to_transform": "a number or a list, with a list of targets",
    "layers_pattern": "plain names; a regular expression is `regex_pattern`",
    "init_lora_weights": "true, false, `gaussian`, `eva`, `orthogonal`, `mica`; else `base_altering_init`",
    "alora_invocation_tokens": '1 to 256 token ids: an activated LoRA, with `"CAUSAL_LM"`; else `bad_field`',
    "modules_to_save": "the embedding and the head, of the base's size; else `unsupported_modules_to_save`",
    "target_parameters": "of a base with experts: theirs, the router's weight; else `unsupported_target_parameters`",
    "multilora_adapter_dtype": "`int8`: kept and served as bytes; else `unknown_adapter_dtype`",
    "multilora_base_digest": "the base that the adapter is for; another one is `wrong_base`",
    "multilora_chat_template": "its own chat template ([tools.md](tools.md))",
    "multilora_tool_dialect": "its own tool dialect ([tools.md](tools.md))",
}


def families() -> str:
    """One row for each served architecture."""
    rows = []
    for family in FAMILIES.values():
        names = dict.fromkeys(path.rpartition(".")[2] for group in family.layer_groups for path in group)
        served = ", ".join(f"`{name}`" for name in (*names, HEAD))
        experts = ", ".join(f"`{path.partition('.')[2]}`" for path in (*family.experts, f"{family.router}.weight"))
        rows.append((f"`{family.architecture}`", f"{served}; {experts}" if family.experts else served))
    return table(("architecture", "layers that an adapter may target"), rows)


def fields() -> str:
    """One row for each field that PEFT writes, or that is ours."""
    assert SERVED.keys() == READ_FIELDS
    rows = [(f"`{name}`", text) for name, text in SERVED.items()]
    rows += [(f"`{name}`", _only(allowed, code)) for name, (allowed, code) in FIXED_FIELDS.items()]
    rows += [(f"`{name}`", _only(neutral, code)) for name, (code, neutral) in sorted(UNSUPPORTED_FIELDS.items())]
    rows.append((", ".join(f"`{name}`" for name in sorted(FREE_FIELDS)), "anything of its type: it changes no answer"))
    return table(("field", "served"), rows)


def _only(values: tuple[object, ...], code: str) -> str:
    return f"{' or '.join(f'`{json.dumps(value)}`' for value in values)}; else `{code}`"


def page(text: str) -> str:
    """The page with today's tables between its marks, families first."""
    tables = iter((families(), fields()))
    return _PARTS.sub(lambda _: BEGIN + next(tables) + END, text)
