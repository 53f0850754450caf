"""The read-only layers of every host: Debian's root file system, and the product installed from a checkout.

Both are kept in the cache under the hash of what they are made from, and made anew when that changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ci.testbed import machine
from ci.testbed.layout import HERE, PATH, Layout, TestbedError

# What `make install` reads.
PRODUCT_SOURCES = (
    *(
        "outlast",
        "criu_backend",
        "plugins",
        "hooks",
        "lib",
        "packaging",
        "scripts",
        "docs/man",
        "docs/operate.md",
    ),
    *("Makefile", "setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"),
)
_KEPT_PRODUCTS = 8
_KEPT_ROOTS = 2
_TAR_EXACTLY = ("--preserve-permissions", "--numeric-owner", "--xattrs", "--xattrs-include=*")
# What follows ends, with all that it started, when the testbed does; what it mounts is seen by nobody else.
_CONTAINED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--fork", "--pid", "--kill-child", "--mount-proc"),
)
# As rootfs.sh has it for mmdebstrap.
_APT = (
    'Acquire::Languages "none"',
    'Acquire::Check-Valid-Until "false"',
    'Acquire::Retries "3"',
    'DPkg::Options:: "--force-unsafe-io"',
)
_ENVIRONMENT: Mapping[str, str] = {"PATH": PATH, "LANG": "C.UTF-8"}


@contextmanager
def _cache_locked(layout: Layout) -> Iterator[Path]:
    """Hold the cache alone; gives an empty directory in it for unfinished work, removed afterwards."""
    layout.cache.mkdir(parents=True, exist_ok=True)
    layout.cache.chmod(0o700)  # it holds a whole system's set-user-id programs
    with (layout.cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in layout.cache.glob("unfinished-*"):
            remove(left)
        work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=layout.cache))
        work.chmod(0o755)
        try:
            yield work
        finally:
            remove(work)


def remove(path: Path) -> None:
    """Remove a file or a whole tree, if it is there, without crossing into another file system."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", path], check=True)


def root_key() -> str:
    """The name of the root file system: changes with its recipe."""
    return hashlib.sha256((HERE / "rootfs.sh").read_bytes()).hexdigest()[:12]


def root_file_system(layout: Layout) -> Path:
    """Return the directory of the root file system, which nobody may write to; makes what is missing.

    Takes no time when it is there, 2 s from its tarball, and a minute or so from a Debian mirror.

    Raises:
        TestbedError: it cannot be made; the message holds mmdebstrap's own last words.
    """
    tree = layout.cache / f"rootfs-{root_key()}"
    if tree.is_dir():
        return tree
    machine.require_programs("tar", "zstd")
    with _cache_locked(layout) as work:
        if tree.is_dir():
            return tree
        tarball = tree.with_name(tree.name + ".tar.zst")
        if not tarball.exists():
            _build_root(work, tarball)
        unpacked = work / "root"
        unpacked.mkdir()
        done = subprocess.run(
            [
                "tar",
                "--directory",
                str(unpacked),
                "--extract",
                "--file",
                str(tarball),
                "--zstd",
                *_TAR_EXACTLY,
            ],
            env=_ENVIRONMENT,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            tarball.unlink()
            raise TestbedError(f"{tarball}: {done.stderr.strip()}", hint="it is removed; try again")
        # On the disk before it has its name: after a power cut it is whole or absent.
        subprocess.run(["sync", "--file-system", layout.cache], check=True)
        unpacked.rename(tree)
        tarball.touch()
        for old in _newest_first(layout.cache.glob("rootfs-*.tar.zst"))[_KEPT_ROOTS:]:
            remove(old)
            remove(old.with_name(old.name.removesuffix(".tar.zst")))
    return tree


def added_layer(layout: Layout, root: Path, name: str) -> Path:
    """Return the directory of a layer above *root*, with more packages: those of the recipe *name*.sh.

    Takes no time when it is there, and up to some minutes from a Debian mirror; it is named by its recipe's hash.

    Raises:
        TestbedError: it cannot be made; the message holds apt's own last words.
    """
    recipe = HERE / f"{name}.sh"
    key = hashlib.sha256(root.name.encode() + recipe.read_bytes()).hexdigest()[:12]
    layer = layout.cache / f"{name}-{key}"
    if layer.is_dir():
        return layer
    with _cache_locked(layout) as work:
        if layer.is_dir():
            return layer
        machine.say(f"installing more packages ({recipe.name}), which takes a minute or more the first time")
        log = layer.with_name(f"{name}.log")
        apt = work / "apt.conf"
        options = [*machine.apt_options(), *_APT]
        apt.write_text("".join(f"{option};\n" for option in options))
        run_recipe(
            f"installing more packages ({recipe.name})",
            [recipe, root, work / "layer", work / "build"],
            log,
            {"APT_CONFIG": str(apt)},
        )
        subprocess.run(["sync", "--file-system", work], check=True)
        (work / "layer").rename(layer)
        for old in _newest_first(layout.cache.glob(f"{name}-????????????"))[_KEPT_ROOTS:]:
            remove(old)
    return layer


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _build_root(work: Path, tarball: Path) -> None:
    machine.require_programs("mmdebstrap", "unshare")
    mirror = machine.debian_mirror()
    machine.say("building the root file system of the hosts, which takes a minute or two the first time")
    log = tarball.with_name("rootfs.log")
    run_recipe(
        f"building the root file system from {mirror}",
        [HERE / "rootfs.sh", work / "root.tar", mirror, *machine.apt_options()],
        log,
        {"TMPDIR": str(work)},
    )
    packed = work / "root.tar.zst"
    subprocess.run(["zstd", "-q", "-6", "-T0", "--rm", work / "root.tar", "-o", packed], check=True)
    subprocess.run(["sync", "--file-system", work], check=True)
    packed.rename(tarball)


def run_recipe(what: str, recipe: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
    """Run a recipe, a script of bash's with its arguments, contained and with all that it says in *log*.

    Raises:
        TestbedError: it did not succeed; the message holds its last words.
    """
    with log.open("wb") as output:
        made = subprocess.run(
            [*_CONTAINED, "bash", *map(str, recipe)],
            env={**_ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if made.returncode:
        text = log.read_text(errors="replace")
        hint = f"the whole log is in {log}"
        if "NO_PUBKEY" in text or "not signed" in text:
            hint = "this machine's debian-archive-keyring is too old for Debian 13: upgrade that package"
        last = "\n".join(text.strip().splitlines()[-8:])
        raise TestbedError(f"{what}:\n{last}", hint=hint)


def run_in_root(
    root: Path, scratch: Path, binds: Sequence[str], argv: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    """Run a command in the root file system without changing that.

    Args:
        scratch: a directory for what the command writes; made and removed here.
        binds: as in in_root.sh.
    """
    scratch.mkdir(parents=True)
    try:
        return subprocess.run(
            [*_CONTAINED, "bash", str(HERE / "in_root.sh"), str(root), str(scratch), *binds, "--", *argv],
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    finally:
        remove(scratch)


def product_key(checkout: Path, root: Path) -> str:
    """The hash of everything that the installed product is made from."""
    digest = hashlib.sha256(root.name.encode())
    for recipe in ("images.py", "in_root.sh"):
        digest.update((HERE / recipe).read_bytes())
    for path in _sources(checkout):
        name = path.relative_to(checkout)
        digest.update(b"\0%o %s\0" % (path.stat().st_mode, os.fsencode(name)))
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources(checkout: Path) -> Iterator[Path]:
    """The files that the product is made from, in order, without what a build may have left among them."""
    for name in PRODUCT_SOURCES:
        top = checkout / name
        if top.is_file():
            yield top
        for directory, directories, files in os.walk(top):
            directories[:] = sorted(set(directories) - {"__pycache__"})
            for path in (Path(directory, file) for file in sorted(files)):
                if path.is_file() and not _is_built(path):
                    yield path


def _is_built(path: Path) -> bool:
    """Whether it is an object file or program, made for whatever system the checkout has been used on."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def product_layer(layout: Layout, checkout: Path, root: Path) -> Path:
    """Install the product, as `make install` puts it below /, into the testbed's layer for it; return that.

    Raises:
        TestbedError: there is no Makefile, or make did not succeed; the message holds its last words.
    """
    if not (checkout / "Makefile").is_file():
        raise TestbedError(
            f"{checkout}: no Makefile to install the product with",
            hint="give the checkout with 'up --product DIR', or start a bare cluster with 'up --no-product'",
        )
    layer = layout.cache / f"product-{product_key(checkout, root)}"
    with _cache_locked(layout) as work:
        if layer.is_dir():
            os.utime(layer)
        else:
            machine.say("installing the product")
            _install_product(checkout, root, work)
            (work / "layer").rename(layer)
        for old in _newest_first(layout.cache.glob("product-*"))[_KEPT_PRODUCTS:]:
            remove(old)
        shutil.copytree(layer, layout.product, symlinks=True)
    return layout.product


def _install_product(checkout: Path, root: Path, work: Path) -> None:
    layer, copy = work / "layer", work / "source"
    layer.mkdir()
    # A copy, so that nothing is written into the checkout, and nothing goes in that the key does not know.
    for path in _sources(checkout):
        target = copy / path.relative_to(checkout)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    done = run_in_root(
        root,
        work / "build",
        [f"{copy}=/source:rw", f"{layer}=/layer:rw"],
        ["make", "--directory=/source", "install", "DESTDIR=/layer", "PREFIX=/usr"],
    )
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise TestbedError(f"make install in {checkout} ended with {done.returncode}:\n{last}")
    for name in (path.relative_to(layer) for path in layer.rglob("*") if path.is_dir()):
        if (root / name).is_symlink():
            raise TestbedError(f"make install: /{name} is a link in Debian; install below /usr")
