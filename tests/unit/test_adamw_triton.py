"""The kernels of AdamW without a GPU: their values in Triton's interpreter, and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_dist.kernels import adamw_8bit
from qlora_dist.kernels.adamw_8bit import AdamW, Moment, adamw_8bit_, adamw_32bit_, map_of

pytest.importorskip("triton")
from tests.unit.test_kernels_triton import Compiled, compiles  # noqa: F401

SIZE = 2**24


def test_values_in_the_interpreter() -> None:
    """The tests of the references once more, in a process whose public functions take the kernels instead."""
    tests = Path(__file__).with_name("test_adamw_8bit.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_optimizers_kernels_compile(
    compiles: tuple[int, Compiled],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With and without clipping; 16 bytes of the parameter and four codes at a time; no product fused into a sum."""
    from bitsandbytes.functional import create_dynamic_map

    monkeypatch.setattr(adamw_8bit, "runs_on_triton", lambda x: True)
    param, grad, one, two = (torch.empty(n, device="meta") for n in (SIZE, SIZE, 1, 2))
    moments = [
        Moment(torch.empty(SIZE, dtype=torch.uint8, device="meta"), torch.empty(SIZE // 256, device="meta"), to)
        for to in (
            type(table)(*(t.to("meta") for t in table)) for table in map(map_of, map(create_dynamic_map, (True, False)))
        )
    ]
    for scale, skip in ((one, torch.empty((), dtype=torch.bool, device="meta")), (None, None)):
        step = AdamW(1e-4, 0.9, 0.999, 1e-8, 0.01, two, scale, skip)
        adamw_8bit_(param, grad, moments[0], moments[1], step)
        adamw_32bit_(param, grad, torch.empty_like(param), torch.empty_like(param), step)
        made = compiles[1]
        assert sorted(made) == ["adamw_8bit._adamw_32bit", "adamw_8bit._adamw_8bit"]
        for compiled in made.values():
            ptx = compiled.asm["ptx"]
            assert "ld.global.v4.b32" in ptx
            assert "st.global.v4.b32" in ptx
            assert "st.global.b8" not in ptx
        assert "fma" not in made["adamw_8bit._adamw_32bit"].asm["ptx"]
