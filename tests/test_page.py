"""The files of the live page: whole, safe, and sent as they should be; browsers are not needed."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from starlette.applications import Starlette
from starlette.testclient import TestClient

from glm_fused.serve import page

FILES = {file.name: file for file in page.FOLDER.iterdir()}
SCRIPTS = sorted(name for name in FILES if name.endswith(".js"))
# What makes markup or code of a text, in whatever way the text came.
MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|DOMParser|createContextual"
    r"|setHTML|\beval\b|new Function|set(?:Timeout|Interval)\(\s*[\"'`]|import\((?![\"'])"
)


class Document(HTMLParser):
    """What a document's elements ask for."""

    VOID = ("meta", "link", "img", "input", "path", "circle", "rect")

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.files, self.inline, self.unlabelled = [], [], [], []
        self.labels, self._open = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.files += [given[name] for name in ("src",) if name in given]
        self.files += [given["href"]] if tag == "link" else []
        self.labels |= {given["for"]} if "for" in given else set()
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in given) else []
        self.inline += [
            f"{tag}.{name}" for name in given if name.startswith("on") or name == "style"
        ]
        control = tag in ("input", "textarea", "select")
        if control and "label" not in self._open and "aria-label" not in given:
            self.unlabelled.append(given.get("id", tag))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    @property
    def nameless(self) -> list[str]:
        """The controls without a label."""
        return [name for name in self.unlabelled if name not in self.labels]


@pytest.fixture(scope="module")
def document():
    return Document(FILES["index.html"].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def client():
    return TestClient(Starlette(routes=page.routes(None)))


def text(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


def exported(name: str) -> set[str]:
    pattern = r"^export (?:async )?(?:function\*?|class|const) ([\w$]+)"
    return set(re.findall(pattern, text(name), re.MULTILINE))


def imported(name: str) -> dict[str, set[str]]:
    """The names that a script imports, by the file that it imports them from."""
    found = re.findall(r'^import \{([^}]*)\} from "\./([^"]+)";', text(name), re.MULTILINE)
    assert len(found) == text(name).count("import {")
    return {file: set(re.split(r",\s*", names.strip())) for names, file in found}


def test_what_the_document_names_is_there(document):
    assert document.files
    for name in document.files:
        assert name.startswith("page/") and name.removeprefix("page/") in FILES, name
    assert len(document.ids) == len(set(document.ids))
    for name in SCRIPTS:
        wanted = set(re.findall(r'\$\("([^"]+)"\)', text(name)))
        assert wanted <= set(document.ids), (name, wanted - set(document.ids))


def test_scripts_import_what_others_export_and_nothing_is_left_over():
    used = {name: set() for name in SCRIPTS}
    for name in SCRIPTS:
        for file, names in imported(name).items():
            assert names <= exported(file), (name, file, names - exported(file))
            used[file] |= names
    used["api.js"].add("events")  # the browser's tests import it
    for name in SCRIPTS:
        assert exported(name) == used[name], name


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_of_texts(name):
    assert not MARKUP.findall(text(name))


@pytest.mark.parametrize(
    "planted",
    [
        "node.innerHTML = text",
        "node.insertAdjacentHTML('beforeend', text)",
        "document.write(text)",
        "eval(text)",
        "new Function(text)",
        'setTimeout("go()", 5)',
        "frame.srcdoc = text",
        "import(url)",
    ],
)
def test_planted_markup_is_found(planted):
    assert MARKUP.search(planted)


def test_nothing_in_the_document_needs_more_than_the_policy_allows(document):
    assert document.inline == []
    planted = Document('<p style="x"><script>go()</script><button onclick="go()"><style></style>')
    assert planted.inline == ["p.style", "script", "button.onclick", "style"]


def test_every_control_has_a_label(document):
    assert document.nameless == []
    planted = Document(
        '<label>A<input></label><textarea id="b"></textarea><input id="c" aria-label="C">'
    )
    assert planted.nameless == ["b"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_comes_from_elsewhere(name):
    """The page works on a machine without a network."""
    known = ("http://www.w3.org/2000/svg", "https?:")
    found = re.findall(r"https?:[^\s\"')]*", text(name))
    assert [url for url in found if not url.startswith(known)] == []


def test_the_page_and_its_files_are_served_with_their_policy(client):
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        response = client.get(path)
        assert response.status_code == 200, path
        file = FILES[path.removeprefix("/page/") if path != "/" else "index.html"]
        assert response.content == file.read_bytes()
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    kinds = {"style.css": "text/css", "main.js": "javascript", "icon.svg": "image/svg+xml"}
    for name, kind in kinds.items():
        assert kind in client.get(f"/page/{name}").headers["content-type"]


def test_a_file_that_is_known_is_not_sent_again(client):
    for path in ("/", "/page/main.js"):
        first = client.get(path)
        tag = {"If-None-Match": first.headers["etag"]}
        assert first.headers["cache-control"] == "no-cache"
        assert client.get(path, headers=tag).status_code == (304 if path != "/" else 200)


@pytest.mark.parametrize(
    "path",
    ["page/../page.py", "page/%2e%2e/page.py", "page/..%2fpage.py", "page//etc/passwd", "page/"],
)
def test_no_other_file_can_be_had(client, path):
    response = client.get(f"/{path}")
    assert response.status_code == 404
    assert "def routes" not in response.text


def test_it_only_answers_gets(client):
    assert client.post("/").status_code == 405
    assert client.post("/page/main.js").status_code == 405
    assert client.head("/").status_code == 200


def test_the_files_are_of_known_kinds():
    """A wheel takes all that lies there, so nothing of an editor's may."""
    assert all(re.fullmatch(r"[a-z]+\.(html|css|js|svg)", name) for name in FILES)
