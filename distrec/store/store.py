"""A published output: immutable folders on S3-like stores, HDFS or a disk, and one pointer.

A version is a folder with a name of its own. Its files go first, its manifest last, and then one
small object, CURRENT, names it. An object of an S3-like store appears whole or not at all, so
writing CURRENT is the commit; elsewhere it is a rename. Readers look at nothing that CURRENT does
not name. pyarrow's file systems do the work: Spark and its jars have no part in it.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs
from pydantic import ValidationError

from distrec import pulse
from distrec.config.store_url import shown
from distrec.errors import ConfigError, DataError, DistrecError, StoreError
from distrec.files import fsync
from distrec.store.current import CURRENT, MAX_POINTER_BYTES, Current, Version

MANIFEST = "manifest.json"
_NEW = f"{CURRENT}.new"
_PROBE = ".probe"
_CHUNK_BYTES = 4 * 2**20
# one connection does not fill a network
_FILES_AT_ONCE = 4
# as pyarrow's messages have them
_WILL_NOT_PASS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT")


logger = logging.getLogger("distrec.store")


@dataclass(frozen=True)
class StoredFile:
    """A file of a version, as its manifest has it; the path is relative, with forward slashes."""

    path: str
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or "\\" in self.path:
            raise DataError(f"a manifest names files inside its folder. Received: {self.path!r}.")


class Store:
    """The versions of one output.

    Args:
        url: Of the store, as `checked_url` takes it.
        names: Of the folders below it that lead to the output.
        damaged: What is raised when an object is not what a manifest says.

    Attributes:
        address: For messages.

    Raises:
        StoreError: The store cannot be opened.
    """

    def __init__(self, url: str, *names: str, damaged: type[DistrecError] = DataError) -> None:
        self.address = shown(url, *names)
        self._damaged = damaged
        with self._reaching(self.address):
            self._fs, path = fs.FileSystem.from_uri(url)
        self._is_s3, self._is_local = self._fs.type_name == "s3", self._fs.type_name == "local"
        self._bucket = path.split("/")[0] if self._is_s3 else ""
        self._root = "/".join([path.rstrip("/"), *names])

    def check(self, writes: bool) -> None:
        """Refuse a store that cannot be used, before anything else is done.

        Raises:
            ConfigError: There is no such bucket, or permission is denied.
            StoreError: It cannot be reached.
        """
        exists = True
        # who may not look at a bucket may yet use what is in it
        with suppress(ConfigError), self._reaching(self.address):
            if self._bucket:
                exists = self._fs.get_file_info(self._bucket).type != fs.FileType.NotFound
        if not exists:
            raise ConfigError(
                f"the bucket of a store exists. Received: {self.address}, and no bucket "
                f"{self._bucket!r} there. Make it, or set store to another address."
            )
        self.current()
        if writes:
            self._put_bytes(_PROBE, b"")
            with self._reaching(self.address):
                self._fs.delete_file(f"{self._root}/{_PROBE}")

    def current(self) -> Current:
        """What is published; nothing when there is no pointer.

        Raises:
            DataError: CURRENT is damaged.
        """
        found = self._pointer(CURRENT)
        if found is None and not self._is_s3:
            # a rename that replaces takes two steps on HDFS; in between the new one counts
            found = self._pointer(_NEW, is_half=True) or self._pointer(CURRENT)
        return found or Current()

    def _pointer(self, name: str, is_half: bool = False) -> Current | None:
        try:
            text = b""
            for chunk in self._chunks(f"{self.address}/{name}", f"{self._root}/{name}"):
                text += chunk
                if len(text) > MAX_POINTER_BYTES:
                    raise ValueError(f"more than {MAX_POINTER_BYTES} bytes")
            return Current.model_validate_json(text)
        except FileNotFoundError:
            return None
        except (ValidationError, ValueError) as error:
            if is_half:
                return None
            raise self._damaged(
                f"{CURRENT} names the versions of an output. Received: {self.address}/{name}: "
                f"{error}. Publish the output again."
            ) from error

    def put(self, folder: str, directory: Path, files: Sequence[StoredFile]) -> None:
        """Send files of a version to its folder; they count once CURRENT names it.

        Raises:
            DataError: A file is not what the manifest says, here or there.
            StoreError: The store cannot be reached.
        """
        self._each(files, lambda file: self._put_file(folder, directory, file))

    def _put_file(self, folder: str, directory: Path, file: StoredFile) -> None:
        digest, count = hashlib.sha256(), 0
        path, target = directory / file.path, f"{self._root}/{folder}/{file.path}"
        where = f"{self.address}/{folder}/{file.path}"
        try:
            source = path.open("rb", buffering=0)
        except OSError as error:
            raise self._damaged(
                f"every file of a manifest is there. Received: {path}: {error}. Make the output "
                "again."
            ) from error
        with source, self._reaching(where), self._output(target) as sink:
            while chunk := source.read(_CHUNK_BYTES):
                pulse.beat()
                digest.update(chunk)
                sink.write(chunk)
                count += len(chunk)
        self._compare(str(path), file, count, digest.hexdigest())

    def put_manifest(self, folder: str, directory: Path, files: Iterable[StoredFile]) -> Version:
        """Send the manifest of a version, after all of its files, whoever has put them.

        Raises:
            StoreError: They are not all there.
        """
        selector = fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True, recursive=True)
        with self._reaching(f"{self.address}/{folder}"):
            sizes = {info.path: info.size for info in self._fs.get_file_info(selector)}
        for file in files:
            size = sizes.get(f"{self._root}/{folder}/{file.path}")
            if size != file.num_bytes:
                raise StoreError(
                    f"a store keeps what it was given. Received: {self.address}/{folder}/"
                    f"{file.path} with {size} bytes, expected {file.num_bytes}. Run the job again, "
                    "and distrec clean not beside it."
                )
        data = (directory / MANIFEST).read_bytes()
        self._put_bytes(f"{folder}/{MANIFEST}", data)
        digest = hashlib.sha256(data).hexdigest()
        return Version(folder=folder, manifest_sha256=digest, manifest_bytes=len(data))

    def swap(self, new: Current) -> None:
        """Commit: what `new` names counts from now on, at one stroke. One writer at a time."""
        old = self.current()
        data = new.model_dump_json(indent=1).encode()
        if self._is_s3:
            self._put_bytes(CURRENT, data)
        else:
            self._finish_swap()
            self._put_bytes(_NEW, data)
            with self._reaching(self.address):
                if not self._is_local:
                    # HDFS does not rename over a file
                    with suppress(FileNotFoundError):
                        self._fs.delete_file(f"{self._root}/{CURRENT}")
                self._fs.move(f"{self._root}/{_NEW}", f"{self._root}/{CURRENT}")
                if self._is_local:
                    fsync(Path(self._root))
        for folder in sorted(old.folders - new.folders):
            try:
                self.drop(folder)
            except DistrecError as error:
                # what counts is committed
                logger.warning("a folder that is no longer used stays: %s", error)

    def _finish_swap(self) -> None:
        """What a writer that died between the two steps of a swap has left to do."""
        if self._pointer(CURRENT) is None and self._pointer(_NEW, is_half=True) is not None:
            with self._reaching(self.address):
                self._fs.move(f"{self._root}/{_NEW}", f"{self._root}/{CURRENT}")

    def get_manifest(self, version: Version, directory: Path) -> None:
        """Fetch the manifest of a version into a directory that exists."""
        file = StoredFile(MANIFEST, version.manifest_bytes, version.manifest_sha256)
        self.get(version.folder, directory, [file])

    def get(self, folder: str, directory: Path, files: Sequence[StoredFile]) -> None:
        """Fetch files of a version, each checked by size and SHA-256.

        Raises:
            DistrecError: An object is missing or not what the manifest says: `damaged`.
            StoreError: The store cannot be reached.
        """
        for parent in {(directory / file.path).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
        self._each(files, lambda file: self._get_file(folder, directory, file))

    def _get_file(self, folder: str, directory: Path, file: StoredFile) -> None:
        digest, count = hashlib.sha256(), 0
        where, target = f"{self.address}/{folder}/{file.path}", directory / file.path
        try:
            with target.open("wb") as sink:
                for chunk in self._chunks(where, f"{self._root}/{folder}/{file.path}"):
                    pulse.beat()
                    digest.update(chunk)
                    sink.write(chunk)
                    count += len(chunk)
                    if count > file.num_bytes:
                        break
        except FileNotFoundError as error:
            raise self._damaged(
                f"every file of a manifest is in the store. Received: no {where}. Publish the "
                "output again."
            ) from error
        except OSError as error:
            raise DataError(
                f"{target} cannot be written: {error}. Free space, or set output to another "
                "directory."
            ) from error
        self._compare(where, file, count, digest.hexdigest())

    def _chunks(self, where: str, path: str) -> Iterator[bytes]:
        with self._reaching(where), self._fs.open_input_stream(path) as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk

    def _compare(self, where: str, file: StoredFile, count: int, digest: str) -> None:
        if (count, digest) != (file.num_bytes, file.sha256):
            raise self._damaged(
                "a file has the size and the SHA-256 that its manifest gives. Received: "
                f"{where} with {count} bytes, {digest}; expected {file.num_bytes} bytes, "
                f"{file.sha256}. Make the output again."
            )

    def leftovers(self, min_age_seconds: float) -> list[str]:
        """Folders that CURRENT does not name and to which nothing was written for so long."""
        selector = fs.FileSelector(self._root, allow_not_found=True)
        named, found = self.current().folders, []
        with self._reaching(self.address):
            for info in self._fs.get_file_info(selector):
                if info.type != fs.FileType.Directory or info.base_name in named:
                    continue
                inner = self._fs.get_file_info(fs.FileSelector(info.path, recursive=True))
                times = [one.mtime_ns or 0 for one in (info, *inner)]
                if time.time() - max(times) / 1e9 >= min_age_seconds:
                    found.append(info.base_name)
        return sorted(found)

    def drop_older(self) -> None:
        """Delete all but what counts now, younger left-overs and older versions too.

        Readers that have begun with an older version fail.

        Raises:
            StoreError: The store cannot be reached; what counts is as it was.
        """
        current = self.current()
        if current.previous:
            self.swap(current.model_copy(update={"previous": ()}))
        for folder in self.leftovers(0):
            self.drop(folder)

    def files(self) -> list[str]:
        """Everything that lies there, by path below the address."""
        selector = fs.FileSelector(self._root, allow_not_found=True, recursive=True)
        with self._reaching(self.address):
            found = self._fs.get_file_info(selector)
        return sorted(
            info.path.removeprefix(f"{self._root}/")
            for info in found
            if info.type == fs.FileType.File
        )

    def drop(self, folder: str) -> None:
        """Delete a folder; its manifest first, so that what is left of it is no version."""
        with self._reaching(f"{self.address}/{folder}"), suppress(FileNotFoundError):
            with suppress(FileNotFoundError):
                self._fs.delete_file(f"{self._root}/{folder}/{MANIFEST}")
            self._fs.delete_dir(f"{self._root}/{folder}")

    def _put_bytes(self, name: str, data: bytes) -> None:
        with self._reaching(f"{self.address}/{name}"), self._output(f"{self._root}/{name}") as sink:
            sink.write(data)

    @contextmanager
    def _output(self, target: str) -> Iterator[pa.NativeFile]:
        if not self._is_s3:
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        with self._fs.open_output_stream(target) as sink:
            yield sink
        if self._is_local:
            fsync(Path(target))
            fsync(Path(target).parent)

    def _each(self, files: Sequence[StoredFile], function: Callable[[StoredFile], None]) -> None:
        """Some at once; the first error, in order, is raised when all have ended."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            futures = [pool.submit(function, file) for file in files]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @contextmanager
    def _reaching(self, where: str) -> Iterator[None]:
        """Turn what a file system raises into our own errors; what is not there stays as it is."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, PermissionError) or any(
                word in str(error) for word in _WILL_NOT_PASS
            ):
                raise ConfigError(
                    f"a store may be read and written by this job. Received: {where}: {error}. "
                    "Check the credentials in the environment and the rights of the bucket."
                ) from error
            raise StoreError(
                f"a store can be reached. Received: {where}: {error}. Check the address and the "
                "network, and run the job again."
            ) from error


def new_folder(name: str) -> str:
    """A name that no version has had."""
    return f"{name}-{uuid.uuid4().hex[:12]}"
