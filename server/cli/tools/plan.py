"""`multilora plan`: shows what the planner computes, with its assumptions. Starts nothing."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common.options import JsonOption, renamed_option
from server.cli.common.output import Output
from server.cli.tools import plan_texts as texts

if TYPE_CHECKING:
    from trainer.planner.gpus import Gpu
    from trainer.planner.memory import OptimizerState

app = typer.Typer(
    help="Estimate memory, time and cost of training and serving before either starts.", no_args_is_help=True
)

GB = 10**9


class Method(StrEnum):
    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"
    FULL = "full"


class Precision(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A folder with a config.json, a known name, or a count such as 7B.")
]
GpuOption = Annotated[str, typer.Option("--gpu", help="l4, rtx4090, l40s, a100-80, h100, h200 or b200.")]


def _finite(value: float | None) -> float | None:
    """No range of typer's refuses inf."""
    if value is not None and math.isinf(value):
        raise typer.BadParameter(f"must be a finite number, got {value}")
    return value


PriceOption = Annotated[
    float | None, typer.Option("--usd-per-hour", help="Your price per device.", min=0, callback=_finite)
]
DevicesOption = Annotated[int, typer.Option("--devices", help="Devices that share the run.", min=1, max=4096)]
RankOption = Annotated[int, typer.Option("--rank", help="Rank of the adapters, on all linear layers.", min=1, max=256)]


@app.command()
def train(
    *,
    model: ModelOption,
    method: Annotated[
        Method, typer.Option("--method", help="What is trained, and the form of the base.")
    ] = Method.LORA,
    precision: Annotated[Precision, typer.Option("--precision", help="Type of products and frozen weights.")] = (
        Precision.BFLOAT16
    ),
    optimizer_state: Annotated[
        str,
        typer.Option(
            help="Precision of weights, gradients and moments: trainer (ours), zero, bf16-fp32-grads, bf16, "
            "bf16-moments or 8bit-moments."
        ),
    ] = "trainer",
    keeping: Annotated[str | None, renamed_option("--keeping", "--optimizer-state")] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens per example.", min=1)] = 2048,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Examples in one forward.", min=1)] = 1,
    accumulate: Annotated[bool, typer.Option(help="Accumulate gradients over several forwards.")] = True,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
    rank: RankOption = 16,
    zero: Annotated[int, typer.Option("--zero", help="ZeRO stage; 3 is FSDP.", min=0, max=3)] = 0,
    devices: DevicesOption = 1,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to train on, over all epochs.", min=1)] = 10_000_000,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Only this device (default: all known devices).")] = None,
    usd_per_hour: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Memory of a training run on each device, and the hardware, time and cost that it takes."""
    output = Output(as_json=as_json)
    from trainer.planner.hardware import fewest_devices, options, prices_said
    from trainer.planner.memory import Sharding, TrainingCase, memory_need
    from trainer.planner.shapes import shape_named

    case = TrainingCase(
        shape=shape_named(model),
        method=method.value,
        precision=precision.value,
        tokens=sequence_length * micro_batch,
        accumulates=accumulate,
        checkpointing=checkpointing,
        rank=rank,
        optimizer_state=_optimizer_state(keeping or optimizer_state),
        sharding=Sharding(zero, devices),
    )
    need = memory_need(case)
    gpus = _gpus(gpu, usd_per_hour)
    found = options(case, train_tokens=tokens, sequence_length=sequence_length, gpus=gpus)
    assumptions = (*need.assumptions, *(found[0].time.assumptions[2:] if found else ()), prices_said())
    output.emit(
        **texts.need_object(need), hardware=[texts.option_object(each) for each in found], assumptions=assumptions
    )
    texts.show_need(output, need)
    texts.show_options(output, fewest_devices(found), tokens)
    texts.show_lines(output, "assumed", assumptions)


@app.command()
def serve(
    *,
    model: ModelOption,
    gpu: GpuOption = "h100",
    device_gb: Annotated[
        float | None,
        typer.Option(
            "--device-gb", help="The device's memory in 10^9 bytes, instead of --gpu's.", min=0.001, callback=_finite
        ),
    ] = None,
    reserve_gb: Annotated[
        float,
        typer.Option(
            "--reserve-gb", help="Memory reserved for everything else, in 10^9 bytes.", min=0, callback=_finite
        ),
    ] = 2.0,
    kv_tokens: Annotated[int, typer.Option("--kv-tokens", help="KV cache tokens of all running sequences.", min=0)] = 0,
    adapter_mb: Annotated[
        float | None,
        typer.Option(
            "--adapter-mb", help="Size of an adapter in 10^6 bytes, instead of --rank's.", min=0.001, callback=_finite
        ),
    ] = None,
    rank: RankOption = 16,
    host_gb: Annotated[
        float, typer.Option("--host-gb", help="Host memory for adapters, in 10^9 bytes.", min=0, callback=_finite)
    ] = 16.0,
    nf4: Annotated[bool, typer.Option("--nf4", help="4-bit base weights (serve --quantize nf4).")] = False,
    as_json: JsonOption = False,
) -> None:
    """How many adapters one server holds besides its base."""
    output = Output(as_json=as_json)
    from trainer.planner.gpus import gpu_of
    from trainer.planner.serving import ServingCase, adapters_per_server
    from trainer.planner.shapes import shape_named

    case = ServingCase(
        shape=shape_named(model),
        device_bytes=gpu_of(gpu).memory_bytes if device_gb is None else round(device_gb * GB),
        reserve_bytes=round(reserve_gb * GB),
        kv_tokens=kv_tokens,
        host_bytes=round(host_gb * GB),
        nf4=nf4,
        adapter_bytes=None if adapter_mb is None else round(adapter_mb * 10**6),
        rank=rank,
    )
    need = adapters_per_server(case)
    output.emit(**asdict(need), adapter_bytes=case.one_adapter)
    texts.show_server(output, case, need)
    texts.show_lines(output, "assumed", need.assumptions)


@app.command()
def recommend(
    *,
    model: ModelOption,
    examples: Annotated[int, typer.Option("--examples", help="Training examples.", min=1)],
    task: Annotated[str, typer.Option("--task", help="style, format, knowledge, reasoning or language.")] = "style",
    example_tokens: Annotated[int, typer.Option("--example-tokens", help="Average tokens per example.", min=1)] = 512,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.", min=1)] = 3,
    variants: Annotated[int, typer.Option("--variants", help="Adapters of this base in total.", min=1)] = 1,
    gpu: GpuOption = "h100",
    devices: DevicesOption = 1,
    usd_per_hour: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recommend a method and settings, with reasons, as fields of a training spec."""
    output = Output(as_json=as_json)
    from trainer.planner.gpus import gpu_of
    from trainer.planner.recommend import Question, recommend
    from trainer.planner.shapes import shape_named

    question = Question(
        shape=shape_named(model),
        task=task,
        examples=examples,
        example_tokens=example_tokens,
        epochs=epochs,
        variants=variants,
        gpu=gpu_of(gpu, usd_per_hour=usd_per_hour),
        devices=devices,
    )
    chosen = recommend(question)
    time = {"hours": chosen.time.hours, "usd": chosen.time.usd, "tokens_per_s": chosen.time.tokens_per_s}
    body = texts.need_object(chosen.need)
    output.emit(**body, **time, spec=chosen.spec, reasons=chosen.reasons, assumptions=chosen.assumptions)
    texts.show_recommendation(output, chosen)


def _gpus(name: str | None, usd_per_hour: float | None) -> list[Gpu]:
    from trainer.planner.gpus import GPUS, gpu_of
    from trainer.planner.shapes import PlanError

    if name is not None:
        return [gpu_of(name, usd_per_hour=usd_per_hour)]
    if usd_per_hour is not None:
        raise PlanError("usd_per_hour", "--usd-per-hour is the price of one device: name it with --gpu")
    return list(GPUS.values())


def _optimizer_state(name: str) -> OptimizerState:
    from trainer.planner.memory import OPTIMIZER_STATES
    from trainer.planner.shapes import PlanError

    if name not in OPTIMIZER_STATES:
        raise PlanError(
            "optimizer_state", f"optimizer_state must be one of {', '.join(OPTIMIZER_STATES)}, got {name!r}"
        )
    return OPTIMIZER_STATES[name]
