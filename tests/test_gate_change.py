"""Which lines a change touches, of files of every kind, whatever git is told to write."""

import subprocess

import pytest

from harness.gate.change import change_of_diff, change_since
from harness.gate.diff import ChangedFile, changed_files
from harness.gate.source import language_of, read_source
from harness.plan import UsageError


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "m")


@pytest.fixture
def changed(tmp_path):
    """(files before, after; git's settings) -> the changed files by name; a diff file says the same."""

    def make(before, after, *settings):
        folder = tmp_path / "repository"
        folder.mkdir()
        git(folder, "init", "--quiet")
        for name, value in settings:
            git(folder, "config", name, value)
        write(folder, before)
        commit(folder)
        for name in before.keys() - after.keys():
            (folder / name).unlink()
        write(folder, after)
        commit(folder)
        found = change_since(folder, "HEAD^")
        diff = tmp_path / "change.diff"
        diff.write_bytes(git(folder, "diff", "HEAD^"))
        assert sorted(change_of_diff(folder, diff).files, key=lambda item: item.file) == list(found.files)
        return {item.file: item for item in found.files}

    return make


BEFORE = b"one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n"


def test_added_and_rewritten_lines_have_the_numbers_they_have_afterwards(changed):
    after = b"zero\none\ntwo\n3\nfour\nfive\nsix\nseven\neight\nnine\n"
    assert changed({"a.py": BEFORE}, {"a.py": after}) == {"a.py": ChangedFile("a.py", frozenset({1, 4, 10}))}


def test_lines_only_taken_out_are_cuts_behind_the_line_before_them(changed):
    after = b"two\nfour\nfive\nsix\n"
    expected = ChangedFile("a.py", frozenset(), frozenset({0, 1, 4}))
    assert changed({"a.py": BEFORE}, {"a.py": after}) == {"a.py": expected}


def test_a_cut_touches_what_lies_on_both_sides_of_it():
    cut = ChangedFile("a.py", cuts=frozenset({4}))
    assert [cut.touches(*lines) for lines in ((4, 5), (1, 9), (4, 4), (5, 6), (2, 4))] == [
        *(True, True, False, False, False)
    ]
    added = ChangedFile("a.py", frozenset({4}))
    assert [added.touches(*lines) for lines in ((4, 4), (1, 4), (5, 6))] == [True, True, False]


def test_a_new_file_is_changed_in_every_line_and_an_empty_one_in_none(changed):
    found = changed({"a.py": b"x\n"}, {"a.py": b"x\n", "b.cu": b"1\n2\n3\n", "empty.cu": b""})
    assert found["b.cu"].lines == {1, 2, 3}
    assert not found["empty.cu"].lines


def test_a_deleted_file_is_no_part_of_what_is_judged(changed):
    assert changed({"a.cu": BEFORE, "b.cu": BEFORE}, {"b.cu": BEFORE + b"9\n"}).keys() == {"b.cu"}


def test_a_renamed_file_has_its_new_name_and_only_its_changed_lines(changed):
    found = changed({"old/a.cu": BEFORE}, {"new/b.cu": BEFORE.replace(b"four", b"4")})
    assert found == {"new/b.cu": ChangedFile("new/b.cu", frozenset({4}))}


def test_a_file_that_is_only_renamed_changes_nothing_unless_it_becomes_another_language(changed):
    found = changed({"a.cu": BEFORE, "b.txt": BEFORE + b"9\n"}, {"c.cu": BEFORE, "d.cu": BEFORE + b"9\n"})
    assert not found["c.cu"].lines
    assert found["d.cu"].lines == set(range(1, 10))


def test_a_file_without_a_last_newline_counts_its_last_line(changed):
    found = changed({"a.py": b"one\ntwo"}, {"a.py": b"one\ntwo\nthree"})
    # Its second line has a newline now.
    assert found["a.py"] == ChangedFile("a.py", frozenset({2, 3}))


def test_a_binary_file_has_no_lines_and_says_so(changed):
    found = changed({"a.cu": b"a\0b\n"}, {"a.cu": b"a\0c\n", "b.cu": "x\n".encode("utf-16")})
    assert found["a.cu"] == ChangedFile("a.cu", is_binary=True)
    assert found["b.cu"].is_binary


def test_carriage_returns_are_part_of_lines_and_never_end_them(changed):
    before = b"one\r\ntwo\r\nthree\rand\x0cmore\xe2\x80\xa8still\r\nfour\r\n"
    found = changed({"a.cu": before}, {"a.cu": before.replace(b"four", b"4").replace(b"two", b"2\r2")})
    assert found["a.cu"].lines == {2, 4}


def test_a_file_that_is_not_utf_8_is_text_all_the_same(changed, tmp_path):
    before = "// größer\nint a;\nint b;\n".encode("latin-1")
    found = changed({"a.cu": before}, {"a.cu": before.replace(b"b", "ü".encode("latin-1"))})
    assert found["a.cu"].lines == {3}
    source = read_source(tmp_path / "repository", "a.cu")
    assert source.language == "cuda"
    assert source.lines[1] == "int a;"


NAMES = ("with space.cu", "größe/käse.cu", 'quo"te.cu', "tab\there.cu", "b/b/c.cu", "a b/a b.cu", "-x.cu")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        (("diff.noprefix", "true"),),
        (("diff.mnemonicPrefix", "true"),),
        (("core.quotepath", "true"),),
    ],
)
def test_files_have_their_names_whatever_git_is_configured_to_write(changed, settings):
    before = dict.fromkeys(NAMES, BEFORE)
    before |= {f"old {name}": name.encode() + b"\n" + BEFORE for name in NAMES}
    after = dict.fromkeys(NAMES, BEFORE + b"9\n")
    after |= {f"new {name}": b"new\n" for name in NAMES}
    after |= {f"moved {name}": name.encode() + b"\n" + BEFORE + b"9\n" for name in NAMES}
    found = changed(before, after, *settings)
    expected = {name: [9] for name in NAMES}
    expected |= {f"new {name}": [1] for name in NAMES} | {f"moved {name}": [10] for name in NAMES}
    assert {file: sorted(item.lines) for file, item in found.items()} == expected


def test_a_copy_is_new_in_every_line(changed):
    # git looks for copies only in files that the change touches.
    after = {"a.cu": BEFORE + b"9\n", "b.cu": BEFORE}
    assert changed({"a.cu": BEFORE}, after, ("diff.renames", "copies"))["b.cu"].lines == set(range(1, 9))


def test_links_and_submodules_are_no_text_of_this_repository(changed, tmp_path):
    found = changed({"a.py": b"x\n"}, {"a.py": b"y\n"})
    assert found.keys() == {"a.py"}
    folder = tmp_path / "repository"
    (folder / "link.cu").symlink_to("a.py")
    assert {item.file for item in change_since(folder, "HEAD^").files} == {"a.py"}
    inner = folder / "sub.cu"
    inner.mkdir()
    git(inner, "init", "--quiet")
    commit(inner)
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "m")
    assert {item.file for item in change_since(folder, "HEAD^^").files} == {"a.py"}
    diff = git(folder, "diff", "HEAD^^")
    assert b"Subproject" in diff
    assert {item.file for item in changed_files(diff, folder, "d")} == {"a.py"}


def test_a_file_whose_mode_alone_changes_is_not_changed(changed, tmp_path):
    changed({"a.cu": BEFORE}, {"a.cu": BEFORE})
    folder = tmp_path / "repository"
    (folder / "a.cu").chmod(0o755)
    assert [item.lines for item in change_since(folder, "HEAD").files] == [frozenset()]


def test_a_diff_without_gits_headers_is_read_too(tmp_path):
    diff = b"--- csrc/a.cu\t2026-01-01\n+++ csrc/a.cu\t2026-01-02\n@@ -1,2 +1,3 @@\n one\n+two\n three\n"
    assert list(changed_files(diff, tmp_path, "d")) == [ChangedFile("csrc/a.cu", frozenset({2}))]
    assert list(changed_files(b"", tmp_path, "d")) == []


@pytest.mark.parametrize(
    "diff",
    [
        b"@@ -1 +1 @@\n-a\n+b\n",
        b"--- a/x\n+++ b/x\n@@ -1,5 +1,5 @@\n-a\n+b\n",
        b"+++ b/x\n@@ -1 +1 @@\n-a\n+b\n",
        b"diff --cc x\n--- a/x\n+++ b/x\n@@@ -1,1 -1,1 +1,2 @@@\n  a\n++b\n",
    ],
)
def test_a_damaged_or_combined_diff_is_refused(tmp_path, diff):
    with pytest.raises(UsageError, match=r"^the diff is (no unified|the combined) diff") as refusal:
        list(changed_files(diff, tmp_path, "the diff"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "text", "language"),
    [
        ("a.cu", "", "cuda"),
        ("a.CUH", "", "cuda"),
        ("a.py", "import triton\n\n@triton.jit\ndef k(): pass\n", "triton"),
        ("a.py", "from triton import jit\n\n@jit\ndef k(): pass\n", "triton"),
        (
            "a.py",
            "import triton\n\n@triton.autotune(configs=[])\n@triton.jit(noinline=True)\ndef k(): pass\n",
            "triton",
        ),
        ("a.py", "import triton\n\n@triton.jit\ndef k(:\n", "triton"),
        ("a.py", "import triton\n\ndef launch(): pass\n", "python"),
        ("a.py", "import numba\n\n@numba.jit\ndef k(): pass\n", "python"),
        ("a.py", "def k(:\n", "python"),
        ("a.md", "@triton.jit", ""),
        ("a.cpp", "", ""),
    ],
)
def test_the_language_is_told_from_name_and_text(file, text, language):
    assert language_of(file, text) == language
