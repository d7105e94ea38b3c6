"""The pointer of a published output: which folders of a store are its versions now."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

CURRENT = "CURRENT"
# far above what thousands of checkpoints take, and what a manifest of thousands of files takes
MAX_POINTER_BYTES = 2**20
MAX_MANIFEST_BYTES = 256 * 2**20

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
"""Of a folder: a base name, whoever wrote it."""


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Version(_Part):
    """One folder that is whole: its manifest, written last, has the checksums of its files."""

    folder: Name
    """Never written to again."""
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    manifest_bytes: int = Field(ge=0, le=MAX_MANIFEST_BYTES)


class Current(_Part):
    """What CURRENT holds; it is replaced as a whole."""

    format_version: Literal[1] = 1
    versions: dict[Name, Version] = {}
    """By name: "dataset", "scores", or one a checkpoint."""
    best: dict[str, Any] | None = None
    """Of checkpoints: what best.json says."""
    previous: tuple[Name, ...] = ()
    """Folders that the pointer before this one named: they stay until the next, for readers that
    have begun."""

    @property
    def manifests(self) -> dict[str, str]:
        """Name -> SHA-256 of the manifest: what is published, whatever the folders are called."""
        return {name: version.manifest_sha256 for name, version in sorted(self.versions.items())}

    @property
    def folders(self) -> set[str]:
        """Those in which something may be read."""
        return {version.folder for version in self.versions.values()} | set(self.previous)

    def followed_by(
        self, versions: dict[str, Version], best: dict[str, Any] | None = None
    ) -> Current:
        """The next pointer."""
        stay = {version.folder for version in versions.values()}
        gone = {version.folder for version in self.versions.values()} - stay
        return Current(versions=versions, best=best, previous=tuple(sorted(gone)))
