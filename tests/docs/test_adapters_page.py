"""docs/adapters.md names every code an adapter can be refused with."""

from __future__ import annotations

import re
from pathlib import Path

from support.reference import served_adapters

ROOT = Path(__file__).parents[2]
OF_TENANTS_AND_DISKS = {"tenant_exists", "key_not_found", "tenant_not_found", "database_newer"}
OF_TENANTS_AND_DISKS |= {"bad_scope", "bad_expiry", "bad_label", "not_quarantined"}
OF_TENANTS_AND_DISKS |= {"data_dir_gone", "database_damaged", "store_unavailable", "wrong_store", "unsupported_base"}
OF_TENANTS_AND_DISKS |= {"bad_blob_url", "blobs_unavailable", "blobs_unsupported", "other_base_served"}
OF_TENANTS_AND_DISKS |= {"pooler_shares_sessions", "invalid_value"}


def test_its_tables_of_families_and_fields_are_current() -> None:
    text = served_adapters.PAGE.read_text()
    assert text == served_adapters.page(text), "docs/adapters.md differs from the code: run `make reference`"
    assert "| `GPTNeoXForCausalLM` | `query_key_value`," in text
    assert '| `bias` | `"none"`; else `unsupported_bias` |' in text


def test_every_refusal_code_is_explained() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "adapters_store").rglob("*.py"))
    classes = "Rejected|_rejected|Conflict|NotFound|BlobDamaged|Unavailable|StoreError|InputRefused|refused"
    raised = re.findall(rf"(?:{classes})\(\s*\"([a-z_]+)\"", sources)
    named = re.findall(r"\"(unsupported_[a-z_]+)\"", sources)
    missing = {code for code in (*raised, *named) if f"`{code}`" not in page} - OF_TENANTS_AND_DISKS
    assert len(raised) > 30
    assert missing == set()
