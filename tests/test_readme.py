from __future__ import annotations

import re
from pathlib import Path

from elman.cli import COMMANDS
from elman.config.schema import ExperimentConfig
from elman.config.tree import settings, settings_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_table_of_settings_is_the_schemas_own() -> None:
    table = README.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert table == settings_table(ExperimentConfig), "paste the output of `elman settings` between the markers"


def test_every_command_and_target_that_the_readme_names_exists() -> None:
    commands = set(re.findall(r"\belman ([a-z]+)\b", " ".join(re.findall(r"`([^`]*)`|^(elman .*)$", README)[0])))
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.DOTALL))
    commands |= set(re.findall(r"^(?:\.venv/bin/)?elman ([a-z]+)", blocks, re.MULTILINE))
    assert commands
    assert commands <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b(?!-)", blocks):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_flag_that_the_readme_names_is_a_setting() -> None:
    known = set(settings(ExperimentConfig))
    for flag in re.findall(r"--((?:corpus|model|data|optimizer|trainer|tracking)\.\w+)", README):
        assert flag in known, flag
