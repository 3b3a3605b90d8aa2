"""Tell whether a model, an adapter or a data set is still the same, wherever it lies."""

import hashlib
from pathlib import Path

CONFIGS = ("config.json", "adapter_config.json")
SAMPLES, SAMPLE = 64, 2**16  # blocks of a large file that are read, and their bytes


def content_of(place):
    """Return a digest of a file, or of the files of a folder; a Hub id as it is.

    For a model or an adapter only the weights and the config count; large files are sampled.
    """
    path = Path(place)
    if not place or not path.exists():
        return place
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if any(file.parent == path and file.name in CONFIGS for file in files):
        kept = sorted(path.glob("*.safetensors"))
        files = kept + [file for file in files if file.parent == path and file.name in CONFIGS]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and not file.name.startswith("."):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            step = max(SAMPLE, size // SAMPLES)  # all of a file of up to 4 MB
            with file.open("rb") as stream:
                for start in range(0, size, step):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]
