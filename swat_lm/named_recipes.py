"""The recipes that come with the package, found by name wherever it is installed; the files are in `recipes/`.

No torch and no YAML here, so that anything may import it.
"""

from pathlib import Path

from swat_lm.words import nearest

__all__ = ["find_recipe", "is_recipe", "nearest_recipe", "recipe_names", "recipe_path", "recipe_summary"]

FOLDER = Path(__file__).parent / "recipes"
SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """Names of all recipes of ours, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe of ours.

    Raises:
        ValueError: no such recipe; the message names the nearest.
    """
    if name not in recipe_names():
        near = nearest_recipe(name)
        hint = f"did you mean {near}? " if near else ""
        raise ValueError(f"no recipe is called {name!r}; {hint}recipes: {', '.join(recipe_names())}")
    return FOLDER / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """The first line of a recipe's opening comment."""
    return recipe_path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def find_recipe(named: str | Path, beside: Path = Path()) -> Path:
    """Where a recipe lies: a path from the folder `beside`, or the file of ours where `named` is its bare name.

    A file of the user's at that path goes first; whether anything is there is the reader's to say.
    """
    path = beside / named
    return FOLDER / f"{named}.yaml" if str(named) in recipe_names() and not path.is_file() else path


def is_recipe(target: str) -> bool:
    """Whether what a user named is a recipe: a YAML file, or the name of one of ours that nothing on disk bears."""
    return target.endswith(SUFFIXES) or (target in recipe_names() and not Path(target).exists())


def nearest_recipe(name: str) -> str:
    """What may have been meant by a name: up to three names of ours as words, the likeliest first; empty if none."""
    near = nearest(name.lower(), recipe_names(), 3)
    return ", ".join(near[:-1]) + (" or " if len(near) > 1 else "") + near[-1] if near else ""
