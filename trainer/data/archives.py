"""Files in a folder, a zip file or tar files, read by number without unpacking.

An archive is indexed once. A file is then read at a known position (`os.pread`), which is
safe in any number of processes and threads. Objects can be pickled: each process opens its own.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

_ZIP_HEADER = 30  # bytes of a local file header, before name and extra field (APPNOTE.TXT, 4.3.7)


class Files(Protocol):
    """Files by number.

    Attributes:
        names: Paths within the folder or archive, sorted, with "/" between folders.
    """

    names: list[str]

    def __call__(self, number: int) -> bytes:
        """Read a file.

        Raises:
            OSError, ValueError: It cannot be read, or is damaged.
        """

    def path(self, number: int) -> str:
        """The location of a file, for messages."""


def open_files(path: Path) -> Files:
    """The files in a folder, a .zip or a .tar.

    Raises:
        ValueError: The path does not exist, or is not such an archive; the message names it.
    """
    try:
        if path.is_dir():
            return FolderFiles(path)
        if path.suffix == ".zip":
            return ZipFiles(path)
        if path.suffix == ".tar":
            return TarFiles([path])
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"{path}: it cannot be read ({error})") from error
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    raise ValueError(f"{path}: it must be a folder, a .zip, or a .tar that is not compressed")


class FolderFiles:
    """Files in a folder and its subfolders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = sorted(
            os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")
            for folder, _, files in os.walk(root, followlinks=True)
            for file in files
        )

    def __call__(self, number: int) -> bytes:
        return (self._root / self.names[number]).read_bytes()

    def path(self, number: int) -> str:
        return str(self._root / self.names[number])


class _Archive:
    """Archives that are read at given positions."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._opened: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}

    def _read(self, archive: int, start: int, size: int) -> bytes:
        if archive not in self._opened:
            self._opened[archive] = self._paths[archive].open("rb", buffering=0)
        content = os.pread(self._opened[archive].fileno(), size, start)
        if len(content) < size:
            raise ValueError(f"{self._paths[archive]} ends before this file")
        return content


class ZipFiles(_Archive):
    """Files in a zip file, stored or deflated."""

    def __init__(self, path: Path) -> None:
        super().__init__([path])
        with zipfile.ZipFile(path) as archive:
            entries = sorted(
                (entry for entry in archive.infolist() if not entry.is_dir()),
                key=lambda entry: entry.filename,
            )
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{path}: {entry.filename} is compressed by a method that cannot be read; "
                    "store or deflate it"
                )
            if entry.flag_bits & 1:
                raise ValueError(f"{path}: {entry.filename} is encrypted")
        self.names = [entry.filename for entry in entries]
        self._places = np.array(
            [(e.header_offset, e.compress_size, e.CRC, e.compress_type) for e in entries],
            dtype=np.int64,
        ).reshape(-1, 4)

    def __call__(self, number: int) -> bytes:
        start, size, checksum, method = self._places[number].tolist()
        header = self._read(0, start, _ZIP_HEADER)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("its header in the zip file is damaged")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        content = self._read(0, start + _ZIP_HEADER + lengths, size)
        if method == zipfile.ZIP_DEFLATED:
            try:
                content = zlib.decompress(content, wbits=-zlib.MAX_WBITS)
            except zlib.error as error:
                raise ValueError(f"it is damaged ({error})") from error
        if zlib.crc32(content) != checksum:
            raise ValueError("it is damaged: its checksum does not match")
        return content

    def path(self, number: int) -> str:
        return f"{self._paths[0]}: {self.names[number]}"


class TarFiles(_Archive):
    """Files in tar files that are not compressed, such as the shards of a WebDataset."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        found: list[tuple[str, int, int, int]] = []
        for number, path in enumerate(self._paths):
            with tarfile.open(path, "r:") as archive:
                found.extend(
                    (member.name.removeprefix("./"), number, member.offset_data, member.size)
                    for member in archive
                    if member.isreg()
                )
        found.sort()
        self.names = [name for name, *_ in found]
        places = [place for _, *place in found]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __call__(self, number: int) -> bytes:
        return self._read(*self._places[number].tolist())

    def path(self, number: int) -> str:
        return f"{self._paths[self._places[number, 0]]}: {self.names[number]}"
