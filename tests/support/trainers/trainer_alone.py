"""Programs for a resident process that make no use of what it holds: a run or a gate as in a process of its own."""

from __future__ import annotations

from trainer.__main__ import main as train


def main(arguments: list[str], held: object) -> int:
    """`train SPEC ...` or `gate RUN_DIR ...`; says first what was proved of the base that is held."""
    from server.jobs.gate.process import main as gate

    what, *rest = arguments
    print(f"proved {getattr(held, 'packing_difference', None)!r}", flush=True)
    return {"train": train, "gate": gate}[what](rest)
