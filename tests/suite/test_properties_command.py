"""Any words after `python -m kn`: the command begins what it names, or ends with status 2 and one line."""

import contextlib
import io
import os
from types import SimpleNamespace

import pytest
from conftest import TIMED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kn import __main__ as command
from kn.suite import cost, launch, profiles, timing

USUAL = settings(
    derandomize=True, max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
COMMANDS = ("run", "plan", "doctor", "mirror", "export-corpus", "pretrain-mini", "compare")
VALUED = ("--profile", "--only", "--seeds", "--jobs", "--slurm", "--glue-scores", "--extra", "--set")
words = st.one_of(
    st.text(max_size=10),
    st.sampled_from([
        "", "1", "0", "-1", "4,5", "beyond", "claims", "²", "1e3", "9" * 5000, "8,", ",", "-", "--", "a\nb",
        "\x1b[31m", "\ud800", "../x", "/etc/passwd", "x" * 300, "<script>", "$(touch ran)", "None", "true",
    ]),
)
values = st.one_of(words, st.integers().map(str), st.floats().map(str))
settable = st.builds("{}={}".format, st.sampled_from(profiles.keys(profiles.MIDI)), values)
slurm = st.builds("{}={}".format, st.sampled_from(["minutes", "gpus", "partition"]), words)
options = st.lists(
    st.one_of(
        st.sampled_from([["--dry-run"], ["--fresh"], ["--wheels"], ["--all"], ["--nothing"], ["--help"]]),
        st.tuples(st.sampled_from(VALUED), words).map(list),
        st.tuples(st.just("--profile"), st.sampled_from(["test", "mini", "midi", "paper"])).map(list),
        st.tuples(st.just("--set"), settable).map(list),
        st.tuples(st.just("--slurm"), slurm).map(list),
    ),
    max_size=3,
).map(lambda parts: [word for part in parts for word in part])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What was begun, by name; the work itself is left out, so that each command takes milliseconds."""
    found, folder = [], tmp_path_factory.mktemp("command")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("KN_HOME", "KN_REPORTS"):
            patch.setenv(name, str(folder / name))
        for name in ("KN_SET", "KN_GLUE_SCORES", "KN_MIRROR"):
            patch.setenv(name, "")
        patch.setattr(timing, "measured_timing", lambda *_: TIMED)
        patch.setattr(cost, "check_disk_space", lambda *_: None)
        patch.setattr(launch, "run", lambda *_, **__: found.append("stages"))
        patch.setattr("kn.suite.doctor.examine", lambda *_: [("ok", "all is well")])
        runner = SimpleNamespace(update=None, finish=lambda *_: 0)  # executes no notebook
        patch.setattr("kn.report.notebooks.NotebookRunner", lambda *_: runner)
        patch.setattr("kn.data.documentation.build", lambda *_, **__: found.append("corpus") or {})
        patch.setattr("kn.data.mirror.make", lambda *_, **__: found.append("mirror"))
        patch.setattr("kn.data.mirror.wheels", lambda *_: None)
        script = {"rebuild": lambda *_: found.append("pretrained") or 0}
        patch.setattr("runpy.run_path", lambda _: script)
        patch.setattr("kn.report.compare.compare_reports", lambda *_: found.append("compared") or "")
        yield found


def ended(begun, arguments):
    """(exit status, lines of errors) of one command."""
    begun.clear()
    before, out, err = dict(os.environ), io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command.main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        os.environ.clear()
        os.environ.update(before)
    return status, [line for line in err.getvalue().splitlines() if "error: " in line], err.getvalue()


def judge(begun, arguments):
    status, errors, text = ended(begun, arguments)
    assert status in (0, 2) and "Traceback" not in text, (arguments, text)
    assert all(line.isprintable() for line in errors) and len(errors) == (status == 2), (arguments, text)
    assert status == 0 or not begun, (arguments, text)
    if status == 2:
        said = errors[0].partition("error: ")[2]
        assert 10 < len(said) < 600 + sum(map(len, arguments)), (arguments, said)
    return status


begins = st.one_of(
    st.just([]),
    st.sampled_from(COMMANDS).map(lambda command: [command]),
    st.tuples(st.sampled_from(COMMANDS), words).map(list),
    words.map(lambda word: [word]),
)


@USUAL
@given(first=begins, more=options)
def test_any_words(begun, first, more):
    judge(begun, [*first, *more])


@pytest.mark.parametrize("option", [*VALUED, "export-corpus", "mirror", "plan"])
def test_every_option_with_odd_words(begun, option):
    """One option at a time, so that no other one's error hides it."""
    found = []

    @settings(USUAL, max_examples=60)
    @given(word=words)
    def check(word):
        found.append(judge(begun, ["pretrain-mini"] * (option == "--extra") + [option, word]))

    check()
    assert 2 in found or option == "mirror"  # any name will do for a mirror that is to be made


@settings(USUAL, max_examples=300)
@given(name=st.sampled_from(["test", "mini", "midi"]), item=settable)
def test_any_value_of_any_setting(begun, name, item):
    judge(begun, ["plan", "--profile", name, "--set", item])


def test_good_words_begin_what_they_ask_for(begun):
    """So that not everything is refused."""
    for arguments, wanted in (
        (["--profile", "test", "--only", "4,beyond", "--seeds", "3", "--jobs", "2"], ["stages"]),
        (["--profile", "test", "--set", "pretrain.batch_size=8"], ["stages"]),
        (["plan", "--profile", "paper"], []),
        (["mirror", "somewhere", "--wheels"], ["mirror"]),
        (["export-corpus", "file.json", "--profile", "test"], ["corpus"]),
        (["pretrain-mini"], ["pretrained"]),
        (["compare", "reports/mini", "reports/other"], ["compared"]),
        (["doctor"], []),
    ):
        status, errors, text = ended(begun, arguments)
        assert (status, errors, begun) == (0, [], wanted), (arguments, text)
