"""The report's tables and figures as words: the measurement, its limit, its unit. Knows gate.json only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Tile:
    """One figure in large print."""

    value: str
    label: str


@dataclass(frozen=True)
class Check:
    """One row of the gate's table. level: ok, warn, block, or skipped if nothing was judged."""

    name: str
    measured: str
    limit: str
    level: str


@dataclass(frozen=True)
class LayerKind:
    """All layers of one name (q_proj, ...). used: median effective rank over rank, 0 to 1."""

    name: str
    count: int
    rank: str
    used: float
    relative_norm: str


def tiles_of(result: Body, gate: Body) -> list[Tile]:
    """The figures at the top of the page; without unknown ones."""
    tiles = []
    if held_out := gate.get("held_out"):
        losses, gain = f"{_loss(held_out['base_loss'])} → {_loss(held_out['adapter_loss'])}", held_out["gain"]
        tiles.append(Tile(losses, "held-out loss, base → adapter"))
        tiles.append(Tile(_signed(gain["estimate"]), f"gain in nats per token, {interval_text(gain)}"))
    figures: tuple[tuple[str, Callable[[Any], str], str], ...] = (
        ("tokens_per_s", "{:,.0f}".format, "training tokens per second"),
        ("peak_bytes", bytes_text, "peak memory in training"),
        ("wall_s", duration_text, "wall time of training"),
        ("num_trained_parameters", "{:,}".format, "trained parameters"),
    )
    return [*tiles, *(Tile(text(result[name]), label) for name, text, label in figures if result.get(name))]


def checks_of(gate: Body) -> list[Check]:
    """Every check that was made."""
    levels = {finding["code"]: finding["level"] for finding in gate.get("findings", ())}
    rows = [*_held_out_checks(gate), *_preference_checks(gate), *_general_checks(gate), *_other_checks(gate)]
    return [Check(name, measured, limit, _worst(levels, codes)) for name, measured, limit, codes in rows]


_Row = tuple[str, str, str, Sequence[str]]


def _held_out_checks(gate: Body) -> list[_Row]:
    found = gate.get("held_out")
    if not found:
        return []
    limits = gate["thresholds"]
    gain, sweep = found["gain"], found["sweep"]
    count = gain["num_examples"]
    losses = ", ".join(f"{_number(loss)} at {scale}" for scale, loss in sweep.items())
    codes = ("worse_than_base", "no_better_than_base", "gain_unclear", "few_examples", "non_finite_loss")
    return [
        (
            f"better than the base on {count} held-out examples",
            f"{_signed(gain['estimate'])} nats, {interval_text(gain)}",
            "interval above 0",
            codes,
        ),
        _prompt_use_check(found, limits),
        ("no smaller scale is better", losses, f"by at most {limits['sweep_gain']:g} nats", ("overshoots",)),
    ]


def _preference_checks(gate: Body) -> list[_Row]:
    found = gate.get("preference")
    if not found:
        return []
    margin, gain = found["margin"], found["chosen_gain"]
    measured = f"{_signed(margin['estimate'])} nats, {interval_text(margin)}; {found['accuracy']:.0%} of pairs above 0"
    share = f"{found['base_accuracy']:.0%} → {found['adapter_accuracy']:.0%} of chosen answers are the likelier ones"
    limit = f"warn below -{gate['thresholds']['chosen_rise']:g} nats"
    return [
        (
            f"prefers chosen answers on {margin['num_examples']} held-out pairs",
            f"{measured}; {share}",
            "interval above 0",
            ("prefers_rejected", "preference_unclear", "few_examples", "non_finite_loss"),
        ),
        ("keeps the chosen answers likely", f"{_signed(gain['estimate'])} nats", limit, ("chosen_less_likely",)),
    ]


def _prompt_use_check(found: Body, limits: Body) -> _Row:
    """A gate.json of an earlier version has no figures of the base."""
    name, use, base = "uses its prompts: the cost of a wrong prompt", found["prompt_use"], found.get("base_prompt_use")
    least = limits.get("least_prompt_use", 0.0)
    if alike := found.get("num_alike_answers"):
        return name, f"not measured: all {alike} answers are the same", f"at least {least:g} nats", ("one_answer",)
    if not use:
        pairs = found.get("num_prompt_pairs")
        count = "" if pairs is None else f", {pairs} of {limits['min_examples']}"
        return name, f"not measured: too few prompts{count}", f"at least {least:g} nats", ()
    measured = f"{_signed(use['estimate'])} nats, {interval_text(use)}, {use['num_examples']} answers"
    if base:
        measured += f"; the base alone {_signed(base['estimate'])}"
        least = max(least, limits.get("prompt_use_share", 0.0) * (base["estimate"] or 0.0))
    codes = ("ignores_prompt", "prompt_use_unclear", "part_ignores_prompt")
    return name, measured, f"interval above 0, at least {least:.3g} nats", codes


def _general_checks(gate: Body) -> list[_Row]:
    found = gate.get("general")
    if not found:
        return []
    limits = gate["thresholds"]
    measured = f"{_signed(found['rise']['estimate'])} nats, from {_number(found['base_loss'])}"
    if not found["base_knows_it"]:
        measured += "; not judged, the base knows this text no better than a guess"
    limit = f"warn above {limits['general_warn']:g}, block above {limits['general_block']:g}"
    codes = ("forgets", "general_not_finite") if found["base_knows_it"] else ()
    return [(f"rise on general text ({found['source']})", measured, limit, codes)]


def _other_checks(gate: Body) -> list[_Row]:
    rows: list[_Row] = []
    limits, trip, spectrum = gate["thresholds"], gate.get("round_trip"), gate.get("spectrum") or []
    if trip:
        measured = f"{_number(trip['difference'])} ({trip['unit']}, {trip['precision']})"
        rows.append(("served logits are PEFT's", measured, f"at most {trip['limit']:g}", ("round_trip",)))
    if ends := gate.get("endings"):
        measured = f"probability {_number(ends['probability'])} (median of {ends['num_examples']} answers)"
        limit = f"warn below {limits['ending_probability']:g}"
        rows.append(("ends an answer at its end", measured, limit, ("answers_do_not_end",)))
    if (calls := gate.get("calls")) and calls["num_answers"]:
        measured = (
            f"{calls['named']:.0%}, {calls['equal']:.0%} with equal arguments (of {calls['num_answers']} answers)"
        )
        rows.append(("calls the right tools", measured, f"warn below {limits['calls_named']:.0%}", ("wrong_calls",)))
    if int8 := gate.get("int8"):
        limit = f"at most {limits['int8_change']:g} nats"
        rows.append(("int8 keeps the loss", f"{_signed(int8['change'])} nats", limit, ("int8_changes_too_much",)))
    sizes = [module["relative_norm"] for module in spectrum if module["relative_norm"] is not None]
    if sizes:
        limit = f"warn above {limits['relative_norm_warn']:g}, block above {limits['relative_norm_block']:g}"
        rows.append(("largest update over its weight", _number(max(sizes)), limit, ("exploding_norm", "large_update")))
    shares = [module["effective_rank"] / module["rank"] for module in spectrum if module["effective_rank"] is not None]
    shares = [share for share in shares if share] or shares[:1]
    if shares:
        codes = ("rank_collapse", "no_effect", "non_finite_weights")
        floor = f"at least {limits['collapse_share']:.0%}"
        rows.append(("share of its rank that the median layer uses", f"{np.median(shares):.0%}", floor, codes))
    return rows


def layer_kinds(spectrum: Sequence[Body]) -> list[LayerKind]:
    """Layers by the last part of their name, in the order of first appearance."""
    kinds: dict[str, list[Body]] = {}
    for module in spectrum:
        if module["effective_rank"] is not None:
            kinds.setdefault(str(module["name"]).rpartition(".")[2], []).append(module)
    return [_kind(name, modules) for name, modules in kinds.items()]


def _kind(name: str, modules: Sequence[Body]) -> LayerKind:
    ranks = sorted({int(module["rank"]) for module in modules})
    sizes = [module["relative_norm"] for module in modules if module["relative_norm"] is not None]
    return LayerKind(
        name=name,
        count=len(modules),
        rank=f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        used=float(np.median([module["effective_rank"] / module["rank"] for module in modules])),
        relative_norm=_number(max(sizes)) if sizes else "unknown",
    )


def flat(body: Body) -> list[tuple[str, str]]:
    """Nested values as dotted names and words, without empty ones."""
    return [(name, str(value)) for name, value in flat_values(body)]


def flat_values(body: Body, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted name, without empty ones; lists as text."""
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield from flat_values(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else value


def interval_text(interval: Body) -> str:
    """ "95 % from 0.1 to 0.3"."""
    return f"{interval['confidence']:.0%} from {_number(interval['low'])} to {_number(interval['high'])}"


def bytes_text(count: float) -> str:
    """ "1.2 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def duration_text(seconds: float) -> str:
    """ "1 h 5 min", "3 min 20 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _number(value: float | None) -> str:
    if value is None:
        return "∞"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "not finite" if value is None else f"{value:+.3f}"


def _loss(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _worst(levels: Mapping[str, str], codes: Sequence[str]) -> str:
    if not codes:
        return "skipped"
    found = {levels[code] for code in codes if code in levels}
    return "block" if "block" in found else "warn" if found else "ok"
