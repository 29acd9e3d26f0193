"""Files that are either whole or not there, and safetensors files that say what they are."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
from dataclasses import fields
from pathlib import Path


def check_replaceable(path):
    """Raises OSError where :func:`atomic_write` could not put a file: a name too long, no folder, a device, a pipe."""
    path = Path(path)
    try:
        path.stat()
    except FileNotFoundError:
        if not Path(os.path.realpath(path)).parent.is_dir():
            raise FileNotFoundError(f"no such folder: {path.parent}; create it before writing {path}") from None
    else:
        if not path.is_file():
            kind = "folder" if path.is_dir() else "device or a pipe"
            raise OSError(f"{path} is a {kind}, and only files are written and replaced; choose another name")


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes the place of ``path`` when the block ends without an error.

    If the block fails, what was there before stays as it was. What a link leads to is replaced, not the link.
    Raises OSError for what is no file, a device for example.
    """
    check_replaceable(path)
    path = Path(os.path.realpath(path))
    # A name of its own, as others may write the same file; 50 characters are at most 200 of the 255 bytes of a name.
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partials(path):
    """Remove what a killed process left of :func:`atomic_write` to ``path``, which no other may be writing now."""
    path = Path(path)
    for partial in path.parent.glob(f".{path.name[:50]}.*.partial"):
        partial.unlink(missing_ok=True)


def lock(path):
    """The open file ``path``, locked for this process until :func:`unlock` or its end, even a crash.

    Raises BlockingIOError where another holds it.
    """
    path = os.path.abspath(path)
    file = open(path, "ab")  # noqa: SIM115 (open as long as it is locked)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                raise
        if not (os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno()))):
            raise BlockingIOError(f"{path} was unlocked and removed at this moment")
    except BaseException:
        file.close()
        raise
    return file


def unlock(file):
    """Remove a file that :func:`lock` gave, while it is still locked."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(file.name)
    file.close()


def from_fields(kind, values):
    """A dataclass from a dict of its fields, as it was read from a file.

    Raises ValueError that names the fields that are missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} should be its fields and is {values!r}")
    known = {field.name: field for field in fields(kind)}
    missing = [name for name, field in known.items() if name not in values and field.default is field.default_factory]
    unknown = [name for name in values if name not in known]
    wrong = [name for name, value in values.items() if name in known and not _fits(value, known[name].type)]
    for names, what in ((missing, "has no"), (unknown, "has unknown, perhaps newer,"), (wrong, "has a wrong value in")):
        if names:
            raise ValueError(f"{kind.__name__} {what} {', '.join(names)}")
    return kind(**values)


def _fits(value, annotation):
    return isinstance(value, annotation) or (type(value) is int and isinstance(0.0, annotation))


def write_safetensors(path, tensors, kind, version, metadata):
    """Write tensors and a JSON-serializable dict to one file, atomically; equal content gives equal bytes.

    ``kind`` ("model") and ``version`` say what :func:`read_safetensors` will find.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, because safetensors writes several in random order.
    header = {"fastnca": json.dumps({"format": kind, "version": version, **metadata})}
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def kind_of(path):
    """The ``kind`` with which :func:`write_safetensors` wrote a file, None for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("fastnca", "{}")).get("format")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        return None


def read_safetensors(path, kind):
    """(tensors, version, metadata) of a file that :func:`write_safetensors` wrote.

    Raises FileNotFoundError where there is none, ValueError where it is damaged, foreign or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("fastnca", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
    try:
        metadata = json.loads(header)
        found, version = metadata.pop("format", None), metadata.pop("version", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not fastnca's ({error})") from error
    if str(found).startswith(f"fastnca-{kind}-"):
        raise ValueError(
            f"{path} was written by fastnca before its first release, in the format {found}, and can no longer be "
            "read; grow the sound again"
        )
    if found is None:
        raise ValueError(f"{path} was not written by fastnca; expected a {kind} file")
    if found != kind or not isinstance(version, int):
        raise ValueError(f"{path} is a {found} file of fastnca (version {version}); expected a {kind} file")
    return tensors, version, metadata
