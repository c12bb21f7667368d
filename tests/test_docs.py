"""The Python and the commands that the pages show work as shown."""

import re
from pathlib import Path

import fedsim

ROOT = Path(__file__).parent.parent
CONFIG = {
    "data": {"dataset": "digits", "clients": 4, "split": {"name": "dirichlet", "alpha": 1.0}},
    "model": "linear",
    "train": {"rounds": 5, "batch_size": 32},
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_optimizer_the_strategy_and_the_regularisers_of_the_page_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer, strategy, regularizer, noisy = blocks("docs/custom.md", "python")
    Path("docs_optimizer.py").write_text(optimizer)
    Path("docs_strategy.py").write_text(strategy)
    Path("docs_regularizer.py").write_text(regularizer)
    Path("docs_noisy.py").write_text(noisy)
    for changes in (
        {"train.optimizer": {"name": "docs_optimizer:signsgd", "lr": 0.01}},
        {"strategy": {"name": "docs_strategy:fedavgm", "beta": 0.5}},
        {"model.regularizers": [{"name": "docs_regularizer:sparse_head", "strength": 0.002}]},
        {"model.regularizers": [{"name": "docs_noisy:noisy_hidden", "scale": 0.2}]},
    ):
        run = fedsim.run(CONFIG, changes)
        assert run.summary["accuracy"] > 0.5 > run.summary["initial"]["accuracy"]


def test_the_federation_with_batch_norm_of_its_clients_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("docs/design.md", "yaml")
    Path("own.yaml").write_text(config)
    assert fedsim.run("own.yaml").summary["accuracy"] > 0.5


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("README.md", "yaml")
    Path("federation.yaml").write_text(config)
    (script,) = blocks("README.md", "python")
    exec(compile(script, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[0]) > 0.2


def test_the_config_with_shorter_updates_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("docs/compression.md", "yaml")
    Path("short.yaml").write_text(config)
    run = fedsim.run("short.yaml", {"train.rounds": 1})
    assert run.rounds[-1].bytes_up < 0.1 * run.rounds[-1].bytes_down


def test_files_that_the_pages_name_are_there():
    pages = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
    for page in pages:
        named = re.findall(r"`((?:configs|docs|examples|fedsim|tests)/[\w./-]+\w)`", (ROOT / page).read_text())
        assert [name for name in named if not (ROOT / name).exists()] == []
