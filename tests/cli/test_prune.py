import json

import pytest


@pytest.fixture
def run(fedsim, folder):
    fedsim("run", "config.yaml")
    (made,) = (folder / "runs").iterdir()
    return made


def rows(out):
    return {
        line[:16].strip(): line[16:].split()
        for line in out.splitlines()
        if line.startswith(("accuracy", "para", "MACs", "non"))
    }


def test_a_run_is_pruned_and_the_numbers_before_and_after_are_shown(fedsim, run):
    shown = fedsim("prune", run, "--criterion", "l1-filter", "--sparsity", "0.5")
    assert (shown.code, shown.err) == (0, "")
    head, *_ = shown.out.splitlines()
    assert head.split() == ["before", "after", "l1-filter"]
    found = rows(shown.out)
    assert found["parameters"] == ["610", "310"] and found["MACs"] == ["592", "296"]  # 8 hidden units, and 4
    files = shown.out.splitlines()[-2:]
    assert [str(run / "pruned" / f"l1-filter-0.5.{end}") for end in ("safetensors", "json")] == files
    assert shown.new == {str(run / "pruned"), *files}
    facts = json.loads((run / "pruned" / "l1-filter-0.5.json").read_text())
    assert facts["before"]["numbers"]["parameters"] == 610 and facts["pruning"]["at"] == 2


def test_other_keys_of_the_method_follow_as_key_and_value(fedsim, run):
    masked = fedsim("prune", run, "--criterion", "magnitude", "scope=global", "output=false")
    assert masked.code == 0 and rows(masked.out)["parameters"] == ["610", "610"]
    facts = json.loads((run / "pruned" / "magnitude.json").read_text())
    assert facts["pruning"]["scope"] == "global" and facts["pruning"]["output"] is False


def test_finetuning_is_a_new_run_that_goes_on(fedsim, run, folder):
    shown = fedsim("prune", run, "--criterion", "l1-filter", "--sparsity", "0.5", "--finetune", "2")
    assert shown.code == 0 and rows(shown.out)["parameters"] == ["610", "310", "310"]
    (made,) = (path for path in (folder / "runs").iterdir() if path != run)
    assert f"run       runs/{made.name}" in shown.out and "rounds      4 of 4" in shown.out
    assert len((made / "rounds.jsonl").read_text().splitlines()) == 4
    assert not (run / "pruned").exists()
    summary = json.loads((made / "summary.json").read_text())
    assert shown.out.splitlines()[-9].split() == ["before", "after", "l1-filter", "in", "the", "end"]
    assert rows(shown.out)["accuracy"][-2:] == [f"{100 * summary['accuracy']:.2f}", "%"]
    assert fedsim("verify", made, "--rounds", "4").code == 0
    inspected = fedsim("inspect", made)
    assert "Linear  4 x 64" in inspected.out and "after round 4" in inspected.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "error: --criterion: needed"),
        (("--criterion", "l1"), "error: criterion: must be one of "),
        (("--criterion", "l1-filter", "--scratch", "x"), "error: --scratch: must be e or b, got x"),
        (
            ("--criterion", "l1-filter", "--scratch", "e", "--finetune", "2"),
            "error: finetune and scratch exclude each other",
        ),
        (("--criterion", "l1-filter", "--sparsity", "1"), "error: pruning.sparsity: "),
        (("--criterion", "l1-filter", "layers=[fc9]"), "error: pruning.layers: must be among fc1, got fc9"),
        (("--criterion", "network-slimming"), "error: pruning: needs batch norm"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(fedsim, run, arguments, says):
    shown = fedsim("prune", run, *arguments)
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1
    assert shown.new == frozenset() and "Traceback" not in shown.err


def test_help_shows_the_command_among_those_for_finished_runs(fedsim):
    shown = fedsim("--help").out
    order = [shown.index(f" {name} ") for name in ("run", "verify", "inspect", "prune", "server")]
    assert order == sorted(order)
