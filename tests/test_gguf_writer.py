"""What the writer of GGUF files writes, the gguf package and this package's reader read back."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_fused.checkpoint.gguf_header import ALIGNMENT, read_gguf_header
from glm_fused.checkpoint.gguf_types import GGML_TYPES
from glm_fused.checkpoint.gguf_writer import NewTensor, encode_entry, write_gguf
from glm_fused.checkpoint.writing import new_file, new_folder

WIDTHS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u8", "i8", "f8")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = [
    st.booleans(),
    TEXT,
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    *(st.sampled_from([np.dtype(w).type(x) for x in (0, 1, 100)]) for w in WIDTHS),
]
LISTS = [
    st.lists(TEXT, min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    *(st.lists(st.integers(0, 100), max_size=5).map(lambda x, w=w: np.array(x, w)) for w in WIDTHS),
]
SMALL = st.lists(st.integers(1, 3), min_size=0, max_size=3)


def written(path, entries, tensors, contents, alignment):
    with new_file(path) as file:
        write_gguf(file, entries, tensors, lambda tensor: [contents[tensor.name]], alignment)
    return path


@settings(max_examples=200, deadline=None)
@given(
    values=st.dictionaries(st.from_regex("[a-z][a-z.]{0,8}", fullmatch=True),
                           st.one_of(*SCALARS, *LISTS), max_size=6),
    kinds=st.lists(st.tuples(st.sampled_from(list(GGML_TYPES)), SMALL), max_size=4),
    alignment=st.sampled_from([None, 8, 32, 256]),
)  # fmt: skip
def test_what_is_written_is_read(tmp_path_factory, values, kinds, alignment):
    if alignment is not None:
        values = values | {ALIGNMENT: alignment}
    tensors = [
        NewTensor(f"t{i}", GGML_TYPES[kind], (*sizes, GGML_TYPES[kind].columns * 2))
        for i, (kind, sizes) in enumerate(kinds)
    ]
    contents = {t.name: np.random.default_rng(i).bytes(t.nbytes) for i, t in enumerate(tensors)}
    entries = [encode_entry(key, value) for key, value in values.items()]
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    written(path, entries, tensors, contents, alignment or 32)
    header, data = read_gguf_header(path), path.read_bytes()
    assert header.metadata.keys() == values.keys()
    for key, value in values.items():
        found = header.metadata[key]
        assert np.array_equal(found, value) and isinstance(found, list) == isinstance(value, list)
    assert [data[slice(*header.places[key])] for key in values] == entries
    for tensor in tensors:
        found = header.tensors[tensor.name]
        assert (found.type, found.shape) == (tensor.type, tensor.shape)
        assert data[found.start : found.end] == contents[tensor.name]
    theirs = gguf.GGUFReader(path)
    assert {t.name: t.data.tobytes() for t in theirs.tensors} == contents
    for key, value in values.items():
        if not isinstance(value, np.ndarray):
            assert theirs.fields[key].contents() == value


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with new_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_that_is_not_finished_leaves_none(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        raise ZeroDivisionError
    assert not list((tmp_path / "a").iterdir())
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with pytest.raises(FileExistsError, match="b is not empty"), new_folder(tmp_path / "a" / "b"):
        raise AssertionError
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
