"""Makes the man pages: python3 docs/man/make.py DIRECTORY, from the top of the tree.

What a page says of verbs and their options is the command line's own help, and what outlast.toml(5) says of
keys is docs/operate.md's table. The rest is in the *.in files here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from outlast.cli import parser  # noqa: E402 - of this tree, not of an installed one
from outlast.cli._completion import Option, Verb, describe  # noqa: E402
from outlast.cli._verbs import EXIT_CODES  # noqa: E402

# Verbs for who runs a site; all others are in section 1.
ADMIN = ("doctor", "config", "watcher", "store", "drain", "verify")
_KEY = re.compile(r"^\| (`[A-Za-z_.]+`(?:, `[A-Za-z_.]+`)*) \| (.*?) \| (.*) \|$", re.M)


def verbs(*, admin: bool) -> list[Verb]:
    """Return the verbs of section 8, or those of section 1."""
    every = [verb for verb in describe(parser()) if verb.words]
    # Of those that only group others there is nothing to tell but these.
    groups = {verb.words[:-1] for verb in every}
    return [verb for verb in every if verb.words not in groups and (verb.words[0] in ADMIN) is admin]


def keys() -> list[tuple[str, str, str]]:
    """Return the configuration's keys as docs/operate.md has them: name, default, meaning."""
    text = (HERE.parent / "operate.md").read_text()
    found = []
    for names, default, meaning in _KEY.findall(text):
        several = [name.strip("` ") for name in names.split(",")]
        # Names that follow one of a long table leave the table out.
        table = several[0].rpartition(".")[0]
        several = [name if "." in name or not table else f"{table}.{name}" for name in several]
        defaults = (
            default.split(", ") if default.count(", ") == len(several) - 1 else [default] * len(several)
        )
        # The other table of three columns there is that of the metrics.
        if not several[0].startswith("outlast_"):
            found += [(name, one, meaning) for name, one in zip(several, defaults, strict=True)]
    return found


def roff(text: str) -> str:
    """Return *text* so that it stands in a page as it is; `code` becomes bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha")
    text = text.replace("~", "\\(ti").replace("\N{EN DASH}", "none").replace("\N{HORIZONTAL ELLIPSIS}", "...")
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*|`([^`]+)`", lambda m: rf"\fB{m[1] or m[2]}\fR", text)
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))


def _option(option: Option) -> str:
    names = ", ".join(rf"\fB{roff(name)}\fR" for name in option.names)
    value = rf" \fI{roff(option.value)}\fR" if option.value else ""
    return f".TP\n{names}{value}\n{roff(option.help) or 'no argument'}\n"


def _verb(verb: Verb) -> str:
    usage = rf"\fBoutlast {roff(' '.join(verb.words))}\fR"
    if verb.options:
        usage += r" [\fIoption\fR ...]"
    usage += "".join(rf" \fI{roff(one.value)}\fR" for one in verb.arguments)
    paragraphs = [roff(" ".join(part.split())) for part in verb.text.split("\n\n")]
    text = "\n.PP\n".join(paragraphs)
    arguments = "".join(
        f".TP\n\\fI{roff(one.value)}\\fR\n{roff(one.help)}\n" for one in verb.arguments if one.help
    )
    options = [one for one in verb.options if one.names != ("-h", "--help")]
    return f".SS {usage}\n{text}\n" + arguments + "".join(map(_option, options))


def _exit_codes() -> str:
    rows = re.findall(r"^ +(\d+)  (.*)$", EXIT_CODES, re.M)
    return "".join(f".TP\n.B {code}\n{roff(text)}\n" for code, text in rows)


def _keys() -> str:
    parts = [
        f".TP\n\\fB{roff(name)}\\fR (default: {roff(default)})\n{roff(text)}\n"
        for name, default, text in keys()
    ]
    return "".join(parts)


def page(source: Path) -> str:
    """Return the page that *source*, a file NAME.SECTION.in, becomes."""
    whole = next(describe(parser()))
    filled = {
        "@USER_VERBS@": "".join(map(_verb, verbs(admin=False))),
        "@ADMIN_VERBS@": "".join(map(_verb, verbs(admin=True))),
        "@OPTIONS@": "".join(_option(one) for one in whole.options if one.names != ("-h", "--help")),
        "@EXIT_CODES@": _exit_codes(),
        "@KEYS@": _keys(),
    }
    lines = [filled.get(line, f"{line}\n") for line in source.read_text().splitlines()]
    return "".join(lines)


def main() -> None:
    """Write every page into the directory that was named."""
    into = Path(sys.argv[1])
    for source in sorted(HERE.glob("*.in")):
        section = source.stem.rpartition(".")[2]
        file = into / f"man{section}" / source.stem
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(source))


if __name__ == "__main__":
    main()
