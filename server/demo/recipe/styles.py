"""The styles of answers: the base's, and one for each tenant."""

from __future__ import annotations

from enum import StrEnum


class Style(StrEnum):
    """How an answer is written: the base's plain English, or one of the three tenants' ways."""

    PLAIN = "plain"
    LAW = "law"
    MED = "med"
    CODE = "code"


TENANTS = (Style.LAW, Style.MED, Style.CODE)
