"""The fake model of the simulated worlds, a chain: see `engine_world`. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import Request, TokenConstraint
from support.worlds.world_grammars import drawn, fresh

NAN = -1
EMPTY = 0
TENANTS = ("law", "med", "code")


def next_state(state: int, token: int, weight: int) -> int:
    """A positive number, or NAN for ever after."""
    return NAN if NAN in (state, weight) else (state * 1_000_003 + token * 31 + weight) % 2_147_483_629 + 1


def first_state(request: Request, num_tokens: int, switches: Sequence[int]) -> int:
    """Of a sequence of that many tokens: beyond each switch every state is another one, as LongRoPE's keys are."""
    return 1 + TENANTS.index(request.tenant) + 10 * sum(num_tokens > length for length in switches)


def expected_output(request: Request, weight: int, switches: Sequence[int] = ()) -> list[int]:
    """What the request must answer, computed alone: each token by a forward over all that come before it."""
    output: list[int] = []
    state, constraint = 0, fresh(request.constraint)
    while len(output) < request.params.max_tokens and not is_whole(constraint, output):
        num_tokens = len(request.prompt_ids) + len(output)
        if output and num_tokens - 1 not in switches:
            state = next_state(state, output[-1], weight)
        else:
            state = first_state(request, num_tokens, switches)
            for token in request.prompt_ids + output:
                state = next_state(state, token, weight)
        output.append(drawn(state, constraint, output))
    return output


def is_whole(constraint: TokenConstraint | None, output_ids: Sequence[int]) -> bool:
    if constraint is None:
        return False
    constraint.advance(output_ids)
    assert constraint.failure is None
    return constraint.is_complete
