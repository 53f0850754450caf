"""Which instructions this node's processors have: a program that has seen some goes on using them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from outlast.errors import OutlastError

# Of the flags on x86 those that programs ask for before they choose how to compute; all others are the
# kernel's own affair, and differ between kernels on the same processor.
# Source: Linux, arch/x86/include/asm/cpufeatures.h.
_INSTRUCTIONS = re.compile(
    r"mmx|mmxext|3dnow(ext)?|pni|s?sse\w*|avx\w*|fma4?|f16c|xop|tbm|bmi[12]|abm|popcnt|movbe|adx|cx16|lahf_lm"
    r"|aes|vaes|v?pclmulqdq|sha_ni|sha512|sm[34]|gfni|rdrand|rdseed|rdpid|rdtscp|fsgsbase|xsave\w*|xgetbv1"
    r"|clflush(opt)?|clwb|cldemote|movdiri|movdir64b|enqcmd|serialize|tsxldtrk|rtm|hle|waitpkg|pku|ospke"
    r"|amx_\w+|cmpccxadd|prefetchi|raoint"
)


class UnfitNode(OutlastError):
    """A node's processors lack what a checkpoint needs; another node may have it."""


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the names, sorted, of what the processors here can do and not all can; empty where none are told."""
    match = re.search(r"^(flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.M)
    if match is None:
        return []
    words = match[2].split()
    return sorted(set(words if match[1] == "Features" else filter(_INSTRUCTIONS.fullmatch, words)))


def require(needed: Iterable[str], name: str) -> None:
    """Make sure that checkpoint *name* can go on here, made where the processors had *needed*.

    Raises:
        UnfitNode: they lack something here.
    """
    if missing := sorted(set(needed) - set(features())):
        raise UnfitNode(
            f"{name}: the processors of this node lack {', '.join(missing)}, which those had that it was made on",
            hint="have such jobs run on nodes of one kind (sbatch --constraint)",
        )
