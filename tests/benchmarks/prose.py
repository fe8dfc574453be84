"""Write 8 MB of English prose for bench_recipe.py: python tests/benchmarks/prose.py FOLDER [PACKAGE.deb ...]

The paragraphs of An Anarchist FAQ and of The Debian Administrator's Handbook, a text file for each page, without the
menus, headings and lists that repeat from page to page, and without the FAQ's appendices, older forms of its sections: no
model should meet half of what it is scored on in training. Out of Debian's packages anarchism (15.3-3) and debian-handbook
(11.20220922), fetched by apt-get where none are named. Then: python prepare.py --preset cpu --dataset FOLDER
"""

import argparse
import subprocess
import tempfile
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

PAGES = {"anarchism": "html/[!a]*.html", "debian-handbook": "html/en-US/*.html"}  # by package, in its /usr/share/doc


class Paragraphs(HTMLParser):
    """What stands in <p> of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "p":
            self.inside, self.found = True, [*self.found, ""]

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("p", "body")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="where the text goes; made anew")
    p.add_argument("packages", type=Path, nargs="*", help="the two, where they are here already")
    args, hashed, size = p.parse_args(), sha256(), 0
    if args.folder.exists():
        p.error(f"{args.folder} is there already: name another folder")
    args.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        if not args.packages:
            subprocess.run(["apt-get", "download", *PAGES], cwd=folder, check=True)
        for package in args.packages or Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for name, pages in PAGES.items():
            for page in sorted(Path(folder, "usr/share/doc", name).glob(pages)):
                lines = (" ".join(part.split()) for part in Paragraphs(page.read_text("utf-8", "replace")).found)
                data = "".join(f"{line}\n" for line in lines if line).encode()
                (args.folder / f"{name}-{page.stem}.txt").write_bytes(data)
                hashed.update(data)
                size += len(data)
    print(f"{size / 1e6:.2f} MB of prose in {args.folder}, sha256 {hashed.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
