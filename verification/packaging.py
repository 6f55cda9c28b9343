"""`python -m build` gives an sdist and from it a wheel; the wheel does all its work in an empty environment."""

import tarfile
import zipfile
from pathlib import Path

from verification.workplace import Workplace, require, tracked

# what an sdist may leave out
ONLY_IN_THE_CLONE = (".ci/", ".gitignore")
OPERATOR = (
    "import swat_lm, torch; q = torch.randn(1, 9, 2, 8); print(swat_lm.window_attention(q, q, q, window=4).shape); "
    "assert 'site-packages' in swat_lm.__file__"
)
SMALL = (
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.sliding_window=8", "data.sources=notes", "data.cache=cache", "data.sequence_length=32", "train.steps=3",
    "train.warmup_steps=1", "train.batch_size=2", "train.evaluate_every=0",
)  # fmt: skip


def check(place: Workplace) -> dict[str, str]:
    """Build, compare what is packed with what git tracks, install, use; returns the versions."""
    wheel, sdist = build(place)
    compare(place, wheel, sdist)
    programs = place.environment("installed")
    python, swat_lm = programs / "python", programs / "swat-lm"
    place.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", wheel])
    require("[1, 9, 2, 8]" in place.run([python, "-c", OPERATOR]), "the operator gave another shape")
    said = place.run([swat_lm, "recipes"], expect=2)
    require("pip install 'swat-lm[train]'" in said, f"without extras the command line said {said!r}")
    place.done("the wheel alone in an empty environment: the operator runs, the command line says what it needs")
    place.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", f"{wheel}[train]"])
    use(place, swat_lm)
    unpacked = unpack(place, sdist)
    place.run([python, "-m", "pip", "install", "-q", "pytest"])
    tests = ["tests/test_packaging.py", "tests/test_imports.py"]
    place.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=unpacked)
    place.done(f"{' and '.join(tests)} pass in the unpacked sdist")
    listed = place.run([python, "-m", "pip", "list", "--format=freeze"]).split()
    return dict(line.split("==") for line in listed if line.startswith(("torch==", "transformers==", "swat-lm==")))


def build(place: Workplace) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    programs = place.environment("builder")
    place.run([programs / "python", "-m", "pip", "install", "-q", "build"])
    place.run([programs / "python", "-m", "build", "--outdir", place.folder / "dist"], cwd=place.copy())
    (wheel,), (sdist,) = (list((place.folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    place.done(f"python -m build: {sdist.name}, and from it {wheel.name}")
    return wheel, sdist


def compare(place: Workplace, wheel: Path, sdist: Path) -> None:
    """Every tracked file of the package is in the wheel, every tracked file but a few in the sdist, nothing else."""
    package = set(tracked("swat_lm"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    require(packed == package, f"wheel and package differ in {sorted(packed ^ package)}")
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    lacking = {name for name in tracked() if not name.startswith(ONLY_IN_THE_CLONE)} - held
    require(not lacking, f"the sdist lacks {sorted(lacking)}")
    place.done(f"the wheel holds the {len(package)} files of the package; the sdist also tests, documents, benchmarks")


def use(place: Workplace, swat_lm: Path) -> None:
    """Recipes by name, an heir of one, training, generation, an error's hint: from a folder with nothing of ours."""
    folder = place.folder / "elsewhere"
    (folder / "notes").mkdir(parents=True)
    for index in range(4):
        (folder / "notes" / f"{index}.txt").write_text(f"words of my own, number {index}\n" * 40)
    require("own-text" in place.run([swat_lm, "recipes"], folder), "`swat-lm recipes` does not list own-text")
    require("window 128" in place.run([swat_lm, "info", "own-text"], folder), "`swat-lm info own-text` shows no window")
    place.run([swat_lm, "train", "own-text", *SMALL, "out=runs/one"], folder)
    (folder / "mine.yaml").write_text("inherits: own-text\nseed: 3\n")
    place.run([swat_lm, "train", "mine.yaml", *SMALL], folder)
    require((folder / "runs" / "mine" / "export").is_dir(), "an heir of own-text left no runs/mine/export")
    place.run([swat_lm, "generate", "runs/one", "--prompt", "words", "--max-new-tokens", "3"], folder)
    said = place.run([swat_lm, "train", "own-txt"], folder, expect=2)
    require("did you mean own-text?" in said, f"a mistyped recipe gave {said!r}")
    place.done("the wheel with [train], away from the clone: recipes by name and by inherits, training, generation")


def unpack(place: Workplace, sdist: Path) -> Path:
    """The folder that the sdist holds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place.folder / "unpacked", filter="data")
    (folder,) = (place.folder / "unpacked").iterdir()
    return folder
