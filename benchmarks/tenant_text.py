"""What drafts from an adapter's earlier answers gain and cost one stream: the same engine with them and without.

The demo's base and tenants. The server has answered a tenant's questions before; then it is asked in new wordings, one
question after another, on topics that it was asked about or on new ones. Hot answers are drawn at temperature 1.5.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from adapters_store.base.description import AdapterDigest
from adapters_store.store import AdapterStore
from benchmarks.common.adapters import TENANT
from benchmarks.common.drafts import DraftRun, answer, draft_run, drafts_row, plot_drafts, print_drafts
from benchmarks.common.report import Report
from benchmarks.common.timing import interleaved
from server.demo.assets import ADAPTERS_FOLDER, BASE_FOLDER
from server.demo.recipe.questions import questions
from server.demo.recipe.styles import TENANTS, Style
from server.demo.recipe.texts import load_topics
from server.engine.request import Request, SamplingParams
from server.engine.schedule import CPU_STEP
from server.engine.scheduling.prompt_lookup import PromptLookup
from server.engine.startup.build import EngineParts, build_engine
from server.engine.startup.settings import EngineSettings
from server.engine.text.chat_options import ChatOptions
from server.engine.text.tokenizer import Tokenizer

HOT = 1.5
QUESTIONS_A_ROUND = 12
MAX_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Case:
    """is_new: the topics of its questions are not in what was answered before."""

    tenant: Style
    is_new: bool
    temperature: float
    target: float  # tokens per second with drafts from earlier answers / without

    @property
    def name(self) -> str:
        return f"{self.tenant}, {'new' if self.is_new else 'known'} topics{', hot' if self.temperature else ''}"


CASES = [
    *(Case(tenant, is_new=False, temperature=0.0, target=1.5) for tenant in TENANTS),
    *(Case(tenant, is_new=True, temperature=0.0, target=0.98) for tenant in TENANTS),
    Case(Style.LAW, is_new=False, temperature=HOT, target=0.98),
]


@dataclass(frozen=True, slots=True)
class Prompts:
    """A tenant's questions: those answered before, and new wordings on their topics and on others."""

    before: list[str]
    known: list[str]
    new: list[str]

    @classmethod
    def drawn(cls, num_before: int) -> Prompts:
        rng = random.Random(5)
        topics = load_topics()
        new = {id(topic) for topic in rng.sample(topics, len(topics) // 5)}
        asked = list(questions(topics))
        rng.shuffle(asked)
        return cls(
            [each.prompt for each in asked if not each.held_out and id(each.topic) not in new][:num_before],
            [each.prompt for each in asked if each.held_out and id(each.topic) not in new],
            [each.prompt for each in asked if each.held_out and id(each.topic) in new],
        )


class Bench:
    """The engine with the demo's adapters."""

    def __init__(self, parts: EngineParts, digests: dict[Style, AdapterDigest]) -> None:
        self.engine, self._digests = parts.engine, digests
        self._tokenizer = Tokenizer.load(BASE_FOLDER)
        self._num_requests = 0

    def request(self, tenant: Style, prompt: str, temperature: float, seed: int) -> Request:
        self._num_requests += 1
        ids = self._tokenizer.encode_chat([{"role": "user", "content": prompt}], ChatOptions())
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=temperature, seed=seed, end_ids=tuple(self._tokenizer.chat_end_ids)
        )
        return Request(f"t{self._num_requests}", TENANT, ids, params, self._digests[tenant])

    def lookup(self, tenant: Style | None, before: Sequence[str], temperature: float = 0.0) -> PromptLookup:
        """With what the tenant's adapter answered before; None: with drafts from a request's own text alone."""
        lookup = self.engine.scheduler.lookup = PromptLookup(CPU_STEP.drafts, self.engine.scheduler.pool)
        if tenant is None:
            lookup.phrases = None
        else:
            requests = [self.request(tenant, prompt, temperature, seed) for seed, prompt in enumerate(before)]
            answer(self.engine, requests)
        return lookup

    def runner(self, case: Case, prompts: Prompts, lookup: PromptLookup, num: int) -> Callable[[], DraftRun]:
        """The same num questions with and without, and new ones in each round."""
        pool = prompts.new if case.is_new else prompts.known
        starts = iter(range(0, len(pool), num))

        def run() -> DraftRun:
            start = next(starts)
            chosen = pool[start : start + num]
            requests = [self.request(case.tenant, prompt, case.temperature, 7 + start) for prompt in chosen]
            self.engine.scheduler.lookup = lookup
            return draft_run(self.engine, [[request] for request in requests])

        return run


@contextmanager
def demo_bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        store = AdapterStore.open(Path(stack.enter_context(TemporaryDirectory())))
        stack.callback(store.close)
        parts = build_engine(EngineSettings(base=BASE_FOLDER, device="cpu"), store)
        stack.callback(parts.close)
        store.tenants.create(TENANT)
        digests = {
            tenant: store.publish(
                tenant=TENANT,
                name=tenant,
                config=(ADAPTERS_FOLDER / tenant / "adapter_config.json").read_bytes(),
                weights=ADAPTERS_FOLDER / tenant / "adapter_model.safetensors",
                base=parts.base.description,
            ).digest
            for tenant in TENANTS
        }
        yield Bench(parts, digests)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("tenant_text", __doc__, arguments)
    prompts = Prompts.drawn(40 if report.quick else 600)
    num = 5 if report.quick else QUESTIONS_A_ROUND
    with demo_bench() as bench:
        plain = bench.lookup(None, [])
        cases: dict[str, Callable[[], DraftRun]] = {}
        for case in CASES:
            lookup = bench.lookup(case.tenant, prompts.before, case.temperature)
            cases[f"{case.name}, without"] = bench.runner(case, prompts, plain, num)
            cases[f"{case.name}, with"] = bench.runner(case, prompts, lookup, num)
        runs = interleaved(
            cases,
            rounds=2 if report.quick else 5,
            say=report.say,
            show=lambda run: f"{run.tokens_per_s:.1f} tok/s",
        )
    rows = [
        drafts_row(case.name, case.target, runs[f"{case.name}, without"], runs[f"{case.name}, with"], drafts="drafted")
        for case in CASES
    ]
    report.write_csv(rows)
    title = "An answer in phrases that the adapter used before comes sooner"
    plot_drafts(report, rows, title, drafts="drafts from earlier answers")
    print_drafts(report, "Drafts from earlier answers, medians over rounds", rows, drafts="drafted", digits=0)


if __name__ == "__main__":
    main()
