"""Where the CUDA C++ sources are, and the digest of what they say."""

from __future__ import annotations

import os
from pathlib import Path

from flashcore_cupy.settings import settings


def kernels_dir() -> Path:
    """Return the folder that holds the ``.cu`` files and ``flashcore/*.cuh``.

    ``FLASHCORE_KERNELS_DIR`` if set; else ``kernels`` inside the package (an installed wheel); else
    beside the package (a checkout, or an editable install of one).

    Raises:
        FileNotFoundError: there is no such folder with kernels in it.
    """
    override = settings().kernels_dir
    if override is not None:
        if not override.is_dir():
            raise FileNotFoundError(
                f"FLASHCORE_KERNELS_DIR={override} is not a folder: unset it, or point it at a "
                "copy of kernels/"
            )
        return override
    package = Path(__file__).resolve().parents[1]
    # Inside first: beside an installed package, `kernels` would be somebody else's module.
    for candidate in (package / "kernels", package.parent / "kernels"):
        if (candidate / "flashcore").is_dir():
            return candidate
    raise FileNotFoundError(
        f"no kernels folder in {package} or beside it: reinstall flashcore-cupy, or set "
        "FLASHCORE_KERNELS_DIR"
    )


def source_files(root: Path) -> list[Path]:
    """Return every ``.cu`` and ``.cuh`` under ``root`` in the order of their relative paths."""
    return [root / name for name in _names(root)]


def _names(root: Path) -> list[str]:
    """Their relative paths, as text: a digest is asked for at each launch, and paths are slow."""
    found = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    sources = (os.path.relpath(path, root) for path in found if path.endswith((".cu", ".cuh")))
    return sorted((name.replace(os.sep, "/") for name in sources), key=os.fsencode)


def kernels_digest(root: Path | None = None) -> str:
    """Return 12 hex digits that change whenever any kernel source does.

    SHA-256 over, per file in the order of POSIX paths relative to ``root`` (default
    :func:`kernels_dir`): the path, a NUL byte, the file's bytes, a NUL byte.
    """
    folder = kernels_dir() if root is None else root
    import hashlib  # late: it loads OpenSSL, 7 ms

    digest = hashlib.sha256()
    for name in _names(folder):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(os.fsencode(name) + b"\0" + file.read() + b"\0")
    return digest.hexdigest()[:12]
