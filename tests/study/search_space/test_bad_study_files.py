"""Bad study files: every fault is told at once, each with its line, exit code 2, and nothing is
written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from amlp_ray.cli import main
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.validate import build_study

Messages = list[tuple[int | None, str]]

# A file as it is written (line 1 is the first after the quotes), and what is told of it: lines
# and words.
FILES: dict[str, tuple[str, Messages]] = {
    "unknown key": (
        """\
        name: s
        zzz: {}
        """,
        [(2, "unknown setting 'zzz'; known here: name, description")],
    ),
    "misspelled key": (
        "name: s\nbudgets: {trials: 3}\n",
        [(2, "unknown setting 'budgets'; did you mean budget?")],
    ),
    "misspelled key in a group": (
        """\
        name: s
        budget:
          trails: 3
        """,
        [(3, "unknown setting 'budget.trails'; did you mean budget.trials?")],
    ),
    "no name": ("seed: 1\n", [(None, "name is missing.")]),
    "a name that is no folder": (
        "name: a b\n",
        [
            (
                1,
                "name: 'a b' is no name of a study; take letters, digits, `_`, `.` and `-`, "
                "beginning with a letter or digit.",
            )
        ],
    ),
    "value out of range": (
        """\
        name: s
        seed: 1
        budget: {trials: 0}
        baseline_seeds: 0
        """,
        [
            (3, "budget.trials is 0, but must be greater"),
            (4, "baseline_seeds is 0, but must be greater"),
        ],
    ),
    "wrong types": (
        """\
        name: s
        seed: one
        budget: 5
        baselines: scratch
        """,
        [
            (2, "seed is 'one', but must be a valid integer"),
            (3, "budget is 5, but must be a valid dictionary."),
            (4, "baselines is 'scratch', but must be a valid tuple"),
        ],
    ),
    "an item of a wrong type": (
        "name: s\nbaselines:\n- scratch\n- 5\n",
        [(4, "baselines.1 is 5, but must be a valid string or must be a valid dictionary.")],
    ),
    "a key twice": (
        """\
        name: s
        seed: 1
        space: {}
        seed: 2
        """,
        [(4, "seed is given twice, in lines 2 and 4; keep one.")],
    ),
    "a parameter twice, and more": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.5}
          ratio.end: {low: 0.1, high: 1.2}
          ratio.start: {low: 0.2, high: 0.4}
        """,
        [
            (4, "space: ratio.end is 1.2, but must be less than 1."),
            (5, "space.ratio.start is given twice, in lines 3 and 5"),
        ],
    ),
    "no YAML": ("name: s\nspace: {ratio.start: {low: 0.1\nseed: 1\n", [(3, "is not valid YAML: ")]),
    "a list": ("- name: s\n", [(None, "must hold keys and values, not list.")]),
    "nothing": ("", [(None, "must hold keys and values, not NoneType.")]),
    "code": ("name: !!python/object/apply:os.getcwd []\n", [(1, "is not valid YAML: ")]),
    "faults of pretrain": (
        """\
        name: s
        pretrain:
          epochs: 0
          ratio:
            strat: 0.3
        """,
        [
            (3, "pretrain: epochs is 0, but must be greater"),
            (5, "pretrain: unknown setting 'ratio.strat'; did you mean ratio.start?"),
        ],
    ),
    "a dotted name where settings are nested": (
        "name: s\npretrain:\n  ratio.start: 0.3\n",
        [(3, "pretrain: ratio.start is written nested, as ratio: {start: ...}.")],
    ),
    "settings that contradict each other": (
        "name: s\npretrain:\n  epochs: 3\n  ratio: {shape: points}\n",
        [(4, "pretrain: ratio: shape points needs at least two points")],
    ),
    "an option of another pruner": (
        "name: s\npruner:\n  name: median\n  percentile: 30\n",
        [(4, "pruner: percentile is a setting of percentile and does nothing for median.")],
    ),
    "unknown sampler and pruner": (
        "name: s\nsampler: {name: bayes}\npruner: {name: asha}\n",
        [
            (2, "sampler.name is 'bayes', but must be 'tpe', "),
            (3, "pruner.name is 'asha', but must be 'median'"),
        ],
    ),
    "an unknown objective": (
        "name: s\nobjectives:\n  dice: maximize\n",
        [(3, "objectives.dice is 'dice', but must be 'dsc'")],
    ),
    "a direction the wrong way": (
        "name: s\nobjectives:\n  dsc: minimize\n",
        [(2, "objectives: dsc is to be maximized.")],
    ),
    "several objectives and no metric": (
        "name: s\nobjectives: {dsc: maximize, seconds: minimize}\n",
        [(None, "pruner.metric must say which of dsc, seconds is compared at rungs")],
    ),
    "an unknown baseline": (
        "name: s\nbaselines: [scratch, mea]\n",
        [(2, "baselines: there is no baseline 'mea'; the nearest is mae")],
    ),
    "settings of a baseline": (
        "name: s\nbaselines:\n- mine: {ratio: {start: 2}}\n",
        [(2, "baseline mine: ratio.start is 2, but must be less than 1.")],
    ),
    "a password in the URL": (
        "name: s\nstorage: postgresql://me:secret@host/db\n",
        [(2, "storage: a password stands in the URL; write ${NAME} there")],
    ),
    "misspelled parameter": (
        "name: s\nspace:\n  ratio.strat: {low: 0.1, high: 0.5}\n",
        [(3, "space: unknown setting 'ratio.strat'; did you mean ratio.start?")],
    ),
    "parameter of a study and not of a trial": (
        "name: s\nspace:\n  budget.trials: {low: 1, high: 5}\n",
        [(3, "space: unknown setting 'budget.trials'")],
    ),
    "a group for a parameter": (
        "name: s\nspace:\n  ratio: {low: 0.1, high: 0.5}\n",
        [
            (
                3,
                "space: ratio is a group; give one of its settings with its dotted name, "
                "such as ratio.start.",
            )
        ],
    ),
    "nested parameters": (
        "name: s\nspace:\n  ratio:\n    start: {low: 0.1, high: 0.5}\n",
        [
            (3, "space.ratio.low is missing."),
            (3, "space.ratio.high is missing."),
            (4, "unknown setting 'space.ratio.start'"),
        ],
    ),
    "seed": ("name: s\nspace:\n  seed: {low: 0, high: 9}\n", [(3, "space: seed is not searched")]),
    "ends outside": (
        """\
        name: s
        space:
          ratio.end:
            low: 0
            high: 1.2
        """,
        [
            (4, "ratio.end is 0.0, but must be greater than 0"),
            (5, "ratio.end is 1.2, but must be less than 1"),
        ],
    ),
    "range upside down": (
        "name: s\nspace:\n  ratio.end: {low: 0.9, high: 0.2}\n",
        [(3, "space.ratio.end: low 0.9 must lie below high 0.2.")],
    ),
    "range without an end": (
        "name: s\nspace:\n  ratio.end: {low: 0.9, hihg: 0.95}\n",
        [
            (3, "space.ratio.end.high is missing."),
            (3, "unknown setting 'space.ratio.end.hihg'; did you mean space.ratio.end.high?"),
        ],
    ),
    "text for a number": (
        "name: s\nspace:\n  lr: {low: small, high: 0.1}\n",
        [(3, "space.lr.low is 'small', but must be a valid number")],
    ),
    "logarithm of zero": (
        "name: s\nspace:\n  loss.gamma: {low: 0, high: 2, log: true}\n",
        [(3, "space.loss.gamma: log needs low > 0 and no step.")],
    ),
    "steps that miss the end": (
        "name: s\nspace:\n  ratio.end: {low: 0.1, high: 0.5, step: 0.15}\n",
        [(3, "ratio.end: steps of 0.15 from 0.1 do not end at 0.5")],
    ),
    "half steps of whole numbers": (
        "name: s\nspace:\n  selection.clusters: {low: 2, high: 6.5, step: 0.5}\n",
        [(3, "selection.clusters is an integer; give high, step without a fraction.")],
    ),
    "a range of words and one of switches": (
        "name: s\nspace:\n  selection.rule: {low: 0, high: 1}\n  flip: {low: 0, high: 1}\n",
        [
            (3, "selection.rule takes words; give choices"),
            (4, "flip takes true or false; give choices"),
        ],
    ),
    "default outside, and off the steps": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.5, default: 0.6}
          ratio.end: {low: 0.1, high: 0.5, step: 0.1, default: 0.25}
          flip: {choices: [true, false], default: maybe}
        """,
        [
            (3, "space.ratio.start: default 0.6 lies outside 0.1 to 0.5."),
            (4, "ratio.end: default 0.25 is no step of 0.1 from 0.1."),
            (5, "space.flip: default 'maybe' is none of the choices"),
        ],
    ),
    "no default for one": (
        "name: s\nspace:\n  ratio.start: {low: 0.1, high: 0.5, default: 0.2}\n  loss.gamma: {low: "
        "2, high: 3}\n",
        [(4, "space: loss.gamma has no default, and the study's own 1.0 lies outside")],
    ),
    "no choices, and one twice": (
        "name: s\nspace:\n  flip: {choices: []}\n  lr: {choices: [0.1, 0.1]}\n",
        [
            (3, "space.flip.choices is [], but must have at least 1 item"),
            (4, "space.lr: each choice is named once"),
        ],
    ),
    "choices that a setting refuses": (
        """\
        name: s
        space:
          selection.rule:
            choices:
            - smallest
            - reddest
          selection.clusters: {choices: [1, 3]}
          flip: {choices: ["yes", "no"]}
          lr: {choices: [true, 0.1]}
        """,
        [
            (6, "selection.rule is 'reddest', but must be 'smallest'"),
            (7, "selection.clusters is 1, but must be greater"),
            (8, "flip is 'yes', but must be true or false."),
            (8, "flip is 'no', but must be true or false."),
            (9, "lr is True, but must be a number."),
        ],
    ),
    "a list for choices": (
        "name: s\nspace:\n  ratio.shape: [linear, power]\n",
        [(3, "space.ratio.shape is ['linear', 'power'], but must be a valid dictionary.")],
    ),
    "fixed values that a setting refuses": (
        "name: s\nspace:\n  ratio.shape: square\n  epochs: {value: 2.5}\n",
        [
            (3, "ratio.shape is 'square', but must be 'linear'"),
            (4, "epochs is 2.5, but must be a valid integer"),
        ],
    ),
    "conditions on nothing": (
        """\
        name: s
        space:
          ratio.power: {low: 1, high: 2, when: {ratio.form: power}}
          loss.gamma: {low: 1, high: 2, when: {}}
          lr: {low: 0.1, high: 0.2, when: {ratio.shape: []}}
          ema: {low: 0.1, high: 0.2, when: power}
        """,
        [
            (3, "ratio.power depends on 'ratio.form', which is no setting"),
            (4, "loss.gamma has an empty condition"),
            (5, "lr depends on ratio.shape, but no value of it is named."),
            (6, "space.ema.when is 'power', but must be a valid dictionary."),
        ],
    ),
    "conditions never met": (
        """\
        name: s
        space:
          ratio.shape: {choices: [linear, cosine]}
          ratio.power: {low: 1, high: 2, when: {ratio.shape: power}}
          ratio.levels: {low: 2, high: 5, when: {ratio.shape: stairs}}
          ratio.start: {low: 0.1, high: 0.5}
          ratio.end: {low: 0.1, high: 0.5, when: {ratio.start: 0.3}}
          selection.strength: {low: 1, high: 2, when: {selection.mode: soft}}
          lr: {low: 0.001, high: 0.1, when: {flip: 1}}
        """,
        [
            (
                4,
                "ratio.power is never searched, since ratio.shape is never 'power' "
                "(it can be ['linear', 'cosine']).",
            ),
            (5, "ratio.levels is never searched when ratio.shape is 'stairs', but must be"),
            (
                7,
                "ratio.end is never searched, since ratio.start is never 0.3 "
                "(it is drawn from 0.1 to 0.5).",
            ),
            (
                8,
                "selection.strength is never searched, since selection.mode is never 'soft' "
                "(it is 'hard' in",
            ),
            (9, "lr is never searched when flip is 1, but must be true or false."),
        ],
    ),
    "conditions that rule each other out": (
        """\
        name: s
        space:
          selection.mode: {choices: [hard, soft]}
          selection.hard_by: {choices: [cluster, score], when: {selection.mode: hard}}
          selection.strength: {low: 1, high: 2, when: {selection.mode: soft, helper: 1}}
          helper: {choices: [1, 2], when: {selection.mode: hard}}
        """,
        [(5, "selection.strength is never searched, since its conditions rule each other out.")],
    ),
    "a circle": (
        """\
        name: s
        space:
          ratio.shape: {choices: [linear, power], when: {selection.mode: hard}}
          selection.mode: {choices: [hard, soft], when: {ratio.shape: power}}
          ratio.start: {expression: "ratio.start + 0.1"}
        """,
        [(3, "ratio.shape, selection.mode, ratio.start depend on each other in a circle")],
    ),
    "expressions that cannot be read": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.5}
          ratio.end: {expression: "ratio.start +"}
          ratio.power: {expression: "open('x')"}
          loss.gamma: {expression: "ratio.strat + 1"}
          lr: {expression: ""}
        """,
        [
            (4, "ratio.end: 'ratio.start +' cannot be read"),
            (5, "ratio.power: open() is none of min, max, round and abs"),
            (6, "loss.gamma: 'ratio.strat + 1' names 'ratio.strat', which is no setting or helper"),
            (7, "space.lr.expression is '', but must have at least 1 character."),
        ],
    ),
    "an expression of another type": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.5}
          selection.clusters: {expression: "2 + ratio.start"}
          lr: {expression: "ratio.shape * 2"}
        """,
        [
            (4, "selection.clusters: the expression gives 2.3"),
            (5, "lr: 'ratio.shape * 2' cannot be computed"),
        ],
    ),
    "an unused helper": (
        "name: s\nspace:\n  delta: {low: 0.1, high: 0.5}\n",
        [(3, "space: unknown setting 'delta'")],
    ),
    "a helper that is not always there": (
        """\
        name: s
        space:
          ratio.shape: {choices: [linear, power]}
          delta: {low: 0.1, high: 0.2, when: {ratio.shape: linear}}
          ratio.end: {expression: "0.5 + delta"}
        """,
        [
            (
                5,
                "ratio.end: delta is not asked for in trials that need it; give both the "
                "same `when`.",
            )
        ],
    ),
    "requirements that cannot be": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.4}
          ratio.end: {low: 0.5, high: 0.6}
        require:
        - ratio.start <=
        - ratio.start + ratio.end
        - ratio.begin < ratio.end
        - loss.gamma > 0
        """,
        [
            (6, "require: 'ratio.start <=' cannot be read"),
            (7, "require: 'ratio.start + ratio.end' is no condition"),
            (8, "require: 'ratio.begin < ratio.end' names 'ratio.begin', which is no setting"),
            (9, "require: 'loss.gamma > 0' names nothing that the space sets"),
        ],
    ),
    "a requirement that refuses everything": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.4}
          ratio.end: {low: 0.5, high: 0.6}
        require: ["ratio.start >= ratio.end"]
        """,
        [(5, "require 'ratio.start >= ratio.end' does not hold in 100 of 100 random draws")],
    ),
    "a requirement that is no list": (
        "name: s\nrequire: ratio.start < ratio.end\n",
        [(2, "require is 'ratio.start < ratio.end', but must be a valid tuple.")],
    ),
    "defaults that a requirement refuses": (
        """\
        name: s
        space:
          ratio.start: {low: 0.1, high: 0.8, default: 0.7}
          ratio.end: {low: 0.1, high: 0.8, default: 0.3}
        require: ["ratio.start <= ratio.end"]
        """,
        [(2, "the defaults are refused: require 'ratio.start <= ratio.end' does not hold.")],
    ),
    "combinations that are refused": (
        """\
        name: s
        space:
          model.width: {low: 24, high: 48, step: 4}
          model.heads: {choices: [2, 3]}
        """,
        [(3, "some combinations are refused (model: width ")],
    ),
    "derived values that are refused": (
        """\
        name: s
        space:
          ratio.start: {low: 0.3, high: 0.6}
          delta: {low: 0.1, high: 0.6}
          ratio.end: {expression: "ratio.start + delta"}
        """,
        [(5, "some combinations are refused (ratio.end is 1.")],
    ),
    "an encoder that does not exist": (
        "name: s\nspace:\n  model.encoder: {choices: [vit_small_patch16_224, vit_smal]}\n",
        [(3, "encoder 'vit_smal' is no ViT that timm knows")],
    ),
    "no function": ("name: s\nspace: my space\n", [(2, "space: 'my space' is no module:function")]),
    "a module that does not exist": (
        "name: s\nspace: no_such_module:space\n",
        [(2, "space: no_such_module:space is Python code, which is not run unasked")],
    ),
    "a number for a space": (
        "name: s\nspace: 5\n",
        [(2, "space is 5, but must be a valid dictionary or must be a valid string.")],
    ),
    "faults everywhere": (
        """\
        name: s
        sed: 1
        pretrain: {epochs: 0}
        space:
          ratio.strat: {low: 0.1, high: 0.5}
          ratio.end: {low: 0.9, high: 0.2}
          lr: {choices: [0.1, fast]}
        pruner: {name: median, percentile: 20}
        """,
        [
            (2, "unknown setting 'sed'; did you mean seed?"),
            (3, "pretrain: epochs is 0"),
            (5, "space: unknown setting 'ratio.strat'"),
            (6, "space.ratio.end: low 0.9 must lie below"),
            (7, "space: lr is 'fast', but must be a number."),
            (8, "pruner: percentile is a setting of percentile"),
        ],
    ),
}


def written(folder: Path, name: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(dedent(FILES[name][0]))
    return file


def expect(lines: list[str], file: Path, messages: Messages, start: str = "") -> None:
    assert len(lines) == len(messages), "\n".join(lines)
    for line, (number, words) in zip(lines, messages, strict=True):
        assert line.startswith(f"{start}{file}" + (f":{number}" if number else "")), line
        assert words in line
        assert "\n" not in line
        assert line.endswith((".", "?"))


@pytest.mark.parametrize("name", FILES)
def test_every_fault_of_a_file_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name)
    with pytest.raises(ConfigError) as caught:
        build_study(read_yaml(file), str(file))
    expect(list(caught.value.messages), file, FILES[name][1])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_prints_a_line_per_fault_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "study", "plan", str(file), "--data", "patches"])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    assert end.value.code == 2
    assert out.out == ""
    expect(out.err.splitlines(), file, FILES[name][1], "amlp-ray: ")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["faults everywhere", "no YAML"])
def test_the_installed_command_leaves_with_2(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name)
    command = [Path(sys.executable).parent / "amlp-ray", "study", "plan", file, "--data", "patches"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    expect(done.stderr.splitlines(), file, FILES[name][1], "amlp-ray: ")
    assert list(tmp_path.iterdir()) == [file]
