"""What `adapter push` and `adapter import` share: the base that an adapter is checked against, and what is shown.

Decides which base that is; the store decides which adapter is valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.common.base_path import find_base
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.output import Output
from server.cli.common.texts import size

if TYPE_CHECKING:
    from adapters_store.base.description import BaseDescription
    from adapters_store.packed.int8_check import Int8Change
    from adapters_store.packed.layout import PackedAdapter
    from adapters_store.store import AdapterStore
    from adapters_store.versions.records import AdapterVersion


def base_for(store: AdapterStore, base: str | None, output: Output) -> BaseDescription:
    """The base served last, or the one named; a known base keeps the dtype it is served in."""
    known = store.bases()
    if base is None:
        if not known:
            message = "no base was served from this data directory yet; name one with --base PATH"
            raise CommandError("unknown_base", message, ExitCode.NOT_FOUND)
        return known[0]
    with output.waiting(f"reading base {base}"):
        from server.cli.common.base_path import describe

        description = describe(*find_base(base, output))
    return next((each for each in known if each.digest == description.digest), description)


def int8_change_on(base: BaseDescription) -> Int8Change:
    """Loads the base when there is an int8 adapter to measure. Raises CommandError (base_not_found)."""

    def change(plain: PackedAdapter, small: PackedAdapter) -> float:
        from transformers.utils.logging import disable_progress_bar

        from server.engine.int8_probe import int8_probe
        from server.engine.model.base_model import load_base
        from server.engine.text.tokenizer import Tokenizer

        if base.folder is None or not Path(base.folder).is_dir():
            message = f"{base.name}: an int8 adapter is measured on its base; name its folder with --base PATH"
            raise CommandError("base_not_found", message, ExitCode.NOT_FOUND)
        disable_progress_bar()  # transformers' own, beside our lines
        loaded, tokenizer = load_base(Path(base.folder), dtype=base.dtype), Tokenizer.load(Path(base.folder))
        return int8_probe(loaded, tokenizer, tokenizer.vocabulary(loaded.num_embeddings))(plain, small)

    return change


def check_free(name: str, base: BaseDescription) -> None:
    """As the HTTP route does: an adapter with the base's name could never be requested."""
    if name == base.name:
        raise CommandError("name_is_base", f"name: {name!r} is the name of the base model", ExitCode.CONFLICT)


def show_published(output: Output, version: AdapterVersion, notes: tuple[str, ...] = ()) -> None:
    """The new version."""
    output.emit(**version.to_json(), notes=list(notes))
    output.say(f"published {version.tenant}/{version.ref} (rank {version.rank}, {size(version.num_bytes)})")
    output.say(version.digest, style="dim")
    for note in notes:
        output.say(f"note: {note}", style="yellow")
