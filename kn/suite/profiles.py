"""The profiles mini, midi, paper and test, and `--set key=value` on top of them."""

import difflib
import re
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Any

from pydantic import ValidationError

from kn.suite.settings import Beyond, Glue, Model, Profile, Recipe, Text, Training

# Rows of train, dev and test. Chosen, as learning rates and epochs, on dev scores alone (LOG.md).
SIZES = {"cola": (1400, 700, 700), "rte": (1600, 700, 700), "mrpc": (1700, 700, 700),
         "sst2": (1600, 700, 700), "mnli": (2400, 480, 480), "qnli": (2200, 700, 700),
         "qqp": (2100, 700, 700)}
GLUE_SIZES = {  # GLUE's own, for estimates of cost
    "cola": (8551, 1043, 1063), "rte": (2490, 277, 3000), "mrpc": (3668, 408, 1725),
    "sst2": (67349, 872, 1821), "mnli": (392702, 9824, 9822), "qnli": (104743, 5463, 5463),
    "qqp": (363846, 40430, 390965),
}
TRAININGS = ("pretrain", "ablation", "finetune_lm", "finetune_glue")
GLUE_ALPHAS = (0.5, 0.5, 0.5, 0.02)  # Table 2
# Recipes of mini's committed models, chosen on validation perplexity alone; LOG.md lists the others tried.
TEACHER = Recipe(steps=9000, batch=16, muon_lr=0.005, adam_lr=0.004, weight_decay=0.05, warmup=100)
BASELINE = Recipe(steps=0, batch=16, muon_lr=0.004, adam_lr=0.002, weight_decay=0.05, warmup=50)

MINI = Profile(name="mini", note="documentation text, not the paper's data",
               pretrain=Training(batch_size=4, learning_rate=1e-3, epochs=1),
               ablation=Training(batch_size=4, learning_rate=1e-3, epochs=1, max_steps=300),
               finetune_lm=Training(batch_size=8, learning_rate=1e-3, epochs=0.5),
               finetune_glue=Training(batch_size=16, learning_rate=5e-4, epochs=2, alphas=GLUE_ALPHAS),
               glue=Glue(SIZES), teacher=TEACHER, baseline=BASELINE)
TEST = replace(
    MINI, name="test", note="a seconds-long run for the test suite: its numbers mean nothing",
    text=Text(
        web=("joblib", "filelock", "jinja2", "anyio"), wiki=("mpmath",), web_shares=(0.25, 0.25),
        wiki_shares=(0.25, 0.25), sample=0.5, limit=60, fingerprint="",
    ),
    **{name: replace(getattr(MINI, name), max_steps=2) for name in TRAININGS},
    beyond=Beyond(calibration=8), glue=Glue(dict.fromkeys(SIZES, (24, 16, 16))),
)
PAPER = Profile(
    name="paper", note="the paper's models and data",
    text=Text(web=(), wiki=(), web_shares=(0.00025, 0.00025), fingerprint=""),  # shares of OpenWebText
    model=Model(50257, context=1024, width=768, layers=12, heads=12, activation="gelu_new", dropout=0.1),
    pretrain=Training(batch_size=1, learning_rate=2.5e-4, epochs=1),  # Table 2
    ablation=Training(batch_size=1, learning_rate=2.5e-4, epochs=1),
    finetune_lm=Training(batch_size=8, learning_rate=5e-5, epochs=1),
    finetune_glue=Training(batch_size=16, learning_rate=2e-5, epochs=3, alphas=GLUE_ALPHAS),  # Table 2
    glue=Glue(GLUE_SIZES, max_length=128), teacher=TEACHER, baseline=BASELINE,
    device="auto", source="mirror", checks=(),
)
MIDI = Profile(  # its recipes are guesses from mini's: no GPU was at hand to choose them on
    name="midi", note="documentation text, not the paper's data; models trained within the run",
    text=Text(fingerprint=""),
    model=Model(vocabulary=8192, context=256, width=384, layers=8, heads=6, dropout=0.1),  # 17.4 M parameters
    pretrain=Training(batch_size=8, learning_rate=5e-4, epochs=1),
    ablation=Training(batch_size=8, learning_rate=5e-4, epochs=1),
    finetune_lm=Training(batch_size=16, learning_rate=5e-4, epochs=1),
    finetune_glue=Training(batch_size=16, learning_rate=2e-4, epochs=3, alphas=GLUE_ALPHAS),
    glue=Glue({task: (2 * train, dev, test) for task, (train, dev, test) in SIZES.items()}),
    teacher=Recipe(steps=4000, batch=32, muon_lr=0.005, adam_lr=0.003, weight_decay=0.05, warmup=100),
    baseline=Recipe(steps=1500, batch=32, muon_lr=0.004, adam_lr=0.002, weight_decay=0.05, warmup=50),
    device="auto", assets="",
)
PROFILES = {"mini": MINI, "midi": MIDI, "paper": PAPER, "test": TEST}
FIXED = ("name", "note", "sizes", "assets", "source", "device")  # fields that --set does not change


def load(name: str, overrides: tuple[str, ...] = ()) -> Profile:
    """The named profile with `key=value` overrides; ValueError with the allowed names, keys or values."""
    if not isinstance(name, str) or name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown: allowed are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    for override in overrides:
        if not isinstance(override, str) or not override.isprintable():  # notebooks read one override a line
            raise ValueError(f"--set {override!r}: one line of printable text is needed")
        key, equals, value = (part.strip() for part in override.partition("="))
        group = key.partition(".")[0]
        if not equals:
            form = "of the form key=value, for example --set pretrain.batch_size=8"
            raise ValueError(f"--set {override!r} is not {form}")
        if group in ("teacher", "baseline") and (profile.source == "mirror" or profile.assets):
            reason = f"the pretrained models of {name} are not trained within the run, only midi's are"
            raise ValueError(f"--set {key}: {reason}")
        if key not in (known := keys(profile)):
            near = difflib.get_close_matches(key, known, n=3)
            groups = dict.fromkeys(re.sub(r"\..*", ".…", name) for name in known)
            allowed = [name for name in known if name.startswith(group + ".")] or groups
            hint = f"did you mean {' or '.join(near)}?" if near else f"allowed are {', '.join(allowed)}"
            raise ValueError(f"--set key {key!r} is unknown: {hint} (all: kn/suite/settings.py)")
        profile = _override(profile, key, value)
    check_consistency(profile)
    return profile


def keys(settings: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all settings that `--set` can change."""
    values = {prefix + f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FIXED}
    return sum((keys(v, f"{name}.") if is_dataclass(v) else [name] for name, v in values.items()), [])


def check_consistency(profile: Profile) -> None:
    """Raise ValueError for settings that exclude each other, before hours are spent on the first stages."""
    for name in TRAININGS:
        training, settings = getattr(profile, name), f"{name}.epochs=0 and {name}.max_steps=0"
        if not training.max_steps and not training.epochs:
            raise ValueError(f"--set {settings} leave no step to train: set one of them")
    width, heads = profile.model.width, profile.model.heads
    if width % heads:
        raise ValueError(f"--set model.heads={heads} does not divide model.width={width}")
    for name in ("web", "wiki"):
        if (total := sum(getattr(profile.text, f"{name}_shares"))) >= 1:
            reason = f"the shares of valid and test add up to {total:g}, nothing is left to train on"
            raise ValueError(f"--set text.{name}_shares: {reason}")
        if profile.source == "documentation" and not getattr(profile.text, name):
            raise ValueError(f"--set text.{name}: at least one package is needed")


def _override(profile: Profile, key: str, text: str) -> Profile:
    """A profile with one setting parsed from text by its pydantic field."""
    group, _, name = key.rpartition(".")
    settings: Any = getattr(profile, group) if group else profile
    kind = typing.get_type_hints(type(settings))[name]
    is_tuple = typing.get_origin(kind) is tuple
    parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
    try:
        changed = replace(settings, **{name: parts if is_tuple else text})
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if kind is bool:
            reason = "true or false is needed"
        elif first["type"] == "literal_error":
            reason = f"allowed are {first['ctx']['expected'].replace(' or ', ', ')}".replace("'", "")
        elif first["type"] in ("missing", "too_long"):
            reason = f"{len(typing.get_args(kind))} values are needed, got {len(parts)}"
        raise ValueError(f"--set {key}={text}: {reason[0].lower()}{reason[1:]}") from None
    return replace(profile, **{group: changed}) if group else changed
