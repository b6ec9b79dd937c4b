"""Starts the ranks of one training on several machines by Ray Train: the entrypoint of a Ray job. Exits as the run did.

`python -m server.jobs.tasks.ray_train --nodes N --ranks R -- PYTHON -P -m trainer SPEC --run-dir DIR [--resume]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.run_folder.folder import Exit, RunFolder

_RETRYABLE = (Exit.SUCCEEDED, Exit.PAUSED, Exit.CANCELLED)


def train_ranks(config: dict[str, Any]) -> None:
    """One rank; Ray Train has made the process group. Raises RuntimeError, which ends the other ranks too."""
    from trainer.__main__ import trained

    code = trained(Path(config["spec"]), Path(config["run_dir"]), resume=config["resume"])
    if code not in _RETRYABLE:
        raise RuntimeError(f"the trainer ended with exit code {code.value}")


def run(config: dict[str, Any], *, num_workers: int) -> int:
    """The run's exit code, from its result."""
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = RunFolder(Path(config["run_dir"]))
    ray.init(log_to_driver=True)
    use_gpu = ray.cluster_resources().get("GPU", 0) >= num_workers
    ranks = TorchTrainer(
        train_ranks,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, placement_strategy="SPREAD"),
        run_config=RunConfig(name="ray", storage_path=str(folder.path)),
    )
    try:
        ranks.fit()
    except TrainingFailedError as error:
        print(error, file=sys.stderr)
        return int(folder.result().get("exit_code", Exit.FAILED))
    return int(folder.result().get("exit_code", Exit.SUCCEEDED))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.jobs.tasks.ray_train", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("command", nargs="+", help="the trainer's command, after --")
    options = parser.parse_args(arguments)
    words = options.command[options.command.index("trainer") + 1 :]
    config = {"spec": words[0], "run_dir": words[words.index("--run-dir") + 1], "resume": "--resume" in words}
    return run(config, num_workers=options.nodes * options.ranks)


if __name__ == "__main__":
    sys.exit(main())
