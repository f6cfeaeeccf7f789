"""Puts a newer QEMU beside the system's one, so that tests can migrate between two versions on one machine.

Theory of operation
-------------------
Debian 12 has QEMU 7.2. A newer one comes from a later Debian suite: a private apt (own lists, own empty
package state, the machine's own mirror and Debian's key) downloads QEMU and all libraries that it needs, and
they are unpacked, never installed, below the cache. The programs then get that tree's own dynamic loader and
library path written into them. So they run without chroot: paths of disks and sockets mean what they say,
and /proc/<pid>/exe is QEMU itself. A small script per program adds the firmware directories.

Rule 1: nothing outside of the cache is changed.
Rule 2: the tree appears under its final name only when it is complete. Its absolute path is written into it,
so a tree that has been moved counts as missing.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path

from vmferry.testing.host_tools import HostToolError, publish, run

SUITE = "forky"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("qemu-system-x86", "qemu-utils", "seabios", "ipxe-qemu")
SYSTEM_PROGRAM = "qemu-system-x86_64"
PROGRAMS = (SYSTEM_PROGRAM, "qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
_LAYOUT = "1"  # change this when the tree is built in another way: old trees are then built anew
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios")


def home(cache: Path) -> Path:
    """The directory with the runnable programs, if `is_built`."""
    return cache / f"qemu-{SUITE}"


def is_built(cache: Path) -> bool:
    """Whether `build` has nothing to do. Reads one small file."""
    stamp = home(cache) / "stamp"
    return stamp.exists() and stamp.read_text() == _stamp(home(cache))


def build(cache: Path) -> Path:
    """Downloads (45 MB) and unpacks (200 MB) the newer QEMU if need be; returns the directory of programs.

    Raises HostToolError. **If this raises**, there is no half-built tree and it may be called again.
    """
    target = home(cache)
    if is_built(cache):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="qemu-download-") as scratch:
        archives = _download(Path(scratch))
        tree = Path(scratch) / "tree"
        _unpack(archives, tree / "root")
        for program in PROGRAMS:
            _make_runnable(program, tree, target)
        publish(_stamp(target).encode(), tree / "stamp")
        if target.exists():
            shutil.rmtree(target)
        tree.rename(target)
    printed = run([str(target / SYSTEM_PROGRAM), "--version"])
    if "QEMU emulator version" not in printed:
        raise HostToolError(f"{target / SYSTEM_PROGRAM} does not run: {printed}")
    return target


def _stamp(target: Path) -> str:
    return f"layout {_LAYOUT} suite {SUITE} at {target} packages {' '.join(PACKAGES)}\n"


def _mirror() -> str:
    """The URI from which this machine itself gets Debian's main component."""
    codename = _os_codename()
    wanted = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    printed = run(["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"])
    for line in printed.splitlines():
        uri, release, component = line.split("|")
        if release == codename and component == "main":
            return uri
    raise HostToolError(f"apt has no source for the suite {codename!r}, component main; this needs a Debian host")


def _os_codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return shlex.split(value)[0]
    raise HostToolError("/etc/os-release has no VERSION_CODENAME; this needs a Debian host")


def _download(scratch: Path) -> list[Path]:
    """The .deb files of PACKAGES and of all that they need, checked against Debian's key by apt."""
    if not KEYRING.exists():
        raise HostToolError(f"{KEYRING} is missing: install debian-archive-keyring")
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {SUITE} main\n")
    settings = {
        "Dir::State": scratch / "state",
        "Dir::State::status": scratch / "status",
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    config = scratch / "apt.conf"
    config.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = {"APT_CONFIG": str(config)}
    run(["apt-get", "update"], environment=environment)
    run(["apt-get", "install", "-y", "--download-only", *PACKAGES], environment=environment)
    archives = sorted((scratch / "cache" / "archives").glob("*.deb"))
    if not archives:
        raise HostToolError(f"apt downloaded nothing for {' '.join(PACKAGES)} of {SUITE}")
    return archives


def _unpack(archives: list[Path], root: Path) -> None:
    root.mkdir(parents=True)
    for archive in archives:
        run(["dpkg-deb", "-x", str(archive), str(root)])
    for unused in ("doc", "man", "locale", "lintian", "bash-completion"):
        shutil.rmtree(root / "usr" / "share" / unused, ignore_errors=True)


def _make_runnable(program: str, tree: Path, target: Path) -> None:
    """Makes `program` of `tree` run once `tree` has been moved to `target`."""
    binary = tree / "root" / "usr" / "bin" / program
    if not binary.exists():
        raise HostToolError(f"{SUITE} has no program {program}")
    root = target / "root"
    libraries = root / _LIBRARIES
    # An rpath, not LD_LIBRARY_PATH: the environment would also reach the host's programs that QEMU starts.
    loader = libraries / "ld-linux-x86-64.so.2"
    run(["patchelf", "--set-interpreter", str(loader), str(binary)])
    run(["patchelf", "--force-rpath", "--set-rpath", str(libraries), str(binary)])
    words = [str(root / "usr" / "bin" / program)]
    if program == SYSTEM_PROGRAM:
        for folder in _FIRMWARE:
            words += ["-L", str(root / folder)]
    script = (
        "#!/bin/sh\n"
        "# exec: the process id that the caller sees is QEMU's own.\n"
        f"export QEMU_MODULE_DIR={shlex.quote(str(libraries / 'qemu'))}\n"
        f'exec {shlex.join(words)} "$@"\n'
    )
    publish(script.encode(), tree / program, mode=0o755)
