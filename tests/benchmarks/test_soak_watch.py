"""The soak sees a leak within noise, sees none where there is none, and reads the process and its metrics right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soaking.watch import ProcessSize, metric_values, theil_sen

HOURS = [minute / 60 for minute in range(60)]


def memory_mb(leak_percent_per_h: float, *, seed: int = 0) -> list[float]:
    """500 MB, growing, with 3 MB of noise and every tenth look at a moment that takes 100 MB more."""
    noise = np.random.default_rng(seed).normal(0, 3, len(HOURS))
    peaks = [100 if index % 10 == 9 else 0 for index in range(len(HOURS))]
    return [500 + 5 * leak_percent_per_h * hour + n + p for hour, n, p in zip(HOURS, noise, peaks, strict=True)]


@pytest.mark.parametrize("leak", [-2.0, 2.0, 8.0])
def test_a_leak_is_measured_through_noise_and_peaks(leak: float) -> None:
    slope = theil_sen(HOURS, memory_mb(leak))
    assert slope.low < slope.percent_per_h < slope.high
    assert slope.percent_per_h == pytest.approx(leak, abs=0.6)
    assert (slope.low > 0.0) == (leak > 0.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    slopes = [theil_sen(HOURS, memory_mb(1.0, seed=seed)) for seed in range(200)]
    assert sum(slope.low <= 1.0 <= slope.high for slope in slopes) >= 180


def test_a_steady_process_has_a_slope_of_nothing() -> None:
    slope = theil_sen(HOURS, [500.0] * len(HOURS))
    assert (slope.percent_per_h, slope.low, slope.high) == (0.0, 0.0, 0.0)


GROWS = """
import sys, threading
import numpy as np
print("before", flush=True)
sys.stdin.readline()
taken = np.ones(8_000_000)  # 64 MB
held, over = open(sys.argv[1], "w"), threading.Event()
threading.Thread(target=over.wait, daemon=True).start()
print("after", flush=True)
sys.stdin.readline()
"""


def test_a_process_is_as_large_as_what_it_took(tmp_path: Path) -> None:
    """One that does nothing else: in this process threads of other tests come, go and give memory back."""
    command = [sys.executable, "-c", GROWS, str(tmp_path / "open")]
    sizes = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for word in ("before", "after"):
            assert process.stdout.readline().strip() == word
            sizes.append(ProcessSize.of(process.pid))
            process.stdin.write("\n")
    before, after = sizes
    assert after.rss_mb - before.rss_mb == pytest.approx(64, abs=8)
    assert after.anon_mb - before.anon_mb == pytest.approx(64, abs=8)
    assert (after.num_files - before.num_files, after.num_threads - before.num_threads) == (1, 1)


def test_metrics_are_read_by_name_and_tier() -> None:
    page = """# TYPE a gauge
a 0.5
# TYPE b_total counter
b_total{tier="device"} 3
b_total{tier="host"} 4
# TYPE c_total counter
c_total{tenant="x"} 1
c_total{tenant="y"} 2
"""
    assert metric_values(page) == {"a": 0.5, "b_total/device": 3.0, "b_total/host": 4.0, "c_total": 3.0}
