"""The command that repeats a result composes to the configuration that made it."""

import dataclasses
import json
import shlex

import pytest

from nemo_minitron.config.command_line import repeat
from nemo_minitron.config.compose import compose

AWKWARD = "a b,c=[d] 'e' \"f\" $g {h} #i ünd"


@pytest.mark.parametrize(
    ("command", "overrides", "shown"),
    [
        ("flow", [], "minitron flow model=tiny hardware=cpu"),
        ("flow", ["model=llama31_8b", "hardware=8x80gb", "model.restore_from_path=/t"],
         "minitron flow model=llama31_8b hardware=8x80gb model.restore_from_path=/t"),
        ("flow", ["data.words=9", "~prune.students.width", "prune.students.half.num_layers=2", "finetune.lr=3e-4",
                  f"output_dir={AWKWARD}"], None),
        ("finetune", ["model.restore_from_path=/t", "model.data.data_prefix=[0.3,/a,0.7,/b c]", "trainer.max_steps=3"],
         None),
        ("finetune", ["model.init=random", "model.architecture.num_layers=2", "model.architecture.vocab_size=null",
                      "model.data.data_prefix={train:[a],validation:[b]}"], None),
        ("prune", ["model.restore_from_path=/t", "export.save_path=/o", "prune.drop_layers=[1,16-31]"], None),
        ("distill", ["model.restore_from_path=/s", "model.kd_teacher_restore_from_path=/t", "model.data.data_prefix=/d",
                     "kd.temperature=2.5", "kd.lm_weight=1"], None),
        ("data", [f"output={AWKWARD}", "words=10"], None),
    ],
)  # fmt: skip
def test_a_command_is_repeated(command, overrides, shown):
    config = json.loads(json.dumps(dataclasses.asdict(compose(command, overrides))))
    again = repeat(command, config)
    assert again is not None and (shown is None or again == shown)
    program, subcommand, *words = shlex.split(again)
    assert (program, subcommand) == ("minitron", command)
    assert json.loads(json.dumps(dataclasses.asdict(compose(command, words)))) == config


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("evaluate-what", {"a": 1}),
        ("data", {"output": "/o", "of_another_version": 3}),
        ("data", {"output": "/o"}),
        ("data", {}),
        ("data", {"output": ["not", "text"], "words": {"a": 1}}),
        ("flow", {"</td><script>": {"=": ["'"]}}),
    ],
)
def test_what_cannot_be_repeated_has_no_command(command, config):
    assert repeat(command, config) is None
