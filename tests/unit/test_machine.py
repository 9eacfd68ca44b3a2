"""What is said about the machine, against what the system itself says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align import machine
from launch import doctor

CPUINFO = Path("/proc/cpuinfo")


def test_memory_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        machine.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3_000_000)
    )
    for platform, expected in (("linux", 3_072_000_000), ("darwin", 3_000_000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert machine.peak_bytes() == expected


@pytest.mark.skipif(not CPUINFO.is_file(), reason="no /proc/cpuinfo here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="doctor asks the GPU here")
def test_doctor_knows_whether_the_processor_has_bfloat16() -> None:
    words = set(CPUINFO.read_text().split())
    assert doctor._torch()["bfloat16"] == bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
