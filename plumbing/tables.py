"""Files of rows (.txt, .csv, .jsonl), read whole or refused by the line that is wrong."""
import csv
import io
import json
import math
import os
import re
from textwrap import shorten

from plumbing.options import UserError


def read_text(path, option):
    """A text file's content, in UTF-8 with a byte-order mark or without."""
    if not os.path.isfile(path):
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{option}: the file {path} {what}; give another path")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path} is not UTF-8 text ({error.reason} at byte "
                        f"{error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{option}: {path} can't be read ({error.strerror})") from None
    if "\0" in text:                                    # UTF-16 without a mark has them
        raise UserError(f"{option}: {path} is not UTF-8 text (it has NUL characters); "
                        "save it as UTF-8")
    return text


def txt_rows(text, where):
    """[(line number, {"prompt": the line})], without empty lines and those that begin with #."""
    lines = enumerate(io.StringIO(text, newline=None), 1)
    return [(number, {"prompt": line.strip()}) for number, line in lines
            if line.strip() and not line.lstrip().startswith("#")]


def csv_rows(text, where):
    """The header, a list, and [(line number, {column: text or None})]."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, number = [], 1
    try:
        header = reader.fieldnames or []
        twice = [column for column in header if column and header.count(column) > 1]
        if twice:
            raise UserError(f"{where} has two columns {twice[0]!r}; rename one")
        while True:
            number = reader.line_num + 1                # a quoted text may span several lines
            row = next(reader, None)
            if row is None:
                return header, rows
            if None in row:
                raise UserError(f"{where}, line {number} has more fields than the header has "
                                "columns; quote texts with commas")
            rows.append((number, row))
    except csv.Error as error:
        raise UserError(f"{where}, line {number} is not CSV ({error})") from None


def jsonl_rows(text, where):
    """[(line number, {key: JSON's value})] of JSON objects, one a line."""
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        def once(pairs, number=number):
            keys = [key for key, _ in pairs]
            if len(set(keys)) < len(keys):
                raise UserError(f"{where}, line {number} has {max(keys, key=keys.count)!r} twice; "
                                "leave one out")
            return dict(pairs)
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error).partition(";")[0])
            raise UserError(f"{where}, line {number} is not JSON ({reason})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}, line {number} is {line.strip()!r:.40}, not a JSON object; "
                            "one object a line is needed")
        rows.append((number, row))
    return rows


def named(columns):
    """Columns as an error names them, on one line."""
    return shorten(", ".join(columns), 300) or "none"


# ---- values --------------------------------------------------------------------------------------

def whole_number(text):
    """A seed or a case number; pandas writes 5.0 where some are missing. ValueError."""
    if not re.fullmatch(r"\d{1,19}(\.0*)?", text, re.ASCII) or int(text.split(".")[0]) >= 2 ** 63:
        raise ValueError
    return int(text.split(".")[0])


def guidance_scale(text):
    """A guidance scale. ValueError if it is none."""
    value = float(text)
    if not 1 <= value < math.inf:                       # nan is not, either
        raise ValueError
    return value


def unbroken(text, where):
    """The text, if it can be written down: half a surrogate pair has no place in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds {text[error.start]!r}, which is no character; "
                        "leave it out") from None
    return text
