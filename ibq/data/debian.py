"""Debian packages: how one is downloaded with apt, and how files are read out of it on any system."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Container, Iterator
from pathlib import Path

from ibq.data.images import one_line
from ibq.errors import DataError

MAGIC = b"!<arch>\n"
"""The beginning of a .deb, which is an ar archive of two tar archives: control and data."""


def download(package: str, folder: Path) -> Path:
    """Download a package by name into an empty folder, with an apt state of its own: no root, no system list, nothing
    of the system's changed.

    Returns:
        The .deb.

    Raises:
        DataError: there is no apt, or its complaint.
    """
    if shutil.which("apt-get") is None:
        raise DataError("apt-get is not on the PATH")
    # The system's hooks around an update or a download clean up the system's own cache: not wanted here, and only a
    # file can clear them.
    (folder / "apt.conf").write_text("#clear APT::Update;\n#clear DPkg;\n")
    (folder / "status").touch()
    private = {
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
    }
    network = {
        "Acquire::Languages": "none",
        "Acquire::Retries": 1,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    # As root, apt would otherwise download as another user, who may not enter this folder.
    options = private | {"Dir::Cache::archives": folder / "archives"} | network | {"APT::Sandbox::User": "root"}
    for subfolder in ("lists/partial", "archives/partial"):
        (folder / subfolder).mkdir(parents=True)
    apt = [
        "apt-get",
        "-q",
        "-c",
        str(folder / "apt.conf"),
        *(part for key, value in options.items() for part in ("-o", f"{key}={value}")),
    ]
    # One dead repository among many fails the update; the download is what counts.
    _, update_complaint = _run([*apt, "update"], folder)
    downloaded, complaint = _run([*apt, "download", package], folder)
    packages = list(folder.glob(f"{package}_*.deb"))
    if not downloaded or not packages:
        raise DataError(", ".join(filter(None, (update_complaint, complaint))) or "apt-get gave no package")
    return packages[0]


def _run(command: list[str], folder: Path) -> tuple[bool, str]:
    """True if a command succeeded, and the first line of its complaints."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode == 0, one_line(done.stderr.strip().partition("\n")[0])


def is_deb(path: Path) -> bool:
    """True if a path names a file that begins as a Debian package."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def package_name(deb: Path) -> str:
    """Name of a package as it states it. DataError: it is damaged."""
    with _archive(deb, "control.tar") as archive:
        for entry in archive:
            if entry.name.removeprefix("./") == "control" and (content := archive.extractfile(entry)):
                fields = dict(line.partition(": ")[::2] for line in content.read().decode().splitlines())
                return fields.get("Package", "")
    raise DataError(f"{deb} cannot be unpacked: it has no control file")


def unpack(deb: Path, wanted: Container[str], folder: Path) -> None:
    """Write the wanted files of a package below a folder, without dpkg, which other systems lack.

    Args:
        deb: the package.
        wanted: paths in the package, without a leading slash; others are left in it.
        folder: where the package's root shall be.

    Raises:
        DataError: the package is damaged.
    """
    with _archive(deb, "data.tar") as archive:
        for entry in archive:
            name = entry.name.removeprefix("./")
            if name in wanted and (content := archive.extractfile(entry)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.read())


@contextlib.contextmanager
def _archive(deb: Path, stem: str) -> Iterator[tarfile.TarFile]:
    """One of the two tar archives of a package, whichever compression it has; what fails in reading it is a
    DataError."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_member(deb, stem)), mode="r:*") as archive:
            yield archive
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{deb} cannot be unpacked: {one_line(error)}") from None


def _member(deb: Path, stem: str) -> bytes:
    """Content of a member of the ar archive, by its name without the ending. EOFError: the file ends before it does."""
    with open(deb, "rb") as file:
        file.seek(len(MAGIC))
        while len(header := file.read(60)) == 60 and header[48:58].strip().isdigit():
            name, size = header[:16].decode("latin-1").rstrip(" /"), int(header[48:58])
            if name.startswith(stem):
                content = file.read(size)
                if len(content) < size:
                    raise EOFError(f"it ends after {len(content):,} of {size:,} bytes of {name}")
                return content
            file.seek(size + size % 2, os.SEEK_CUR)
    raise EOFError(f"it ends before {stem}")
