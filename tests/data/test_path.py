from __future__ import annotations

from pathlib import Path

import pytest

from amlp_ray.data.path import DataPath, Entry, read_bytes
from amlp_ray.errors import DataError


def test_local_paths_become_absolute_and_uris_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(DataPath("a/b")) == str(tmp_path / "a" / "b")
    assert str(DataPath(f"file://{tmp_path}/a")) == str(tmp_path / "a")
    assert str(DataPath("s3://bucket/a/")) == "s3://bucket/a"
    assert (
        str(DataPath("s3://bucket/a?endpoint_override=x") / "b")
        == "s3://bucket/a/b?endpoint_override=x"
    )
    assert DataPath("s3://bucket/a").parent == DataPath("s3://bucket")
    assert DataPath(DataPath("a")) == DataPath("a")
    assert len({DataPath("a"), DataPath("./a")}) == 1


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_files_are_written_listed_read_and_deleted(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root = (
        DataPath(tmp_path / "set")
        if kind == "local"
        else DataPath(request.getfixturevalue("s3_bucket")) / "set"
    )
    odd = "x (1) [a] ü.txt"
    assert not root.is_folder()
    (root / "a" / odd).atomic_write("one")
    (root / "b.txt").atomic_write(b"two2")
    (root / ".hidden" / "c").atomic_write("")
    (root / "b.txt").atomic_write(b"three")
    assert root.is_folder()
    assert sorted(root.entries()) == [Entry(f"a/{odd}", 3), Entry("b.txt", 5)]
    assert sorted(root.entries(deep=False)) == [Entry("b.txt", 5)]
    assert [entry.name for entry in (root / ".hidden").entries()] == ["c"]
    assert root.folders() == ["a"]
    assert read_bytes(str(root / "b.txt")) == b"three"
    assert (root / "b.txt").is_file()
    with pytest.raises(OSError, match=r".+"):
        (root / "gone").read_bytes()
    (root / "b.txt").delete()
    (root / "gone").delete()
    assert not (root / "b.txt").is_file()
    root.delete()
    assert not root.is_folder()


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "x.png").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.png").touch()
    (tmp_path / "in" / "deep" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in" / "self")
    assert sorted(e.name for e in DataPath(tmp_path / "in").entries()) == [
        "deep/x.png",
        "self",
        "there/y.png",
    ]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = DataPath(tmp_path / "x")
    file.atomic_write("old")
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        file.atomic_write("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert file.read_bytes() == b"old"


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"zz://x cannot be opened .* s3://bucket/folder"):
        DataPath("zz://x/y").is_folder()
    with pytest.raises(
        DataError, match=r"^A URI must not hold a password; .* environment"
    ) as caught:
        DataPath("s3://key:secret@bucket/set")
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=f"There is no folder {tmp_path}/gone; check the path"):
        list(DataPath(tmp_path / "gone").entries())
