"""Pages of the site that are no files of docs/: README first, the changelog, and the reference, a
page for each package of the library.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LIBRARY = "pipeline_lib"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs once it has listed docs/."""
    root = Path(config.config_file_path).parent
    packages = sorted(path.parent.name for path in (root / LIBRARY).glob("*/__init__.py"))
    pages = {
        "index.md": "---\nhide: [navigation]\n---\n\n" + in_docs(read(root / "README.md")),
        "changelog.md": in_docs(read(root / "CHANGELOG.md")),
    }
    pages |= {f"reference/{name}.md": f"# {LIBRARY}.{name}\n\n::: {LIBRARY}.{name}\n" for name in packages}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    assert config.nav is not None
    config.nav.append({"Reference": [f"reference/{name}.md" for name in packages]})
    return files


def in_docs(text: str) -> str:
    """A page of the repository's root, with links as from docs/."""
    text = re.sub(r"""(\]\(|srcset="|src=")docs/""", r"\1", text)
    return text.replace("](CHANGELOG.md)", "](changelog.md)")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
