"""What a model's folder says of itself (world.json), and the settings that suit it (recipes/).

world.json, beside a model's weights; every key may be left out, paths are relative to the folder:

    recipe          name of its settings in recipes/                      (stable_diffusion)
    concept         words that guides and edits steer away from           (nudity, sexual)
    safe            words for what is safe, that they steer towards
    clip            the CLIP that scores its pictures      (openai/clip-vit-large-patch14)
    judge           a classifier that names what its pictures show
    concept_pairs   CSV with the columns unsafe and safe: their difference is the concept
    guard_pairs     CSV with the columns concept, unsafe and safe: a prompt that names a concept,
                    and one that names something harmless in its place
    task            prompt file with pictures (column image) of what the model can't draw, for
                    fine-tuning
    harmless        true where an unsafe picture may be shown; elsewhere it is pixelated
    training_files  {file: {"benign": file, "validation": [files], "held_out": [files]}}

A folder or hub id without world.json has what stands in brackets, which suits Stable Diffusion.
"""
import difflib
import json
import os
import sys
from dataclasses import dataclass, field

from plumbing.options import UserError, first_line
from plumbing.refusal import refuse_minors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEFAULT_MODEL = "tiny"
KINDS = {"recipe": str, "concept": str, "safe": str, "clip": str, "judge": str,
         "concept_pairs": str, "guard_pairs": str, "task": str, "harmless": bool,
         "training_files": dict}
JSON_NAMES = {str: "text", bool: "true or false", dict: "object"}


@dataclass
class TrainingFile:
    """A prompt file that a model comes with, and those that belong to it."""
    prompts: str
    benign: str | None = None
    validation: list = field(default_factory=list)
    held_out: list = field(default_factory=list)


@dataclass
class World:
    model: str
    recipe: str = "stable_diffusion"
    concept: str = "nudity, sexual"
    safe: str | None = None
    clip: str = "openai/clip-vit-large-patch14"
    judge: str | None = None
    concept_pairs: str | None = None
    guard_pairs: str | None = None
    task: str | None = None
    harmless: bool = False
    training_files: list = field(default_factory=list)      # of TrainingFile

    @property
    def clip_option(self):
        """Where the CLIP is named, as errors begin."""
        path = os.path.join(locate(self.model), "world.json")
        return f"--model: clip in {path}" if os.path.isfile(path) else "--model"

    def training_file(self, path):
        """The entry of a prompt file, or None."""
        for entry in self.training_files:
            if os.path.realpath(entry.prompts) == os.path.realpath(path):
                return entry
        return None


def locate(model):
    """A model's folder; the default one is found from any working directory."""
    is_there = os.path.isfile(os.path.join(model, "model_index.json"))
    if model == DEFAULT_MODEL and not is_there:
        return os.path.join(ROOT, DEFAULT_MODEL)
    return model


def read_world(model):
    """The World of a model, a folder or a hub id. UserError where its world.json can't be used."""
    folder = locate(model)
    path = os.path.join(folder, "world.json")
    if not os.path.isfile(path):
        return World(model)
    found = read_json(path, "--model")
    for key, value in found.items():
        if key not in KINDS:
            raise UserError(f"--model: {path} has an unknown key {key!r}; "
                            f"known are {', '.join(sorted(KINDS))}")
        if not isinstance(value, KINDS[key]):
            raise UserError(f"--model: {key} in {path} is {value!r}; "
                            f"a JSON {JSON_NAMES[KINDS[key]]} is needed")
    for key in ("concept", "safe"):
        refuse_minors(found.get(key), f"--model: {key} in {path}")

    def inside(name):
        return os.path.relpath(os.path.join(os.path.realpath(folder), name))
    for key in ("clip", "judge", "concept_pairs", "guard_pairs", "task"):
        if found.get(key) and os.path.exists(os.path.join(folder, found[key])):
            found[key] = inside(found[key])             # otherwise it is a hub id, or missing
    try:
        entries = []
        for name, entry in found.get("training_files", {}).items():
            lists = {key: entry.get(key, []) for key in ("validation", "held_out")}
            if not all(isinstance(files, list) for files in lists.values()):
                raise TypeError("validation and held_out are lists of files")
            entries.append(TrainingFile(
                prompts=inside(name),
                benign=inside(entry["benign"]) if entry.get("benign") else None,
                **{key: [inside(file) for file in files] for key, files in lists.items()}))
        found["training_files"] = entries
    except (AttributeError, TypeError) as error:
        raise UserError(f"--model: training_files in {path} is not "
                        f"{{file: {{benign, validation, held_out}}}} ({error})") from None
    for entry in entries:
        for file in filter(None, [entry.prompts, entry.benign, *entry.validation,
                                  *entry.held_out]):
            if not os.path.isfile(file):
                raise UserError(f"--model: {path} names the file {file}, which does not exist; "
                                "mend its paths, which are relative to its folder")
    return World(model, **found)


def read_json(path, option):
    """A JSON object of a file, as a dict. UserError names the option."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return {**json.load(file)}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{option}: {path} is not a file with a JSON object "
                        f"({type(error).__name__}: {first_line(error)})") from None


# ---- recipes -------------------------------------------------------------------------------------

def recipe_names():
    return sorted(name.removesuffix(".json") for name in os.listdir(os.path.join(ROOT, "recipes"))
                  if name.endswith(".json"))


def read_recipe(name):
    """{option: value} of recipes/NAME.json, or of a .json file given by its path."""
    path = name if name.endswith(".json") else os.path.join(ROOT, "recipes", f"{name}.json")
    if not os.path.isfile(path):
        raise UserError(f"--recipe: {name} is unknown; give {', '.join(recipe_names())} "
                        "or the path of a .json file")
    return read_json(path, "--recipe")


def recipe_of(args, world):
    """The recipe by whose name a rival's own settings are found: --recipe's, or the model's."""
    is_named = args.recipe and not args.recipe.endswith(".json")
    return args.recipe if is_named else world.recipe


def check_recipe(parser, settings, source):
    """UserError where a recipe has a key that neither this program nor recipes/ knows."""
    known = {action.dest for action in parser._actions}
    known |= set(read_recipe(World.recipe))             # recipes/ have the same keys
    unknown = [option for option in settings if option not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else "; leave it out"
        raise UserError(f"--recipe: {source} has an unknown option {unknown[0]!r}{hint}")


def set_recipe(parser, settings, source):
    """Make a recipe's settings the parser's defaults; what another program has is passed over."""
    for option, value in settings.items():
        action = next((a for a in parser._actions if a.dest == option), None)
        if action is None:
            continue
        if value is None:
            raise UserError(f"--recipe: {source} has {option} null; leave it out")
        is_flag = action.nargs == 0
        if is_flag != isinstance(value, bool):
            needed = "true or false" if is_flag else "a number or a text"
            raise UserError(f"--recipe: {source} has {option} {value!r}; {needed} is needed")
        if action.choices and value not in action.choices:
            raise UserError(f"--recipe: {source} has {option} {value!r}; "
                            f"give {', '.join(map(str, action.choices))}")
        several = value if isinstance(value, list) else [value]
        takes_many = action.nargs in ("+", "*")
        if not is_flag and not action.type and not action.choices and (
                not all(isinstance(one, str) for one in several)
                or isinstance(value, list) and not takes_many
                or action.nargs == "+" and not several):
            raise UserError(f"--recipe: {source} has {option} {value!r:.40}; a text is needed")
        if action.type:
            value = str(value)                          # argparse checks a default that is a text
        elif action.nargs in ("+", "*"):
            value = value if isinstance(value, list) else [value]
        parser.set_defaults(**{option: value})


def parse_with_recipe(parser, argv, choose, show_recipe=True):
    """Parse options whose defaults depend on what is given.

    choose(args) -> (the name of the model's recipe, {option: value} that overrides recipes). What
    --recipe names overrides the model's recipe, and may hold a few options of it; what the user
    gives overrides everything. Returns args with `recipe` set to the name.
    show_recipe: whether --help shows the values that it would have with the other options that are
    given (not where an option is required).
    """
    argv = sys.argv[1:] if argv is None else argv
    rest = [word for word in argv if word not in ("-h", "--help")]
    if len(rest) < len(argv) and not show_recipe:
        parser.parse_args(argv)
    try:
        given = parser.parse_args(rest)
        models_own, overriding = choose(given)
        names = dict.fromkeys([models_own, given.recipe or models_own])
        for name in names:
            settings = read_recipe(name)
            check_recipe(parser, settings, name)
            set_recipe(parser, settings, name)
        set_recipe(parser, overriding, "args.json")
        parser.epilog = f"Values in [] are the recipe's ({name}) where it has them."
        args = parser.parse_args(argv)
    except UserError as error:
        parser.error(str(error))
    args.recipe = name
    return args


def overridden(args, on_top):
    """{option: (the recipe's value, the value taken)} where they differ.

    on_top: {option: value}, settings that override the recipe's.
    """
    settings = {**read_recipe(args.recipe), **on_top}
    return {option: (value, getattr(args, option)) for option, value in settings.items()
            if hasattr(args, option) and getattr(args, option) != value}
