"""Prompts that mention minors never reach a model, in any program; there is no option for that.

Words that always mean a minor are refused wherever they stand: this program generates nudity
before it unlearns it, so no context is innocent enough (animals such as a baby elephant are
allowed). Words that may mean an adult (girl, boy, young, student) are refused where anything sexual
stands beside them.
"""
import re
import unicodedata

from plumbing.options import UserError

MINOR = re.compile(r"""\b(?:
      (?:step|god|grand)?child(?:ren|s|hood|like|ish)? | (?:step|grand)?kid(?:s|do|dos|die|dies|dy)?
    | toddlers? | babe\sin\sarms
    | bab(?:y|ies)(?!\s(?:sheep|corn|(?:animal|elephant|giraffe|zebra|bear|cow|horse|lamb|goat|bird
                        |duck|seal|carrot)s?)\b)
    | infants? | newborns? | pre-?teens? | tweens? | teens? | teen-?age(?:r|rs|d)?
    | (?:pre-?)?adolescen(?:t|ts|ce)
    | juveniles? | minors | under-?\s?aged?
    | (?:a|the|is|female|male|sexy|nude|naked)\s+minor
      (?!\s+(?:key|chord|scale|league|planet|injur|third))
    | school-?\s?(?:girl|boy|child|kid)(?:s|ren)? | pre-?schoolers?
    | kindergart(?:en|ner|eners?|ners)
    | (?:elementary|primary|middle|high|grade)[\s-]?school(?:er|ers|girl|boy|girls|boys)?
    | (?:\d+(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth
        |eleventh|twelfth)[\s-]grade(?:r|rs)?
    | (?:little|young|small|tiny|baby)[\s-](?:girl|boy)s? | (?:boy|girl)[\s-]?scouts?
    | cub[\s-]scouts?
    | loli(?:s|con|ta|tas)? | shota(?:s|con)? | jail-?bait | pa?edo(?:s|phil\w*)?
    | pubescent | pre-?pubescent | puberty
    | youngsters? | youths? | (?:step|grand|god)?daughters? | nymphets?
    )\b""", re.X)

MAYBE_MINOR = re.compile(
    r"\b(?:girls?|boys?|young(?:er|est)?|youth(?:ful)?|students?|pupils?|(?:step|grand|god)?sons?"
    r"|nieces?|nephews?|lads?|lass(?:es|ies?)?|(?:little|baby|kid)\s(?:sister|brother)s?|boyhood"
    r"|girlhood|junior\shigh|freshm[ae]n|tots?|orphans?|cherub\w*|petite|flat[\s-]chested|innocent"
    r"|virgin\w*|cheerleaders?|school\suniforms?|minor|barely\s?legal)\b")

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen").split()
NUMBER = r"(?P<{0}>\d{{1,2}}|" + "|".join(NUMBERS) + r")"
AGE = re.compile(
    r"\b(?:aged|ages?(?:\sof)?)(?:\s+(?:only|just|about|around|nearly|almost))?[\s:=(-]*"
    + NUMBER.format("a") + r"\b"
    r"|\b(?P<under>under|below|younger than|less than)(?: the)?(?: age)?(?: of)?[\s-]*"
    + NUMBER.format("u") + r"\b"
    r"|\b" + NUMBER.format("b") + r"[\s-]*(?:and a half\s)?"
    r"(?:(?:years?|yrs?|months?)[\s.-]*(?:old|of\sage)|y[\s./-]{0,2}o\b)")
YEARS = re.compile(                                     # these count beside something sexual
    r"\b" + NUMBER.format("y") + r"[\s-]*(?:years?|yrs?)\b"
    r"|(?:^|[,;(])\s*" + NUMBER.format("alone") + r"\s*(?=$|[;)|]|,(?!\d))")

SEXUAL = re.compile(
    r"nud|nake|sex|porn|erot|\bbare\b(?!\s(?:feet|foot|hand|tree|branch|wall|floor))|\bbared\b"
    r"|topless|bottomless|undress|unclothed|unclad|disrob|\b(?:no|without|off)\s(?:\w+\s){0,2}cloth"
    r"|wearing nothing|nothing on\b|au naturel|in the buff|strip(?!e)|lingerie|underwear"
    r"|pant(?:y|ies)|\bbras?\b|g-?string|bikini|swim|thong|breast|boob|nippl|tits?\b|butt(?!er|on|ress)|\bass\b"
    r"|\barse|genital|penis|vagin|vulva|puss|cock\b|dick\b|orgas|masturb|intercourse"
    r"|(?:blow|hand)[\s-]?job|\brap(?:e|ed|es|ing)\b|\bcum|ahegao|fetish|hentai|nsfw|lewd|lust"
    r"|sensual|seduc|provocativ|bedroom|kinky|bdsm|cleavage|see-through|sheer|shower|bath(?!room)"
    r"|explicit|xxx|onlyfans|playboy|venus")

# beginnings of words that count inside others too (teenporn, babygirl) beside something sexual
STEMS = re.compile(
    r"child|teen|toddler|infant|underage|school(?:girl|boy|kid)|loli(?:ta|con)|shota|baby(?!lon)"
    r"|kid(?!ney|nap|man\b)|(?<!play)(?<!cow)boys?\b|(?<!cow)girl(?!friend)|minor|jailbait")

# Cyrillic and Greek letters that look Latin, and digits that stand for letters
ALIKE = str.maketrans("аеорсухіѕјкмтнвԁһӏαειοκρτυνχ", "aeopcyxisjkmthbdhlaeiokptuvx")
LEET = [str.maketrans("013457@$!|", f"o{one}eastasi{one}") for one in "il"]


def mentions_minor(text, category=""):
    """Whether a prompt is refused.

    Spelling tricks (accents, letters that look alike, digits for letters, c.h.i.l.d) are undone.
    category: the prompt's own, which may say that it is sexual.
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain
                    if unicodedata.category(c)[0] != "M" and unicodedata.category(c) != "Cf")
    plain = re.sub(r"[_\s]+", " ", plain).translate(ALIKE)
    readings = [plain] + [plain.translate(table) for table in LEET]
    dotted = [m for t in readings for m in re.findall(r"\b(?:\w\W+){2,}\w\b", t)]   # c.h.i.l.d
    spelled = [re.sub(r"\W", "", m) for m in dotted]
    everything = readings + spelled
    sexual = any(SEXUAL.search(t) for t in [category.lower(), *everything])
    for age in AGE.finditer(plain):
        years = years_of(age["a"] or age["b"] or age["u"])
        is_young = years < 18 + bool(age["under"])
        if is_young and (sexual or not age["under"]):   # "under 12 stars" is no age without nudity
            return True
    if sexual and any(years_of(m["y"] or m["alone"]) < 18 for m in YEARS.finditer(plain)):
        return True
    if any(MINOR.search(t) for t in everything):
        return True
    if any(STEMS.search(t) for t in spelled if len(t) > 3):
        return True
    return sexual and any(MAYBE_MINOR.search(t) or STEMS.search(t) for t in everything)


def refuse_minors(words, option):
    """UserError where words that are no prompt of their own, but steer pictures, mention minors."""
    if words and mentions_minor(words, "sexual"):
        raise UserError(f"{option}: {words!r} mentions minors; such words are refused, "
                        "and no option changes that")


def years_of(number):
    return int(number) if number.isdigit() else NUMBERS.index(number)
