"""Memory that runs out is one message that names what to lower, and exit code 2."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from pldr_train.checkpoint.manifest import find_defect
from pldr_train.cli import main
from pldr_train.commands import COMMANDS
from pldr_train.errors import UserError
from pldr_train.memory_errors import where_memory_ran_out, worded_out_of_memory
from tests.processes import run_cli
from tests.tiny import tiny_values


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    with path.open("w") as handle:
        YAML(typ="safe").dump(values, handle)
    return path


def _run_out_of_memory_at_step_3() -> None:
    from pldr_train.training.module import PldrllmModule

    original = PldrllmModule.training_step

    def training_step(self: Any, *arguments: Any) -> Any:
        if self.trainer.global_step == 3:
            torch.empty(2**50)  # 4 PiB are nowhere
        return original(self, *arguments)

    PldrllmModule.training_step = training_step  # type: ignore[method-assign]


def test_a_run_that_does_not_fit_names_the_keys_and_leaves_its_checkpoints_whole(
    tiny_data: Path, tmp_path: Path
) -> None:
    values = tiny_values(tiny_data, tmp_path, checkpoint={"every_steps": 2})
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    done = run_cli("fit", recipe, before=_run_out_of_memory_at_step_3)
    shown = done.stdout + done.stderr
    assert done.returncode == 2, shown
    assert (
        "error: out of memory (CPU), 4194304.00 GiB more could not be had: lower trainer.micro_batch_size=4 (the"
        in shown
    )
    assert "; set parallel.activation_checkpointing=layers; lower data.context_length=32, or take a smaller" in shown
    assert "Traceback" not in shown
    assert find_defect(tmp_path / "tiny" / "checkpoints" / "step-00000002") is None


@pytest.mark.parametrize(
    ("command", "advice"), [("evaluate", "lower --batch-size"), ("generate", "lower --max-new-tokens or --num-beams")]
)
def test_each_command_names_its_own_options(
    command: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> int:
        return int(torch.empty(2**50).numel())  # 4 PiB are nowhere

    monkeypatch.setattr(COMMANDS[command].load(), "run", run)
    assert main([command, "somewhere"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: out of memory (CPU), 4194304.00 GiB more could not be had: {advice}"
    )


def test_only_what_says_so_is_memory_that_ran_out() -> None:
    gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139 GiB"
    )
    assert where_memory_ran_out(gpu) == "GPU"
    expected = r"^out of memory \(GPU\), 20.00 GiB more could not be had: less$"
    with pytest.raises(UserError, match=expected), worded_out_of_memory("less"):
        raise gpu
    with pytest.raises(UserError, match=r"^out of memory \(CPU\): less$"), worded_out_of_memory("less"):
        bytearray(2**62)
    assert where_memory_ran_out(OSError(errno.ENOMEM, "Cannot allocate memory")) == "CPU"
    for other in (RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "full"), UserError("no")):
        assert where_memory_ran_out(other) is None
        with pytest.raises(type(other)), worded_out_of_memory("less"):
            raise other
