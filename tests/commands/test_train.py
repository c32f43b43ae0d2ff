# SPDX-License-Identifier: Apache-2.0
"""What `stvdm train` calls, and which configs it refuses."""

from stvdm import cli


def test_train_reads_config_variant_and_overrides(config_file, calls):
    words = ["train", "dit", f"--config={config_file}:dit", "--workdir=w"]
    assert cli.main([*words, "--config.model.width=128", "--config.model.patch=(1,4,4)", "--overfit"]) == 0
    ((name, (config, workdir), _),) = calls
    assert (name, workdir) == ("dit", "w")
    assert (config.model.width, tuple(config.model.patch), config.overfit) == (128, (1, 4, 4), True)
    assert config.optimizer.learning_rate == 1e-3
    assert config.is_locked


def test_train_joins_the_other_processes_before_anything_else(config_file, calls, monkeypatch):
    from stvdm.train import supervisor

    monkeypatch.setattr(supervisor, "join", lambda: calls.append("join"))
    assert cli.main(["train", "dit", f"--config={config_file}", "--workdir=w"]) == 0
    assert calls[0] == "join" and calls[1][0] == "dit"


def test_train_autoencoder_goes_to_its_trainer(config_file, calls):
    assert cli.main(["train", "autoencoder", f"--config={config_file}:autoencoder", "--workdir=w"]) == 0
    assert calls[0][0] == "autoencoder"


def test_a_config_of_the_other_kind_is_refused(config_file, calls, failure):
    error = failure("train", "autoencoder", f"--config={config_file}:dit", "--workdir=w")
    assert "this config is for 'dit': expected one for 'autoencoder'" in error and "stvdm train dit" in error
    assert not calls


def test_an_unknown_variant_is_refused_in_the_words_of_the_config(config_file, calls, failure):
    error = failure("train", "dit", f"--config={config_file}:huge", "--workdir=w")
    assert "variant='huge': expected dit or autoencoder" in error and "File" not in error


def test_a_missing_config_file_is_named(calls, failure):
    assert "there is no file configs/nope.py" in failure("train", "dit", "--config=configs/nope.py", "--workdir=w")


def test_a_config_that_cannot_run_says_so_without_a_traceback(config_file, stand_in, failure):
    def main(config, workdir):
        raise ValueError("this config cannot run:\n  - a\n  - b")

    stand_in("stvdm.train.dit", main=main)
    error = failure("train", "dit", f"--config={config_file}", "--workdir=w")
    assert error.startswith("stvdm: error: this config cannot run:\n  - a\n  - b\n")
