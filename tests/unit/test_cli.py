"""The command line: every published flag is understood, nothing is dropped in silence, --help is quick."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import main_linear
import main_pretrain
from utils import cli
from utils.cli import published
from utils.cli.published import our_spelling
from utils.config.flags import FLAGS, OF_PRETRAINING

ROOT = Path(__file__).parents[2]
PROBE = {"--batch-size": "LINEAR.BATCH_SIZE", "--epochs": "LINEAR.EPOCHS"}


def parsed(*argv: str, renamed: dict[str, str] | None = None) -> tuple[Any, dict[str, Any]]:
    return cli.parse(cli.make_parser("test", renamed), argv)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [  # the flags of moby_main.py and synco-v2's main_pretrain.py, then ours
        (["--batch-size", "64"], "TRAIN.BATCH_SIZE", 64),
        (["--data-path", "/data"], "DATA.PATH", "/data"),
        (["--zip"], "DATA.DATASET", "zip"),
        (["--cache-mode", "full"], "DATA.CACHE_MODE", "full"),
        (["--resume", "x.pt"], "RESUME", "x.pt"),
        (["--accumulation-steps", "8"], "TRAIN.ACCUMULATION_STEPS", 8),
        (["--use-checkpoint"], "TRAIN.USE_CHECKPOINT", True),
        (["--amp-opt-level", "O0"], "TRAIN.PRECISION", "fp32"),
        (["--output", "out"], "OUTPUT", "out"),
        (["--tag", "42"], "TAG", "42"),
        (["--dataset", "cifar10"], "DATA.DATASET", "cifar10"),
        (["--epochs", "3"], "TRAIN.EPOCHS", 3),
        (["--seed", "7"], "SEED", 7),
        (["--precision", "fp16"], "TRAIN.PRECISION", "fp16"),
        (["--device", "cpu"], "DEVICE", "cpu"),
        (["--download"], "DATA.DOWNLOAD", True),
        (["--lr", "0.03"], "OPTIM.BASE_LR", 0.03),
        (["--weight-decay", "0"], "OPTIM.WEIGHT_DECAY", 0.0),
        (["--workers", "4"], "DATA.NUM_WORKERS", 4),
        (["--backbone", "resnet18"], "MODEL.BACKBONE.NAME", "resnet18"),
        (["--img-size", "96"], "DATA.IMG_SIZE", 96),
        (["--batch-size=64"], "TRAIN.BATCH_SIZE", 64),
    ],
)
def test_a_flag_reaches_its_key_and_no_other(argv: list[str], key: str, value: object) -> None:
    assert parsed(*argv)[1] == {key: value}


def test_every_flag_names_a_key_of_the_tree() -> None:
    from models import framework_options
    from utils.config.load import leaves
    from utils.config.schema import declare

    known = {key for key, _ in leaves(declare(framework_options()).defaults())}
    named = {flag.key for flag in FLAGS.values()}
    assert named | set(PROBE.values()) <= known


def test_flags_that_are_not_given_leave_the_configuration_alone() -> None:
    args, flags = parsed("--cfg", "c.yaml")
    assert flags == {}
    assert (args.cfg, args.opts, args.eval, args.throughput) == ("c.yaml", [], False, False)


def test_the_published_commands_parse_as_they_stand() -> None:
    args, flags = parsed(
        *(
            "--cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T --local_rank 0"
        ).split(),
        *(
            "--batch-size 64 --zip --cache-mode part --amp-opt-level O0 --accumulation-steps 1"
        ).split(),
        *(
            "--resume r.pth --use-checkpoint --eval --throughput --opts TRAIN.EPOCHS 3 SEED 1"
        ).split(),
    )
    assert args.opts == ["TRAIN.EPOCHS", "3", "SEED", "1"]
    assert args.eval
    assert args.throughput
    assert len(flags) == 10


def test_a_flag_that_does_nothing_is_understood_but_not_in_the_help() -> None:
    assert cli.parse(main_linear._parser(), ["--use-checkpoint"])[1] == {
        "TRAIN.USE_CHECKPOINT": True
    }
    assert "--use-checkpoint" not in main_linear._parser().format_help()
    assert "--use-checkpoint" in main_pretrain._parser().format_help()


def test_opts_may_be_given_twice() -> None:
    assert parsed("--opts", "SEED", "1", "--tag", "t", "--opts", "TAG", "x")[0].opts == [
        "SEED",
        "1",
        "TAG",
        "x",
    ]
    assert parsed()[0].opts == []


def test_a_probe_renames_what_means_its_own_thing() -> None:
    assert parsed("--batch-size", "64", "--epochs", "2", "--tag", "t", renamed=PROBE)[1] == {
        "LINEAR.BATCH_SIZE": 64,
        "LINEAR.EPOCHS": 2,
        "TAG": "t",
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--gradient-accumulation-steps", "8"],
            ["--gradient-accumulation-steps", "--accumulation-steps"],
        ),
        (["--batchsize", "8"], ["'--batchsize'", "--batch-size"]),
        (["--data", "x"], ["'--data x'; here it is --data-path x"]),
        (["--outputs=x"], ["--output"]),
        (["-x"], ["'-x'"]),
        (["stray"], ["'stray'"]),
        (["--epoch", "3"], ["did you mean --epochs?"]),
        (["-a", "resnet18"], ["here it is --backbone resnet18"]),
        (["--moco-t=0.07"], ["here it is --opts MODEL.METHOD.TEMPERATURE 0.07"]),
        (["--gpu", "3"], ["'--gpu 3': put CUDA_VISIBLE_DEVICES=3 in front"]),
        (["/data/imagenet"], ["here it is --data-path /data/imagenet"]),
        (["--batch-size", "many"], ["--batch-size", "'many'"]),
        (["--amp-opt-level", "O3"], ["--amp-opt-level", "O3"]),
        (["--tag"], ["--tag"]),
    ],
)
def test_what_is_not_understood_is_refused(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for word in [*words, "--help"]:
        assert word in message


@pytest.mark.parametrize("flag", ["--zzz", "--lrr=3", "--hel-me-with-it", "--local-ran"])
def test_nothing_is_suggested_that_is_not_near(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(cli.make_parser("test", flags=["--tag"]), [flag])
    assert "did you mean" not in capsys.readouterr().err


MOCO = """-a resnet50 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos --schedule 120 160
    --dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 D/imagenet"""


def test_each_flag_of_a_published_command_gets_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*MOCO.split())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert all("here it is --" in line or "torchrun" in line for line in lines[:-1])
    assert "SCHEDULE.MILESTONES '[120,160]'" in lines[5]
    assert lines[-2].endswith("--data-path D/imagenet")


def test_a_published_flag_is_answered_with_a_flag_and_a_key_that_exist() -> None:
    from models import framework_options
    from utils.config.schema import declare

    known = declare(framework_options())
    options = {key.rpartition(".")[2] for key in known if key.count(".") == 2}
    flags = {*FLAGS, "--opts", "--eval", "--pretrained"}
    for table in (published._VALUED, published._SWITCHES):
        for name in table:
            ours = dict(our_spelling([name]))[name]
            assert ours.startswith("(") or ours.split()[0] in flags, name
            for word in ours.replace(",", " ").split():
                if word.startswith("MODEL.METHOD."):
                    assert word.removeprefix("MODEL.METHOD.") in options, name
                elif word.count(".") and word[0].isupper():
                    assert word in known, name


def test_a_probe_is_told_the_keys_of_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--cos", "--schedule", "60", "80", renamed=PROBE)
    assert "LINEAR.SCHEDULE.NAME milestones LINEAR.SCHEDULE" in capsys.readouterr().err


def test_without_a_word_the_answer_is_the_help_and_no_run_starts(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(ROOT / "main_pretrain.py")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "--data-path" in ran.stdout) == (2, True), ran.stderr
    assert not list(tmp_path.iterdir())


def test_the_version_names_commit_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as stop:
        parsed("--version")
    assert stop.value.code == 0
    assert f"torch {version('torch')}" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_a_local_rank_becomes_the_environment_variable(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "to be removed")
    del os.environ["LOCAL_RANK"]
    assert parsed(f"{flag}=3")[1] == {}
    assert os.environ["LOCAL_RANK"] == "3"
    parsed(flag, "5")  # the environment is the launcher's word and wins
    assert os.environ["LOCAL_RANK"] == "3"


def test_no_local_rank_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    parsed()
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("gpu", "bf16", "expected"),
    [(False, False, "bf16"), (True, True, "bf16"), (True, False, "fp16")],
)
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_mixed_precision_is_bf16_unless_the_gpu_lacks_it(
    level: str, gpu: bool, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert parsed("--amp-opt-level", level)[1] == {"TRAIN.PRECISION": expected}


def test_precision_wins_over_its_published_spelling() -> None:
    for argv in (
        ["--precision", "fp32", "--amp-opt-level", "O1"],
        ["--amp-opt-level", "O1", "--precision", "fp32"],
    ):
        assert parsed(*argv)[1] == {"TRAIN.PRECISION": "fp32"}


@pytest.mark.parametrize("main", ["main_pretrain.py", "main_linear.py"])
def test_help_and_a_mistyped_flag_answer_without_torch(main: str) -> None:
    script = (
        f"import runpy, sys\nsys.argv = [{main!r}, sys.argv[1]]\n"
        f"try:\n    runpy.run_path({main!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'numpy', 'timm', 'torchvision'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else stop.code)\n"
    )
    for flag, code, text in (
        ("--help", 0, "--data-path"),
        ("--hepl", 2, "did you mean --help"),
        ("--version", 0, "torch "),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", script, flag],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, text in ran.stdout + ran.stderr) == (code, True), ran.stderr


NO_TORCH = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise {error}

sys.meta_path.insert(0, Refuse())
sys.argv = ["main_pretrain.py", *sys.argv[1:]]
runpy.run_path("main_pretrain.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("error", "flags", "code", "text"),
    [
        ("ImportError('no torch here')", ["--help"], 0, "--data-path"),
        ("ImportError('no torch here')", ["--dataset", "digits"], 2, "error: no torch here\n"),
        ("KeyboardInterrupt", ["--dataset", "digits"], 130, "error: stopped by Ctrl-C\n"),
    ],
)
def test_help_needs_no_torch_and_an_import_that_fails_is_one_line(
    error: str, flags: list[str], code: int, text: str
) -> None:
    command = [sys.executable, "-c", NO_TORCH.format(error=error), *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == code, ran.stderr
    assert text in ran.stdout if code == 0 else ran.stderr == text


@pytest.mark.parametrize("main", ["main_pretrain.py", "main_linear.py", "main_semisup.py"])
def test_help_fits_a_screen_and_has_no_keys_for_values(main: str) -> None:
    command = [sys.executable, main, "--help"]
    env = {**os.environ, "COLUMNS": "80"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert len(ran.stdout.splitlines()) <= 60, ran.stdout
    assert not re.search(r"--[a-z-]+ [A-Z]+\.[A-Z]", ran.stdout)


def test_help_names_every_flag_with_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help", renamed=PROBE)
    text = capsys.readouterr().out
    for name, flag in FLAGS.items():
        assert (f"{name} " in text) == (name not in OF_PRETRAINING), name
        assert PROBE.get(name, flag.key) in text or name in OF_PRETRAINING
    assert "--local" not in text


# ---- how a main ends -----------------------------------------------------------------------------


class NonFiniteError(RuntimeError):
    """Stands for engine.guards.NonFiniteError, which cli knows by name, so as not to import torch."""


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("bad key"), 2), (ImportError("no timm"), 2), (NonFiniteError("step 3"), 3)],
)
def test_an_error_the_user_can_mend_is_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> int:
        raise error

    for debug in ("", "1"):
        monkeypatch.setenv("SYNCO_DEBUG", debug)
        with pytest.raises(SystemExit) as stop:
            cli.run_main(main)
        assert stop.value.code == code
        message = capsys.readouterr().err
        assert message.endswith(f"error: {error}\n")
        assert ("Traceback" in message) == bool(debug)


def test_an_error_only_we_can_mend_keeps_its_traceback() -> None:
    def main() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run_main(main)


def test_one_rank_says_what_all_ranks_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.config.load import ConfigError

    monkeypatch.setenv("RANK", "1")
    waits: list[float] = []
    monkeypatch.setattr(cli.reporter.time, "sleep", waits.append)
    for error, local, expected, silent in (
        (ConfigError("common"), "1", "", 1),
        (ConfigError("common"), "", "", 1),  # a launcher that does not say it
        (ConfigError("of its machine"), "0", "error (rank 1): of its machine\n", 0),
        (ValueError("own"), "1", "error (rank 1): own\n", 0),
    ):
        waits.clear()
        monkeypatch.setenv("LOCAL_RANK", local)

        def main(error: Exception = error) -> int:
            raise error

        with pytest.raises(SystemExit):
            cli.run_main(main)
        assert capsys.readouterr().err == expected
        assert len(waits) == silent  # a launcher ends all once this one has gone


def test_the_exit_code_is_the_mains() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda: 75)
    assert stop.value.code == 75


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 4, "out of memory; lower --batch-size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            4,
            "lower",
        ),
        (OSError(12, "Cannot allocate memory"), 4, "out of memory"),
        (BlockingIOError(11, "Resource temporarily unavailable"), 5, "ulimit -u"),
        (RuntimeError("can't start new thread"), 5, "DATA.NUM_WORKERS"),
        (OSError(24, "Too many open files", "a.jpg"), 5, "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), 5, "ulimit -n"),
        (RuntimeError("unable to write to file </t>: No space left on device (28)"), 5, "/dev/shm"),
        (OSError(28, "No space left on device", "ckpt.pt"), 2, "free space"),
        (OSError(13, "Permission denied", "x"), 2, "permissions"),
        (
            RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 28. x"),
            5,
            "shm-size",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 5, "NUM_WORKERS"),
    ],
)
def test_a_limit_of_the_machine_is_told_with_its_remedy(
    error: Exception, code: int, words: str
) -> None:
    explained = cli._explain(error)
    assert explained is not None
    assert explained[0] == code
    assert words in explained[1]
    assert "\n" not in explained[1]


def test_an_operation_without_a_reproducible_form_names_the_key() -> None:
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert cli._explain(raised.value) == (
        2,
        "TRAIN.DETERMINISTIC: put_ has no reproducible form; set it to False",
    )


@pytest.mark.parametrize("error", [RuntimeError("shape (24)"), KeyError("x"), AssertionError("28")])
def test_numbers_in_a_fault_of_ours_are_no_limit_of_the_machine(error: Exception) -> None:
    assert cli._explain(error) is None


def test_a_number_of_the_launcher_may_be_empty_but_not_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from utils import distributed

    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("LOCAL_RANK", "")
    distributed.init_processes(torch.device("cpu"))
    assert (distributed.world_size(), distributed.local_rank()) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match=r"WORLD_SIZE='two' .* unset it"):
        distributed.init_processes(torch.device("cpu"))


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import torch

    from utils import distributed

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ValueError, match=f"MASTER_PORT {port} is in use.*--master_port"):
            distributed.init_processes(torch.device("cpu"))
