"""Files that are either whole or not there, and safetensors files that say what they are."""

import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes the place of ``path`` when the block ends without an error.

    If the block fails, what was there before stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
    except (ValueError, AttributeError) as error:
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
