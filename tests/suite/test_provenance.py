"""The commit that is recorded with a result is the checkout's own, whatever lies around it or is set."""

import os
import subprocess

import pytest

from kn.suite.provenance import git_commit


def git(folder, *arguments):
    author = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "protocol.file.allow=always")
    command = ["git", *author, "-C", str(folder), *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=variables
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with kn/code.py and one commit."""
    folder = tmp_path / "a b" / "checkout"
    (folder / "kn").mkdir(parents=True)
    (folder / "kn" / "code.py").write_text("a = 1\n", encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder, git(folder, "rev-parse", "--short=12", "HEAD")


def test_a_repository_around_an_unpacked_archive_is_not_ours(checkout, tmp_path):
    folder, commit = checkout
    archive = folder / "kn-1.0"
    archive.mkdir()
    assert git_commit(archive) == "" and git_commit(folder) == commit
    (tmp_path / "link").symlink_to(archive)
    assert git_commit(tmp_path / "link") == ""
    (archive / ".git").mkdir()  # an empty one is no repository, and the one around is still not ours
    assert git_commit(archive) == ""


def test_links_and_worktrees_and_submodules_have_their_commit(checkout, tmp_path):
    folder, commit = checkout
    (tmp_path / "link").symlink_to(folder)
    assert git_commit(tmp_path / "link") == commit
    git(folder, "worktree", "add", "-q", str(tmp_path / "tree"))
    assert git_commit(tmp_path / "tree") == commit
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "submodule", "add", "-q", str(folder), "inner")
    assert git_commit(outer / "inner") == commit and git_commit(outer) == ""


def test_variables_of_another_repository_are_not_asked(checkout, tmp_path, monkeypatch):
    """As in a git hook, or where somebody keeps their settings in a bare repository."""
    folder, commit = checkout
    (tmp_path / "archive").mkdir()
    monkeypatch.setenv("GIT_DIR", str(folder / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "archive"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "no index"))
    assert git_commit(tmp_path / "archive") == "" and git_commit(folder) == commit


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give files to another user")
def test_another_user_s_checkout_has_its_commit(checkout):
    folder, commit = checkout
    for path in (folder, folder / ".git"):
        os.chown(path, 12345, 12345)
    assert subprocess.run(["git", "-C", folder, "log"], capture_output=True).returncode
    assert git_commit(folder) == commit


def test_changed_files_and_new_code_are_marked(checkout):
    folder, commit = checkout
    (folder / "notes.txt").write_text("", encoding="utf-8")
    (folder / "kn" / "data.csv").write_text("", encoding="utf-8")
    assert git_commit(folder) == commit
    (folder / "kn" / "new").mkdir()
    (folder / "kn" / "new" / "more.py").write_text("", encoding="utf-8")
    assert git_commit(folder) == f"{commit}+"
    (folder / "kn" / "code.py").write_text("a = 2\n", encoding="utf-8")
    assert git_commit(folder) == f"{commit}+"
    (folder / "kn" / "new" / "more.py").unlink()
    assert git_commit(folder) == f"{commit}+"


def test_no_git_and_no_commit_record_nothing(tmp_path, checkout, monkeypatch):
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(checkout[0]) == ""
