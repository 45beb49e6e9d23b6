"""Files of data sets that Debian packages hold: where they are sought, how they are fetched, and that they are the
right ones."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ibq.data import debian
from ibq.data.images import one_line
from ibq.errors import DataError


class Found(NamedTuple):
    """Path of each file, and a phrase that says where they are from."""

    files: dict[str, Path]
    source: str


def cache_folder() -> Path:
    """The folder for fetched data: IBQ_CACHE, else `ibq` in XDG_CACHE_HOME or ~/.cache; it need not exist yet."""
    if given := os.environ.get("IBQ_CACHE"):
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibq"
    except RuntimeError:
        raise DataError(
            "this user has no home folder to cache data in; set IBQ_CACHE to a folder that can be written"
        ) from None


@dataclass(frozen=True)
class PackagedFiles:
    """Files of one data set, each raw or .gz.

    They are sought in IBQ_DATA (a folder that holds them, the package, or the package unpacked; or the package itself,
    a .deb), in the folder of the installed package, in the cache, and then fetched into the cache.

    Args:
        name: the data set, and its folder in the cache.
        title: its name for people.
        sha256: hex, of each file's decompressed content by file name: packagers compress the same files anew.
        package: Debian's package.
        folder: where the installed package has the files.
        layouts: subfolders in which other sources keep them.
        size: of the download, for people.
        wanted: what IBQ_DATA may name, for people.
        fetchers: by source, in their order; each puts the files below the empty folder that it is given, and returns a
            folder that holds them.
    """

    name: str
    title: str
    sha256: Mapping[str, str]
    package: str
    folder: Path
    layouts: tuple[str, ...]
    size: str
    wanted: str
    fetchers: Mapping[str, Callable[[PackagedFiles, Path], Path]]

    @property
    def cache(self) -> Path:
        return cache_folder() / self.name

    def are_here(self) -> bool:
        """True if `find` would fetch nothing."""
        try:
            return isinstance(self._seek(), Found)
        except DataError:
            return False

    def find(self) -> Found:
        """The files, fetched where they are not here; their content is `read`'s to verify.

        Raises:
            DataError: they are nowhere, or what IBQ_DATA names cannot be used.
        """
        sought = self._seek()
        return sought if isinstance(sought, Found) else self._fetch(sought)

    def read(self, path: Path, name: str) -> bytes:
        """The decompressed bytes of the file `name`; a DataError if they are not the right ones."""
        content = self._content(path, name)
        if isinstance(content, str):
            raise DataError(f"{path} {content}; replace it or delete it")
        return content

    def _content(self, path: Path, name: str) -> bytes | str:
        """The decompressed bytes of the file `name`, or the words that say, after its path, why they cannot be used."""
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError, zlib.error) as error:
            return f"cannot be read ({one_line(error)})"
        if (digest := hashlib.sha256(content).hexdigest()) == self.sha256[name]:
            return content
        return f"is not {name} of {self.title}: its content has sha256 {digest} where {self.sha256[name]} is expected"

    def _seek(self) -> Found | list[str]:
        """The files, or which places were passed over in vain."""
        passed_over = ["IBQ_DATA is not set"]
        if given := os.environ.get("IBQ_DATA"):
            path = Path(given).expanduser()
            if found := self._in_folder(path, given) or self._in_package(path, given):
                return found
            passed_over = [f"IBQ_DATA={given} holds none of its files"]
        for place, source in (
            (lambda: self.folder, f"Debian's package {self.package}"),
            (lambda: self.cache, "the cache"),  # asked last: a user without a home has none
        ):
            folder = place()
            if len(files := self._files_in(folder)) == len(self.sha256):
                return Found(files, f"{source} in {folder}")
            passed_over.append(f"{source} in {folder} is absent or incomplete")
        return passed_over

    def _in_folder(self, path: Path, given: str) -> Found | None:
        """The files in the folder that IBQ_DATA names; None where it holds none. DataError: it holds some."""
        if not os.path.isdir(path):
            return None
        files = self._files_in(path)
        if files and (missing := self._missing(files)):
            raise DataError(f"IBQ_DATA={given} lacks {missing} of {self.title}; add what is missing, or unset IBQ_DATA")
        return Found(files, f"IBQ_DATA {path}") if files else None

    def _in_package(self, path: Path, given: str) -> Found | None:
        """The files of the package that IBQ_DATA names or holds, unpacked into the cache; None where it is another.
        DataError: it cannot be used, or IBQ_DATA names no package at all."""
        remedy = f"point IBQ_DATA at {self.wanted}, or unset it"
        if os.path.isdir(path):
            packages = sorted(path.glob(f"{self.package}_*.deb"))
        elif debian.is_deb(path):
            packages = [path]
        else:
            raise DataError(f"IBQ_DATA={given} is neither a folder nor a Debian package (.deb); {remedy}")
        try:
            if not packages or debian.package_name(packages[-1]) != self.package:
                return None
            source = f"IBQ_DATA {packages[-1]}, unpacked in {self.cache}"
            if len(files := self._files_in(self.cache)) == len(self.sha256):
                return Found(files, source)
            return Found(self._keep(lambda folder: self.unpack(packages[-1], folder)), source)
        except DataError as error:
            raise DataError(f"IBQ_DATA={given} cannot be used: {error}; {remedy}") from None
        except OSError as error:
            raise DataError(
                f"the cache {self.cache} cannot be written ({one_line(error)}); IBQ_CACHE moves it"
            ) from None

    def _files_in(self, folder: Path) -> dict[str, Path]:
        """The files in `folder` or in a subfolder of a usual name, whichever holds most of them; raw before .gz, as it
        reads faster."""
        layouts = []
        for layout in ("", self.name, *self.layouts, str(self.folder.relative_to("/"))):
            candidates = [(name, folder / layout / f"{name}{end}") for name in self.sha256 for end in (".gz", "")]
            layouts.append({name: path for name, path in candidates if os.path.isfile(path)})
        return max(layouts, key=len)

    def _missing(self, files: Mapping[str, Path]) -> str:
        """Names of the files that are not there, the first few of them; empty if all are."""
        names = [name for name in self.sha256 if name not in files]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more

    def _fetch(self, passed_over: list[str]) -> Found:
        """Fill the cache from the first source that delivers."""
        print(f"Fetching {self.title} ({self.size}) into {self.cache}", file=sys.stderr)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            for source, fetch in self.fetchers.items():
                try:
                    return Found(self._keep(partial(fetch, self)), f"{source}, now in {self.cache}")
                except (
                    DataError,
                    OSError,
                    RuntimeError,
                    subprocess.SubprocessError,
                    http.client.HTTPException,
                ) as error:
                    passed_over.append(f"{source} failed ({one_line(error)})")
        except OSError as error:
            passed_over.append(f"the cache {self.cache} cannot be written ({one_line(error)}; IBQ_CACHE moves it)")
        raise DataError(f"{self.title} was not found: {'; '.join(passed_over)}; set IBQ_DATA to {self.wanted}")

    def _keep(self, fetch: Callable[[Path], Path]) -> dict[str, Path]:
        """Verified files in the cache, and beside them the package's statement of copyright where it came along. Each
        file arrives whole by a rename, so several processes may fetch at once."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.cache, ignore_cleanup_errors=True) as temporary:
            folder = fetch(Path(temporary))
            files = self._files_in(folder)
            if missing := self._missing(files):
                raise DataError(f"what it gave lacks {missing}")
            for name, path in files.items():
                if isinstance(complaint := self._content(path, name), str):
                    raise DataError(f"its {path.name} {complaint}")
            statement = folder / self._statement
            for path in (*files.values(), *([statement] if statement.is_file() else [])):
                os.replace(path, self.cache / path.name)
        return self._files_in(self.cache)

    def unpack(self, deb: Path, folder: Path) -> Path:
        """Write the files and the statement of copyright from a package below `folder`; return `folder`.

        Raises:
            DataError: the package is damaged, or of a version that lacks some of the files.
        """
        inner = self.folder.relative_to("/")
        wanted = {(inner / f"{name}{end}").as_posix() for name in self.sha256 for end in (".gz", "")}
        debian.unpack(deb, wanted | {self._statement}, folder)
        if missing := self._missing(self._files_in(folder)):
            raise DataError(f"{deb.name} lacks {missing}")
        return folder

    @property
    def _statement(self) -> str:
        """Path in the package of what Debian says on authors and licences."""
        return f"usr/share/doc/{self.package}/copyright"


def apt_download(files: PackagedFiles, folder: Path) -> Path:
    """Fetcher: the package from apt."""
    return files.unpack(debian.download(files.package, folder), folder / "package")
