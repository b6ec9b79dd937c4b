"""How objects are named in a bucket: as files are in a data directory, so that a copy of one is the other."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True, slots=True)
class Area:
    """One kind of blob. parts: the files of one digest, in the order of their writing; the last one marks it as whole.
    (): the digest is itself one file."""

    folder: str
    parts: tuple[str, ...] = ()

    def keys(self, digest: str) -> list[str]:
        """The objects of a digest, in the order of their writing."""
        name = digest.removeprefix("sha256:")
        stem = f"{self.folder}/{name[:2]}/{name}"
        return [f"{stem}/{part}" for part in self.parts] or [stem]

    def digest_of(self, key: str) -> str | None:
        """None for an object that is no blob of this area."""
        words = key.split("/")
        is_blob = len(words) == (4 if self.parts else 3) and words[0] == self.folder
        return f"sha256:{words[2]}" if is_blob else None

    def orphan_key(self, digest: str) -> str:
        """The mark of a blob that a sweep found without a row."""
        return f"orphans/{self.folder}/{digest.removeprefix('sha256:')}"


ADAPTERS = Area("blobs", (WEIGHTS_FILE, CONFIG_FILE))
DATA = Area("files")
