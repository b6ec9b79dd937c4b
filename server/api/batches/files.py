"""What a batch leaves: the lines of its two files, and the end of the batch. Knows no engine and no pace."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from server.api.batches.line_app import Answer
from server.api.batches.lines import Line, Span, read_line, spans_of
from server.api.wire.json_text import json_string, json_text
from server.jobs.service import Onboarding
from server.jobs.store.batch_store import AnsweredLine, Batch, BatchEnd, BatchStatus

_WHY = {
    BatchStatus.EXPIRED: ("batch_expired", "This request was not answered within the batch's window."),
    BatchStatus.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request was answered."),
}


class BatchFile:
    """The input file of a batch, read line by line: lines that were within the limits when the batch was made."""

    def __init__(self, batch: Batch, path: Path) -> None:
        self._endpoint = batch.endpoint
        self._path = path
        self._starts, self._sizes = array("Q"), array("Q")
        for span in spans_of(path):
            self._starts.append(span.start)
            self._sizes.append(span.num_bytes)

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, number: int) -> Line:
        """number: from 0."""
        span = Span(self._starts[number], self._sizes[number])
        with self._path.open("rb") as file:
            return read_line(file, span, number=number + 1, endpoint=self._endpoint)


def request_id(batch: Batch, number: int) -> str:
    """Of a line's request, in logs and in its answer."""
    return f"{batch.id}-{number + 1}"


def answered_line(batch: Batch, number: int, line: Line, answer: Answer) -> AnsweredLine:
    """As its line of the output or the error file."""
    body = answer.body.decode("utf-8", "replace").replace("\n", " ")
    response = f'{{"status_code":{answer.status},"request_id":{json_text(request_id(batch, number))},"body":{body}}}'
    return AnsweredLine(number, answer.status, _line(batch, number, line.custom_id, response, "null"))


def end_batch(onboarding: Onboarding, batch: Batch, file: BatchFile, status: BatchStatus) -> None:
    """Write the files and end the batch. After a crash in between it may be called again: a file is kept once.

    Raises StoreError.
    """
    with ExitStack() as made:
        output, errors = (made.enter_context(_scratch(onboarding.data_dir)) for _ in range(2))
        with output.open("w", encoding="ascii") as good, errors.open("w", encoding="ascii") as bad:
            completed, failed = _write(_all_lines(onboarding, batch, file, status), good, bad)
        output_id = _kept(onboarding, batch, output, "output") if completed else None
        error_id = _kept(onboarding, batch, errors, "errors") if failed else None
    end = BatchEnd(
        status=status,
        num_completed=completed,
        num_failed=failed,
        output_file_id=output_id,
        error_file_id=error_id,
    )
    onboarding.batches.end(batch, end)


@contextmanager
def _scratch(data_dir: Path) -> Iterator[Path]:
    """The path of a file for the length of a block. What a killed server leaves, the next uploads remove."""
    folder = data_dir / "uploads"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{uuid4().hex}.part"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _kept(onboarding: Onboarding, batch: Batch, path: Path, kind: str) -> str:
    file_id = f"file-{batch.id.removeprefix('batch_')}-{kind}"
    name = f"{batch.id}_{kind}.jsonl"
    onboarding.files.add_output(tenant=batch.tenant, file_id=file_id, filename=name, source=path)
    return file_id


def _write(lines: Iterator[AnsweredLine], output: IO[str], errors: IO[str]) -> tuple[int, int]:
    """How many lines went to each file."""
    completed = failed = 0
    for line in lines:
        (output if line.is_good else errors).write(line.answer + "\n")
        completed += line.is_good
        failed += not line.is_good
    return completed, failed


def _all_lines(onboarding: Onboarding, batch: Batch, file: BatchFile, status: BatchStatus) -> Iterator[AnsweredLine]:
    """Every line of the input file once, in its order: as it was answered, or with the reason why it was not."""
    following = 0
    for line in onboarding.batches.lines(batch):
        yield from (_unanswered(batch, number, file, status) for number in range(following, line.number))
        yield line
        following = line.number + 1
    yield from (_unanswered(batch, number, file, status) for number in range(following, len(file)))


def _unanswered(batch: Batch, number: int, file: BatchFile, status: BatchStatus) -> AnsweredLine:
    code, message = _WHY[status]
    error = json_text({"code": code, "message": message})
    return AnsweredLine(number, 0, _line(batch, number, file.line(number).custom_id, "null", error))


def _line(batch: Batch, number: int, custom_id: str, response: str, error: str) -> str:
    own_id = json_text(f"batch_req_{batch.id.removeprefix('batch_')}_{number + 1}")
    return f'{{"id":{own_id},"custom_id":{json_string(custom_id)},"response":{response},"error":{error}}}'
