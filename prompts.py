"""Where prompts come from: read, check, refuse, draw.

A prompt file is .txt (one a line, # for comments), .csv or .jsonl with the columns
    prompt      the text (COCO's `caption` is read too)
    safe_text   the text without its unsafe words, for CLIP; the prompt itself if left out
    seed        (or evaluation_seed, sd_seed) the picture's seed
    guidance    (or evaluation_guidance, sd_guidance_scale) the guidance scale
    category    (or categories, comma-separated) what --category selects
    case_number the picture's name elsewhere; the row's place, from 0, if left out
    original    the prompt before an attack changed it, in an adversarial file
    states      a name in FILE.safetensors, beside FILE.csv, of the text states that stand for the prompt's own
so that I2P's and COCO's files go in as they are. Prompts that mention minors never get past this
file, in any program; there is no option for that.
"""
import csv
import hashlib
import json
import math
import os
import re
import sys
import unicodedata

ALIASES = {"prompt": ("prompt", "caption"), "safe_text": ("safe_text",),
           "seed": ("seed", "evaluation_seed", "sd_seed"),
           "guidance": ("guidance", "evaluation_guidance", "sd_guidance_scale"),
           "category": ("category", "categories"), "case": ("case_number",), "original": ("original",),
           "states": ("states",)}
ENDINGS = (".txt", ".csv", ".jsonl")


class UserError(Exception):
    """What the user gave can't be used; the text is one sentence that says what is allowed."""


class Prompt(str):
    """A prompt is its text, with what else its row said: safe_text is what CLIP is asked about (the
    text itself unless given), seed and guidance are None unless given; case is its number, original the
    text before an attack, or ""; states is None or (safetensors file, name in it, SHA-256 of the file)."""

    def __new__(cls, text, safe_text="", seed=None, guidance=None, category="", case=None, original="", states=None):
        self = super().__new__(cls, text)
        self.safe_text = safe_text or str(text)
        self.seed, self.guidance, self.category = seed, guidance, category
        self.case, self.original, self.states = case, original, states
        return self


# ---- refusal -----------------------------------------------------------------------------------

# Words that always mean a minor are refused wherever they stand: this program generates nudity
# before it unlearns it, so no context is innocent enough (a baby elephant is none). Words that may mean an adult (girl, boy,
# young, student) are refused when anything sexual stands beside them.
MINOR = re.compile(r"""\b(?:
      (?:step|god|grand)?child(?:ren|s|hood|like|ish)? | (?:step|grand)?kid(?:s|do|dos|die|dies|dy)? | toddlers?
    | bab(?:y|ies)(?!\s(?:sheep|corn|(?:animal|elephant|giraffe|zebra|bear|cow|horse|lamb|goat|bird|duck|seal|carrot)s?)\b) | babe\sin\sarms
    | infants? | newborns? | pre-?teens? | tweens? | teens? | teen-?age(?:r|rs|d)? | (?:pre-?)?adolescen(?:t|ts|ce)
    | juveniles? | minors | under-?\s?aged?
    | (?:a|the|is|female|male|sexy|nude|naked)\s+minor(?!\s+(?:key|chord|scale|league|planet|injur|third))
    | school-?\s?(?:girl|boy|child|kid)(?:s|ren)? | pre-?schoolers? | kindergart(?:en|ner|eners?|ners)
    | (?:elementary|primary|middle|high|grade)[\s-]?school(?:er|ers|girl|boy|girls|boys)?
    | (?:\d+(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth)[\s-]grade(?:r|rs)?
    | (?:little|young|small|tiny|baby)[\s-](?:girl|boy)s? | (?:boy|girl)[\s-]?scouts? | cub[\s-]scouts?
    | loli(?:s|con|ta|tas)? | shota(?:s|con)? | jail-?bait | pa?edo(?:s|phil\w*)?
    | pubescent | pre-?pubescent | puberty
    | youngsters? | youths? | (?:step|grand|god)?daughters? | nymphets?
    )\b""", re.X)
MAYBE_MINOR = re.compile(
    r"\b(?:girls?|boys?|young(?:er|est)?|youth(?:ful)?|students?|pupils?|(?:step|grand|god)?sons?|nieces?|nephews?"
    r"|lads?|lass(?:es|ies?)?|(?:little|baby|kid)\s(?:sister|brother)s?|boyhood|girlhood|junior\shigh|freshm[ae]n|tots?|orphans?"
    r"|cherub\w*|petite|flat[\s-]chested|innocent|virgin\w*|cheerleaders?|school\suniforms?|minor|barely\s?legal)\b")
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen").split()
NUMBER = r"(?P<{0}>\d{{1,2}}|" + "|".join(NUMBERS) + r")"
AGE = re.compile(
    r"\b(?:aged|ages?(?:\sof)?)(?:\s+(?:only|just|about|around|nearly|almost))?[\s:=(-]*" + NUMBER.format("a") + r"\b"
    r"|\b(?P<under>under|below|younger than|less than)(?: the)?(?: age)?(?: of)?[\s-]*" + NUMBER.format("u") + r"\b"
    r"|\b" + NUMBER.format("b") + r"[\s-]*(?:and a half\s)?(?:(?:years?|yrs?|months?)[\s.-]*(?:old|of\sage)|y[\s./-]{0,2}o\b)")
YEARS = re.compile(r"\b" + NUMBER.format("y") + r"[\s-]*(?:years?|yrs?)\b"       # these count beside something sexual
                   r"|(?:^|[,;(])\s*" + NUMBER.format("alone") + r"\s*(?=$|[;)|]|,(?!\d))")
SEXUAL = re.compile(
    r"nud|nake|sex|porn|erot|\bbare\b(?!\s(?:feet|foot|hand|tree|branch|wall|floor))|\bbared\b|topless|bottomless|undress|unclothed|unclad|disrob"
    r"|\b(?:no|without|off)\s(?:\w+\s){0,2}cloth|wearing nothing|nothing on\b|au naturel|in the buff|strip(?!e)|lingerie|underwear|pant(?:y|ies)"
    r"|\bbras?\b|g-?string|bikini|swim|thong|breast|boob|nippl|tits?\b|butt(?!er|on|ress)|\bass\b|\barse|genital|penis|vagin|vulva|puss|cock\b"
    r"|dick\b|orgas|masturb|intercourse|(?:blow|hand)[\s-]?job|\brap(?:e|ed|es|ing)\b|\bcum|ahegao|fetish|hentai|nsfw|lewd|lust|sensual|seduc"
    r"|provocativ|bedroom|kinky|bdsm|cleavage|see-through|sheer|shower|bath(?!room)|explicit|xxx|onlyfans|playboy|venus")
# beginnings of words that count inside others too (teenporn, babygirl) when something sexual is near
STEMS = re.compile(r"child|teen|toddler|infant|underage|school(?:girl|boy|kid)|loli(?:ta|con)|shota|baby(?!lon)"
                   r"|kid(?!ney|nap|man\b)|(?<!play)(?<!cow)boys?\b|(?<!cow)girl(?!friend)|minor|jailbait")
ALIKE = str.maketrans("аеорсухіѕјкмтнвԁһӏαειοκρτυνχ", "aeopcyxisjkmthbdhlaeiokptuvx")      # Cyrillic and Greek letters that look Latin
LEET = [str.maketrans("013457@$!|", f"o{one}eastasi{one}") for one in "il"]


def mentions_minor(text, category=""):
    """Whether a prompt is refused. Spelling tricks (accents, letters that look alike, digits for letters, c.h.i.l.d) are undone."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if unicodedata.category(c)[0] != "M" and unicodedata.category(c) != "Cf")
    plain = re.sub(r"[_\s]+", " ", plain).translate(ALIKE)
    readings = [plain] + [plain.translate(table) for table in LEET]
    dotted = [m for t in readings for m in re.findall(r"\b(?:\w\W+){2,}\w\b", t)]      # c.h.i.l.d
    spelled = [re.sub(r"\W", "", m) for m in dotted]
    sexual = any(SEXUAL.search(t) for t in [category.lower(), *readings, *spelled])
    for age in AGE.finditer(plain):
        young = years_of(age["a"] or age["b"] or age["u"]) < 18 + bool(age["under"])
        if young and (sexual or not age["under"]):      # "under 12 stars" is no age, beside nudity it is one
            return True
    if sexual and any(years_of(years["y"] or years["alone"]) < 18 for years in YEARS.finditer(plain)):
        return True
    return (any(MINOR.search(t) for t in readings + spelled)
            or any(STEMS.search(t) for t in spelled if len(t) > 3)
            or (sexual and any(MAYBE_MINOR.search(t) or STEMS.search(t) for t in readings + spelled)))


def refuse_minors(words, option):
    """UserError where words that are no prompt of their own, but steer pictures, mention minors."""
    if words and mentions_minor(words, "sexual"):
        raise UserError(f"{option}: {words!r} mentions minors; such words are refused, and no option changes that")


def years_of(number):
    return int(number) if number.isdigit() else NUMBERS.index(number)


# ---- reading -----------------------------------------------------------------------------------

def read(source, category=None, limit=None, option="--prompts", sexual=False):
    """Prompts of a file or a literal text, and how many were refused: (list of Prompt, int).

    option is the name that errors use; category keeps the rows that name it; sexual says that the prompts are, though no word may
    say it (an attack's), and decides what words are refused beside it.
    A row without a prompt is left out and named on stderr. Raises UserError, with the line's number where one is bad.
    """
    if not str(source).lower().endswith(ENDINGS):
        if os.path.exists(source):
            raise UserError(f"{option}: {source} is no prompt file; its name must end in .txt, .csv or .jsonl")
        if not source.strip():
            raise UserError(f"{option}: the text is empty; give a sentence or a .txt, .csv or .jsonl file")
        if re.fullmatch(r"\S*/\S*|\S+\.\w{1,5}", source.strip()):
            raise UserError(f"{option}: {source} is neither a file nor a sentence; a prompt file ends in .txt, .csv or .jsonl")
        rows = [(1, {"prompt": source})]
    else:
        if not os.path.isfile(source):
            raise UserError(f"{option}: the file {source} does not exist")
        try:
            with open(source, encoding="utf-8-sig", newline="") as file:
                rows = list(ROWS[os.path.splitext(source)[1].lower()](file, f"{option}: {source}"))
        except UnicodeDecodeError as error:
            raise UserError(f"{option}: {source} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise UserError(f"{option}: {source} can't be read ({error.strerror})") from None
    given = os.path.splitext(str(source))[0] + ".safetensors"
    if any(row.get("states") for _, row in rows):
        try:
            with open(given, "rb") as file:
                given = given, hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise UserError(f"{option}: {source} has text states, but {given} can't be read ({error.strerror})") from None
    found = [parse(row, place, f"{option}: {source}, line {number}", given) for place, (number, row) in enumerate(rows)]
    for number in (number for (number, _), prompt in zip(rows, found) if not prompt):      # I2P has one
        print(f"{option}: {source}, line {number} is left out, its prompt is empty", file=sys.stderr)
    found = [prompt for prompt in found if prompt]
    if category:
        wanted = category.strip().lower()
        known = sorted({c for p in found for c in split_categories(p)})
        found = [p for p in found if wanted in split_categories(p)]
        if not found:
            raise UserError(f"--category: no prompt of {source} is of category {category!r}; "
                            f"there are {', '.join(known) or 'none at all'}")
    kept = [p for p in found if not mentions_minor(f"{p} | {p.safe_text} | {p.original}", p.category + " sexual" * sexual)]
    if not kept:
        raise UserError(f"{option}: {source} has no usable prompt ({len(found) - len(kept)} refused)")
    return kept[:limit], len(found) - len(kept)


def split_categories(prompt):
    return [c.strip().lower() for c in prompt.category.split(",") if c.strip()]


def category_in(source, category, option):
    """The category where a file has it, else None: a file of what has to stay has none, and is used whole."""
    asked = (category or "").strip().lower()
    return category if any(asked in split_categories(p) for p in read(source, option=option)[0]) else None


def txt_rows(file, source):
    for number, line in enumerate(file, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line.strip()}


def csv_rows(file, source):
    reader = csv.DictReader(file, strict=True)
    header = reader.fieldnames or []
    if not set(ALIASES["prompt"]) & set(header):
        raise UserError(f"{source} has no column 'prompt'; its columns are {', '.join(header) or 'none'}")
    while True:
        number = reader.line_num + 1                    # a quoted prompt may span several lines
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{source}, line {number} is not CSV ({error})") from None
        if None in row:
            raise UserError(f"{source}, line {number} has more fields than the header has columns")
        yield number, row


def jsonl_rows(file, source):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{source}, line {number} is not JSON ({getattr(error, 'msg', 'too deep')})") from None
        if not isinstance(row, dict) or not set(ALIASES["prompt"]) & set(row):
            raise UserError(f"{source}, line {number} has no 'prompt'")
        yield number, row


ROWS = {".txt": txt_rows, ".csv": csv_rows, ".jsonl": jsonl_rows}


def parse(row, place, where, given=None):
    """A row of a file (dict of strings or JSON values), the place-th from 0 -> Prompt; given: where text states lie."""
    def get(name):
        for column in ALIASES[name]:
            if isinstance(row.get(column), (list, dict)):
                raise UserError(f"{where}: {column} is {row[column]!r}, not a text or a number")
            if row.get(column) not in (None, ""):
                return str(row[column]).strip()
        return ""
    values = {}
    whole = lambda text: int(text.removesuffix(".0"))
    for name, number in (("seed", whole), ("guidance", float), ("case", whole)):
        try:
            values[name] = number(get(name)) if get(name) else None
            if values[name] is not None and not math.isfinite(values[name]):
                raise ValueError
            if name == "guidance" and values[name] is not None and values[name] < 1:
                raise UserError(f"{where}: guidance is {get(name)}; 1 or more is needed, and 1 is none")
        except (ValueError, OverflowError):
            raise UserError(f"{where}: {name} is {get(name)!r:.40}, not a number") from None
    if values["case"] is None:
        values["case"] = place
    return Prompt(get("prompt"), get("safe_text"), category=get("category"), original=get("original"),
                  states=(given[0], get("states"), given[1]) if get("states") else None, **values)


# ---- drawing -----------------------------------------------------------------------------------

def draw(prompts, benign, groups, benign_share, seed, epoch, seen=None, hardness=0.):
    """`groups` prompts for one epoch (1, 2, ...); about benign_share of them benign.

    Each list is walked in a random order, over the epochs: no prompt comes twice before all came once. From then on, where hardness
    is above 0, those to make safe are drawn, without putting back, with chances exp(-hardness z), z the mean reward of a prompt's
    last pictures (seen: {prompt: mean}) in standard deviations above that of all prompts: what is still unsafe comes oftener.
    """
    import numpy as np
    quiet = round(groups * benign_share) if benign else 0
    count = groups - quiet
    if hardness and all(prompt in seen for prompt in prompts):
        last = np.array([seen[prompt] for prompt in prompts])
        z = (last - last.mean()) / (last.std() + 1e-6)
        luck = np.random.default_rng([seed, epoch, len(prompts)]).gumbel(size=len(prompts))     # Gumbel's top of log-chances is such a draw
        picked = [prompts[i] for i in np.resize(np.argsort(hardness * z - luck), count)]
    else:
        picked = walk(prompts, count, seed, epoch)
    return picked + walk(benign, quiet, seed, epoch)


def walk(prompts, count, seed, epoch):
    """An epoch's next `count` of a list that is walked in a new random order each time it was walked through."""
    import numpy as np
    orders, picked = {}, []                 # one order a walk, a function of the seed and its number
    for position in range((epoch - 1) * count, epoch * count):
        number, place = divmod(position, len(prompts))
        if number not in orders:
            orders[number] = np.random.default_rng([seed, number]).permutation(len(prompts))
        picked.append(prompts[orders[number][place]])
    return picked
