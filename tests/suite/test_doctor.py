"""What would stop a run is found, each with the command that mends it."""

from collections import namedtuple

import pytest

from kn.suite import devices, doctor


def test_a_sound_machine_has_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KN_HOME", str(tmp_path / "store"))
    monkeypatch.delenv("KN_MIRROR", raising=False)
    assert doctor.main() == 0 and not (tmp_path / "store").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 9 and all(line.startswith(("ok ", "warning ")) for line in lines)


def test_the_paper_profile_wants_a_mirror(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KN_HOME", str(tmp_path / "store"))
    monkeypatch.delenv("KN_MIRROR", raising=False)
    assert doctor.main("paper") == 1
    assert (
        "is no mirror (mirror.json is missing): make one with `python -m kn mirror" in capsys.readouterr().out
    )


def test_missing_and_other_packages(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("torch==2.13.0\nno-such-package==1.0\n")
    kind, text = doctor.check_pins(path)
    assert (
        kind == "error"
        and "1 pinned packages are missing (no-such-package)" in text
        and "pip install -r requirements.txt" in text
    )
    path.write_text('no-such-package==1.0; sys_platform == "plan9"\n')
    assert doctor.check_pins(path)[0] == "ok"  # a marker says where a pin holds
    path.write_text('no-such-package==1.0; python_version >= "3.11"\n')
    assert (
        doctor.check_pins(path) == ("error", doctor.check_pins(path)[1])
        and "(no-such-package)" in doctor.check_pins(path)[1]
    )
    path.write_text("pytest==0.1\n")
    kind, text = doctor.check_pins(path)
    assert kind == "warning" and "1 packages differ from the pins" in text and "(pinned 0.1)" in text


def test_too_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10**8))
    kind, text = doctor.check_disk("mini", tmp_path / "not" / "there")
    assert kind == "error" and "0.1 GB free" in text and "KN_HOME" in text


@pytest.mark.parametrize(("what", "message"), [("delete", "is missing"), ("damage", "is damaged")])
def test_assets_and_mirror(tmp_path, monkeypatch, what, message):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mirror").mkdir()
    for name in ("teacher", "baseline", "tokenizer"):
        (tmp_path / "mini" / name).mkdir()
        if what == "damage":
            (tmp_path / "mini" / name / "config.json").write_text("{}")
    if what == "damage":
        (tmp_path / "mini" / "SHA256SUMS").write_text("")
        (tmp_path / "mirror" / "mirror.json").write_text("[")
    monkeypatch.setattr(doctor, "ASSETS", tmp_path)
    findings = [doctor.check_asset(name) for name in ("teacher", "baseline", "tokenizer")]
    findings += doctor.check_mirror(tmp_path / "mirror")
    assert len(findings) == 4 and all(kind == "error" and message in text for kind, text in findings)
    assert "git checkout" in findings[0][1] and "python -m kn mirror" in findings[-1][1]
