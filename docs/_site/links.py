"""Links out of docs/ work on the site too: what they point to in the repository is shown there.

On GitHub `../benchmarks/page.py` is a file of the repository. The site has docs/ alone, so each file that a page links
to is put under `repository/`: code and recipes as pages, data as they are. And where the text of a link is the name of
a page's file, the site has the page's title.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

_LINK = re.compile(r"\]\((?:\.\./)+([^)#\s]+)(#[^)\s]*)?\)")
_NAMED = re.compile(r"\[([\w-]+\.md)\]\((?=(?:\.\./)*\1[#)])")
_LEXERS = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml"}


def on_files(files, config):
    """Add every file outside docs/ that a page links to."""
    root = Path(config.config_file_path).parent
    for page in list(files.documentation_pages()):
        text = Path(page.abs_src_path).read_text(encoding="utf-8")
        for target in {match[1] for match in _LINK.finditer(text) if _outside(match, page.src_uri, root)}:
            place = _place(target)
            if files.get_file_from_path(place) is None:
                content = _content(root / target, target)
                files.append(File.generated(config, place, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links out of docs/ to where their files are on the site, and call pages by their titles."""
    root = Path(config.config_file_path).parent
    above = "../" * page.file.src_uri.count("/")

    def rewrite(match):
        if not _outside(match, page.file.src_uri, root):
            return match[0]
        return f"]({above}{_place(match[1])}{match[2] or ''})"

    def titled(match):
        found = files.get_file_from_path(match[1])
        return match[0] if found is None else f"[{found.page.title}]("

    return _NAMED.sub(titled, _LINK.sub(rewrite, markdown))


def _outside(match, page, root):
    """Whether a link leaves docs/; one to a file that is not there is left to MkDocs, which refuses it."""
    up = match[0].count("../", 0, match.start(1) - match.start())
    return up == page.count("/") + 1 and (root / match[1]).is_file()


def _place(target):
    suffix = posixpath.splitext(target)[1]
    return f"repository/{target}" + (".md" if suffix in _LEXERS else "")


def _content(file, target):
    lexer = _LEXERS.get(file.suffix)
    if lexer is None:
        return file.read_bytes()
    code = file.read_text(encoding="utf-8")
    return f"---\nsearch: {{exclude: true}}\n---\n# {target}\n\n``````{lexer}\n{code}\n``````\n"
