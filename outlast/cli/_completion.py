"""Completion for shells, made from the command line's own parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from outlast.cli._verbs import AddVerb, print_json, with_json

_SHELLS = ("bash", "zsh", "fish")
# What an argument's name in help says of what it is.
_FILES = frozenset({"FILE", "PATH", "DIR", "DIR|URL"})


def add(verb: AddVerb) -> None:
    """Add the verb."""
    sub = with_json(verb("completion", _completion))
    sub.add_argument("shell", choices=_SHELLS, help="which shell's: bash, zsh or fish")


def _completion(args: argparse.Namespace) -> None:
    """Print a shell's completion of this command, to be read by it.

    For bash: . <(outlast completion bash). Installed packages bring all three along.
    """
    from outlast.cli import parser

    text = script(args.shell, parser())
    print_json({"shell": args.shell, "script": text}) if args.json else print(text, end="")


@dataclass(frozen=True)
class Option:
    """One option of a verb. *value* is the name of what follows it, "" for nothing."""

    names: tuple[str, ...]
    help: str
    value: str
    choices: tuple[str, ...]
    required: bool = False


@dataclass(frozen=True)
class Verb:
    """One verb as its users see it. *words* are those that choose it, such as ("store", "check")."""

    words: tuple[str, ...]
    help: str
    text: str
    options: tuple[Option, ...]
    arguments: tuple[Option, ...]


def describe(of: argparse.ArgumentParser, words: tuple[str, ...] = (), help_: str = "") -> Iterator[Verb]:
    """Yield what *of* itself takes and, below it, each verb that help shows, in the order of help."""
    options: list[Option] = []
    arguments: list[Option] = []
    below: list[tuple[str, str, argparse.ArgumentParser]] = []
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for shown in action._choices_actions:
                below.append((shown.dest, shown.help or "", action.choices[shown.dest]))
            continue
        if action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
        choices = tuple(map(str, action.choices or ()))
        names = tuple(action.option_strings) or (value,)
        if choices and not action.metavar:
            value = "|".join(choices)
        one = Option(names, action.help or "", value, choices, action.required)
        (options if action.option_strings else arguments).append(one)
    yield Verb(words, help_, of.description or "", tuple(options), tuple(arguments))
    for word, text, parser in below:
        yield from describe(parser, (*words, word), text)


def script(shell: str, of: argparse.ArgumentParser) -> str:
    """Return the program that has *shell* complete the command line: bash, zsh or fish."""
    verbs = list(describe(of))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs)


def _below(verbs: list[Verb], words: tuple[str, ...]) -> list[Verb]:
    return [verb for verb in verbs if len(verb.words) == len(words) + 1 and verb.words[:-1] == words]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# Finds the verb among the words before the one that is completed, by the tables that precede it. Options
# that take a value hide the word after them.
_BASH = """\
_outlast() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path=outlast word i
	for ((i = 1; i < COMP_CWORD; i++)); do
		word=${COMP_WORDS[i]}
		case " ${_outlast_valued[$path]:-} " in
		*" $word "*) i=$((i + 1)); continue ;;
		esac
		if [[ " ${_outlast_below[$path]:-} " == *" $word "* ]]; then path="$path $word"; fi
	done
	COMPREPLY=()
	if [[ " ${_outlast_valued[$path]:-} " == *" $prev "* ]]; then
		if [[ " ${_outlast_files[$path]:-} " == *" $prev "* ]]; then
			compopt -o filenames 2>/dev/null
			mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		else
			mapfile -t COMPREPLY < <(compgen -W "${_outlast_choices["$path $prev"]:-}" -- "$cur")
		fi
	elif [[ $cur == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "${_outlast_options[$path]:-}" -- "$cur")
	else
		mapfile -t COMPREPLY < <(compgen -W "${_outlast_below[$path]:-}" -- "$cur")
	fi
}
complete -F _outlast outlast
"""


def _bash(verbs: list[Verb]) -> str:
    tables: dict[str, dict[str, str]] = {
        name: {} for name in ("options", "valued", "files", "below", "choices")
    }
    for verb in verbs:
        path = " ".join(("outlast", *verb.words))  # bash takes no empty subscript
        names = [name for option in verb.options for name in option.names]
        valued = [option for option in verb.options if option.value]
        tables["options"][path] = " ".join(names)
        tables["valued"][path] = " ".join(name for option in valued for name in option.names)
        files = [option for option in valued if option.value in _FILES]
        tables["files"][path] = " ".join(name for option in files for name in option.names)
        below = [one.words[-1] for one in _below(verbs, verb.words)]
        tables["below"][path] = " ".join([*below, *(word for one in verb.arguments for word in one.choices)])
        for option in valued:
            for name in option.names if option.choices else ():
                tables["choices"][f"{path} {name}"] = " ".join(option.choices)
    lines = ["# bash completion for outlast, made by 'outlast completion bash'"]
    for name, table in tables.items():
        lines.append(f"declare -gA _outlast_{name}=(")
        lines += [f"\t[{_quoted(path)}]={_quoted(words)}" for path, words in table.items() if words]
        lines.append(")")
    return "\n".join(lines) + "\n" + _BASH


# Finds the verb as the bash function does, and then completes as if the line began with it.
_ZSH = """\
_outlast() {
	local name=_outlast at=1 i
	for ((i = 2; i < CURRENT; i++)); do
		if [[ " ${_outlast_valued[$name]} " == *" $words[i] "* ]]; then
			((i++))
		elif [[ " ${_outlast_below[$name]} " == *" $words[i] "* ]]; then
			name+=__${words[i]//-/_}
			at=$i
		fi
	done
	shift $((at - 1)) words
	((CURRENT -= at - 1))
	_call_function _ ${name}__line
}
_outlast "$@"
"""


def _zsh(verbs: list[Verb]) -> str:
    tables: dict[str, list[str]] = {"below": [], "valued": []}
    lines = []
    for verb in verbs:
        name = "__".join(("_outlast", *(word.replace("-", "_") for word in verb.words)))
        specs = []
        for option in verb.options:
            text = _zsh_text(option.help or "-")
            value = f":{_zsh_text(option.value)}:{_zsh_action(option)}" if option.value else ""
            specs += [_quoted(f"{one}[{text}]{value}") for one in option.names]
        below = _below(verbs, verb.words)
        if below:
            words = " ".join(f"{one.words[-1]}\\:{_quoted(_zsh_text(one.help))}" for one in below)
            specs.append('"1:command:((' + words.replace('"', '\\"') + '))"')
        specs += [
            _quoted(f"{at}:{_zsh_text(one.value)}:{_zsh_action(one).strip() or '()'}")
            for at, one in enumerate(verb.arguments, 1)
        ]
        lines += [
            f"{name}__line() {{",
            "\t_arguments \\",
            *(f"\t\t{spec} \\" for spec in specs),
            "\t\t&& return",
            "}",
        ]
        tables["below"] += [name, " ".join(one.words[-1] for one in below)]
        valued = [one for option in verb.options if option.value for one in option.names]
        tables["valued"] += [name, " ".join(valued)]
    head = ["#compdef outlast", "# made by 'outlast completion zsh'"]
    for name, table in tables.items():
        head += [f"typeset -gA _outlast_{name}=(", *(f"\t{_quoted(one)}" for one in table), ")"]
    return "\n".join([*head, *lines]) + "\n" + _ZSH


def _zsh_text(text: str) -> str:
    for letter in "\\[]:":
        text = text.replace(letter, "\\" + letter)
    return text


def _zsh_action(option: Option) -> str:
    if option.choices:
        return f"({' '.join(option.choices)})"
    return "_files" if option.value in _FILES else " "


def _fish(verbs: list[Verb]) -> str:
    lines = ["# made by 'outlast completion fish'", "complete -c outlast -f"]
    tops = " ".join(verb.words[0] for verb in verbs if len(verb.words) == 1)
    for verb in verbs:
        if not verb.words:
            seen = f"not __fish_seen_subcommand_from {tops}"
        else:
            seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.words)
        below = _below(verbs, verb.words)
        if below and verb.words:
            seen += f"; and not __fish_seen_subcommand_from {' '.join(one.words[-1] for one in below)}"
        when = f"complete -c outlast -n {_quoted(seen)}"
        lines += [f"{when} -a {one.words[-1]} -d {_quoted(one.help)}" for one in below]
        for option in verb.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = ""
            if option.value:
                value = " -r" + (f" -a {_quoted(' '.join(option.choices))}" if option.choices else "")
                value += " -F" if option.value in _FILES else ""
            lines.append(f"{when} {names}{value} -d {_quoted(option.help)}")
        lines += [f"{when} -a {_quoted(' '.join(one.choices))}" for one in verb.arguments if one.choices]
    return "\n".join(lines) + "\n"
