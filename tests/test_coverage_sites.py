"""The model of coverage: it merges by union, goes through JSON unchanged, and refuses what does not fit."""

import json

import pytest

from harness.coverage.sites import (
    MAX_CASES,
    Coverage,
    CoverageError,
    FileCoverage,
    Hits,
    Site,
    SiteKind,
    digest_of,
    text_of,
)

FIRST = Site(3, 5, SiteKind.STATEMENT, function="kernel")
ARM = Site(7, 7, SiteKind.ARM, "no trip", 4, "kernel")
LANE = Site(9, 9, SiteKind.LANE, "off", 12, "kernel")


def file_with(hits, unmeasured="", text="text"):
    sites = {site: hits.get(site, Hits()) for site in (FIRST, ARM, LANE)}
    return FileCoverage("a/k.py", "triton", digest_of(text), sites, unmeasured)


def test_a_site_hit_by_either_is_hit():
    one = Coverage({"a/k.py": file_with({FIRST: Hits(2, {"interpreted"}, {"x"})})})
    other = Coverage(
        {"a/k.py": file_with({FIRST: Hits(1, {"compiled"}, {"y"}), LANE: Hits(1, {"compiled"})})}
    )
    one.merge(other)
    merged = one.files["a/k.py"]
    assert merged.sites[FIRST] == Hits(3, {"interpreted", "compiled"}, {"x", "y"})
    assert merged.missed(SiteKind.STATEMENT) == []
    assert merged.missed(SiteKind.ARM) == [ARM]
    assert merged.missed(SiteKind.LANE) == []


def test_merging_into_nothing_takes_everything_over_and_leaves_the_other_alone():
    other = Coverage({"a/k.py": file_with({FIRST: Hits(1, {"host"}, {"x"})})})
    one = Coverage()
    one.merge(other)
    assert one == other
    one.files["a/k.py"].sites[FIRST].add("compiled", "y")
    assert other.files["a/k.py"].sites[FIRST] == Hits(1, {"host"}, {"x"})


@pytest.mark.parametrize(("mine", "theirs", "merged"), [("a", "b", "a"), ("", "b", ""), ("a", "", "")])
def test_a_file_is_unmeasured_only_where_nobody_measured_it(mine, theirs, merged):
    one = Coverage({"a/k.py": file_with({}, mine)})
    one.merge(Coverage({"a/k.py": file_with({}, theirs)}))
    assert one.files["a/k.py"].unmeasured == merged


def test_coverage_of_two_texts_does_not_merge():
    one = Coverage({"a/k.py": file_with({}, text="before")})
    with pytest.raises(CoverageError, match=r"a/k\.py cannot be merged: it was measured on two texts"):
        one.merge(Coverage({"a/k.py": file_with({}, text="after")}))


def test_the_first_cases_are_kept_and_every_hit_is_counted():
    hits = Hits()
    for number in range(MAX_CASES + 5):
        hits.add("interpreted", f"case {number:02}")
    assert hits.count == MAX_CASES + 5
    assert sorted(hits.cases) == [f"case {number:02}" for number in range(MAX_CASES)]


def test_json_gives_back_what_was_written(tmp_path):
    coverage = Coverage(
        {
            "a/k.py": file_with({FIRST: Hits(2, {"interpreted", "process"}, {"ünï", 'a "b"'})}),
            "b.cu": FileCoverage("b.cu", "cuda", digest_of(""), {}, "never built"),
        }
    )
    coverage.write(tmp_path / "new" / "coverage.json")
    assert Coverage.read(tmp_path / "new" / "coverage.json") == coverage


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no coverage of schema 1, got None"),
        ('{"schema": 2, "files": {}}', "no coverage of schema 1, got 2"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 1, "files": []}', "is damaged"),
        ('{"schema": 1, "files": {"a": {"sites": [[1]]}}}', "is damaged"),
    ],
)
def test_what_is_no_coverage_is_refused_in_one_sentence(tmp_path, text, reason):
    file = tmp_path / "coverage.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CoverageError, match=reason):
        Coverage.read(file)


def test_a_case_that_is_not_in_the_list_is_damage(tmp_path):
    file = tmp_path / "coverage.json"
    Coverage({"a/k.py": file_with({FIRST: Hits(1, {"host"}, {"x"})})}).write(file)
    value = json.loads(file.read_text())
    value["files"]["a/k.py"]["cases"] = []
    file.write_text(json.dumps(value))
    with pytest.raises(CoverageError, match="is damaged"):
        Coverage.read(file)


def test_kernels_are_triton_and_cuda():
    kinds = {language: FileCoverage("x", language, "").is_kernel for language in ("python", "triton", "cuda")}
    assert kinds == {"python": False, "triton": True, "cuda": True}


def test_a_source_is_read_in_its_own_encoding_and_what_is_in_none_is_kept(tmp_path):
    latin, broken = tmp_path / "latin.py", tmp_path / "broken.cu"
    latin.write_bytes("# coding: latin-1\r\nname = 'ä'\r\n".encode("latin-1"))
    assert text_of(latin) == "# coding: latin-1\nname = 'ä'\n"
    broken.write_bytes(b"// \xff\n")
    assert digest_of(text_of(broken)) != digest_of("// \n")
