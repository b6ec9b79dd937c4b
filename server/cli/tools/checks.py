"""The checks of `multilora doctor`, one function each. A check says what it found and what to do about it.

They write only a probe file in the data directory, and compile the C kernels as a start would.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from adapters_store.base.converted.door import has_text_side, is_converted, is_gguf
from lora_kernels.cgroups import CGROUP, OWN, affinity, cpu_quota, free_host_bytes
from server.api.settings import ApiSettings
from server.cli.common.admin_key import FILE_NAME
from server.cli.common.base_path import find_base
from server.cli.common.database_url import database_url
from server.cli.common.failures import USER_ERRORS, CommandError, failure_of
from server.cli.common.listening import ConnectionLimits, allowed_open_files, bound, limits_within
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.common.texts import GIB, size

if TYPE_CHECKING:
    from lora_kernels.self_test import OpCheck

MIN_FREE_BYTES = 2 * GIB


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """fail: serving does not work. warn: it works, but less well, or not with these settings."""

    name: str
    level: Level
    found: str
    advice: str = ""


def check_python() -> Check:
    """For the report; the installer refuses a Python that is too old."""
    return Check("python", Level.OK, f"{platform.python_version()}, {platform.platform(terse=True)}")


def check_package(name: str, *, without: str = "") -> Check:
    """Installed in a declared version, and importable. without: what is off if it is missing; none: it is required."""
    missing = Level.WARN if without else Level.FAIL
    declared = _requirement(name)
    try:
        found = version(name)
        importlib.import_module(name)
    except PackageNotFoundError:
        return Check(name, missing, "not installed", f"{without}pip install '{declared}'")
    except (ImportError, OSError, RuntimeError) as error:
        return Check(name, missing, f"{found} does not import: {error}", f"{without}reinstall {declared}")
    if declared.specifier.contains(found, prereleases=True):
        return Check(name, Level.OK, found)
    return Check(name, missing, found, f"{without}pip install '{declared}'")


def _requirement(name: str) -> Requirement:
    declared = [Requirement(line) for line in requires("multilora") or ()]
    found = next(each for each in declared if each.name == name)
    return Requirement(f"{name}{found.specifier}")


def check_native() -> Check:
    from lora_kernels.native.build import native_build

    native = native_build()
    if native.library is not None:
        return Check("C kernels", Level.OK, native.reason)
    return Check("C kernels", Level.WARN, native.reason, "torch serves more slowly; install a C compiler (gcc)")


def check_bf16(cpu_info: Path = Path("/proc/cpuinfo")) -> Check:
    """Whether the CPU multiplies bfloat16 itself."""
    flags = set(_cpu_flags(cpu_info))
    known = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16", "sve2"})
    if known:
        return Check("bf16", Level.OK, ", ".join(known))
    found = "no bf16 instructions" if flags else "not known on this system"
    return Check("bf16", Level.WARN, found, "on the CPU, --dtype float32 may be faster")


def _cpu_flags(cpu_info: Path) -> list[str]:
    if not cpu_info.is_file():
        return []
    lines = cpu_info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "").split()


def check_cpus(cgroup: Path = CGROUP, own: Path = OWN) -> Check:
    """The CPUs that this process may use: fewer than the machine has in a container or a unit with a quota."""
    cpus, quota = affinity(), cpu_quota(cgroup, own)
    if quota is None or quota >= cpus:
        return Check("CPUs", Level.OK, str(cpus))
    found = f"{quota:g} of {cpus}: the control group's quota"
    if quota < 1:
        return Check("CPUs", Level.WARN, found, "every step waits for its share of each 100 ms; give it a whole CPU")
    return Check("CPUs", Level.OK, found)


def check_open_files(allowed: int | None = None) -> Check:
    """Whether the system's limit leaves room for the connections that a server takes by default."""
    files = allowed_open_files() if allowed is None else allowed
    asked = ConnectionLimits(ApiSettings.max_connections, ApiSettings.max_connections_per_address)
    advice = "raise the hard limit: ulimit -Hn, LimitNOFILE= of a unit, --ulimit nofile= of docker"
    try:
        total = limits_within(asked, files).total
    except CommandError as error:
        return Check("open files", Level.FAIL, failure_of(error).line, advice)
    if total < asked.total:
        return Check("open files", Level.WARN, f"{files}: {total} connections, not {asked.total}", advice)
    return Check("open files", Level.OK, str(files))


def check_gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", Level.OK, "none; the CPU serves")
    free, total = torch.cuda.mem_get_info()
    found = f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free"
    if importlib.util.find_spec("triton") is None:
        return Check("GPU", Level.WARN, found, "install triton: pip install 'multilora[gpu]'")
    return Check("GPU", Level.OK, found)


def check_kernels() -> Iterator[Check]:
    """One line per operation, each against its reference on the device; none without a GPU or Triton."""
    import torch

    from lora_kernels.self_test import self_test
    from lora_kernels.triton_common.available import has_triton

    if torch.cuda.is_available() and has_triton():
        yield from kernel_checks(self_test(torch.device("cuda")))


def kernel_checks(results: Sequence[OpCheck]) -> Iterator[Check]:
    """A wrong operation is a warning: torch runs it instead, slower."""
    from lora_kernels.triton_common.available import ENVIRONMENT, OPS

    for op in OPS:
        own = [result for result in results if result.op == op]
        wrong = [result for result in own if not result.is_ok]
        if wrong:
            advice = f"torch runs it instead, slower (as with {ENVIRONMENT}={op}); please report this device"
            yield Check(f"kernel: {op}", Level.WARN, wrong[0].text, advice)
        elif own:
            yield Check(f"kernel: {op}", Level.OK, f"{len(own)} cases equal their reference")


def check_data_dir(data_dir: Path) -> Check:
    """Whether files can be created there, or the folder itself in its first existing parent."""
    place = next(each for each in (data_dir.absolute(), *data_dir.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        advice = "give a --data-dir (or MULTILORA_DATA_DIR) that this user may write"
        return Check("data dir", Level.FAIL, f"{data_dir}: {error.strerror}", advice)
    key = data_dir / FILE_NAME
    if key.exists() and key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Check("data dir", Level.WARN, f"other users can read {key}", f"chmod 600 {key}")
    return Check("data dir", Level.OK, str(data_dir) if place == data_dir.absolute() else f"{data_dir} (to be created)")


def check_store(data_dir: Path, output: Output) -> Check:
    try:
        if database_url(None) is None and not (data_dir / "multilora.db").exists():
            return Check("store", Level.OK, "none yet")
        with opened(data_dir, output) as store:
            return Check(
                "store", Level.OK, f"{len(store.tenants.list_tenants())} tenants, {len(store.list_versions())} adapters"
            )
    except USER_ERRORS as error:
        return Check(
            "store",
            Level.FAIL,
            failure_of(error).line,
            "restore it from a backup, or give another --data-dir or database",
        )


def check_memory(base: str | None, cgroup: Path = CGROUP) -> Check:
    """Free memory, compared with the base's weights if a base is given."""
    free = free_host_bytes(cgroup)
    if free is None:
        return Check("memory", Level.WARN, "not known on this system", "give --kv-cache-mib and --host-cache-mib")
    needed = _weight_bytes(base)
    found = f"{size(free)} free" + (f", the base takes {size(needed)}" if needed else "")
    if free < needed:
        return Check("memory", Level.FAIL, found, "use a smaller base, or --quantize nf4")
    if free < max(MIN_FREE_BYTES, needed * 5 // 4):
        return Check("memory", Level.WARN, found, "little is left for the KV cache and adapters")
    return Check("memory", Level.OK, found)


def _weight_bytes(base: str | None) -> int:
    if base is None:
        return 0
    try:
        return sum(file.stat().st_size for file in find_base(base)[0].glob("*.safetensors"))
    except USER_ERRORS:
        return 0  # `check_base` says so


def check_base(base: str) -> Check:
    """All of a base except its weights' values."""
    try:
        folder, name = find_base(base)
        from server.cli.common.base_path import describe, faults_of_the_base
        from server.engine.text.tokenizer import Tokenizer

        found = describe(folder, name)
        with faults_of_the_base(folder):
            chat = Tokenizer.load(folder).has_chat_template
    except USER_ERRORS as error:
        return Check("base", Level.FAIL, failure_of(error).line, "a local folder of a supported model is needed")
    text = f"{found.architecture}, {found.dtype}, {len(found.modules)} layers that take adapters"
    if is_converted(Path(base).expanduser()):
        text += f"; {_how_converted(Path(base).expanduser())} {folder}"
    if not chat:
        return Check("base", Level.WARN, text, "no chat template: /v1/chat/completions answers 400")
    return Check("base", Level.OK, text)


def _how_converted(base: Path) -> str:
    if has_text_side(base):
        return "only its text side, written in"
    return f"dequantised from {'GGUF' if is_gguf(base) else 'FP8'} into"


def check_port(host: str, port: int) -> Check:
    try:
        bound(host, port).close()
    except (CommandError, OSError) as error:
        return Check(
            "port", Level.WARN, failure_of(error).line, "a server may be running; otherwise give another --port"
        )
    return Check("port", Level.OK, f"{host}:{port} is free")
