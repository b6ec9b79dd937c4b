"""The upload form, however its bytes are cut."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.wire.errors import ApiError
from server.api.wire.multipart import UploadParser, boundary_of

LIMITS = {"name": 20, "config": 40, "weights": 1000}


def form(parts: dict[str, bytes], boundary: bytes = b"bound") -> bytes:
    pieces = []
    for name, value in parts.items():
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="f"'.encode()
        pieces.append(b"--" + boundary + b"\r\n" + disposition + b"\r\nContent-Type: x/y\r\n\r\n" + value + b"\r\n")
    return b"".join(pieces) + b"--" + boundary + b"--\r\n"


@given(
    weights=st.binary(max_size=300) | st.lists(st.sampled_from([b"\r\n--bound", b"\r", b"\n", b"--"])).map(b"".join),
    cuts=st.lists(st.integers(0, 800), max_size=12),
)
def test_any_cut_of_the_body_gives_the_same_parts(weights: bytes, cuts: list[int]) -> None:
    if b"\r\n--bound" in weights:
        weights = weights.replace(b"\r\n--bound", b"\r\n--boun")
    body = form({"name": b"law", "config": b"{}", "weights": weights})
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w"
        with UploadParser(b"bound", path, LIMITS) as parser:
            for start, end in pairwise(edges):
                parser.feed(body[start:end])
            assert parser.finish().fields == {"name": b"law", "config": b"{}"}
        assert path.read_bytes() == weights


def test_bytes_beyond_the_limit_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with UploadParser(b"bound", tmp_path / "w", LIMITS) as parser, pytest.raises(ApiError) as refused:
        parser.feed(form({"weights": b"x" * 1001}))
    assert (refused.value.status, refused.value.param) == (413, "weights")
    assert (tmp_path / "w").stat().st_size == 0


def test_an_endless_part_header_is_refused(tmp_path: Path) -> None:
    with UploadParser(b"bound", tmp_path / "w", LIMITS) as parser:
        parser.feed(b"--bound\r\nX-Long: ")
        with pytest.raises(ApiError) as refused:
            parser.feed(b"x" * 10_000)
    assert refused.value.code == "invalid_multipart"


@pytest.mark.parametrize("body", [b"not a form", b"--other\r\n\r\n", b"--bound\r\n: x\r\n\r\n"])
def test_what_is_no_form_is_a_400(tmp_path: Path, body: bytes) -> None:
    def parse() -> None:
        with UploadParser(b"bound", tmp_path / "w", LIMITS) as parser:
            parser.feed(body)
            parser.finish()

    with pytest.raises(ApiError) as refused:
        parse()
    assert refused.value.status == 400


def test_a_part_without_a_name_is_refused(tmp_path: Path) -> None:
    with UploadParser(b"bound", tmp_path / "w", LIMITS) as parser, pytest.raises(ApiError, match="Unknown parameter"):
        parser.feed(b"--bound\r\nContent-Type: x/y\r\n\r\nhello\r\n--bound--\r\n")


def test_the_boundary_is_read_from_the_content_type() -> None:
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    with pytest.raises(ApiError, match="Content-Type must be multipart/form-data"):
        boundary_of("application/json")
